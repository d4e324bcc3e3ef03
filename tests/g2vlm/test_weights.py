"""Safetensors files: refused when damaged, without being opened; written one tensor at a time."""

import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2vlm.errors import CheckpointError
from g2vlm.weights import INDEX, WEIGHTS, TensorSpec, WeightFiles, compare, write_weights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2, 3]),
    "d": torch.tensor(2.5),
}


class Memory:
    """A source of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def load(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / WEIGHTS)
    return tmp_path


def test_headers_tell_types_and_shapes(folder: Path) -> None:
    files = WeightFiles(folder)
    assert files.specs["b"] == (torch.bfloat16, (5,))
    assert files.specs["d"] == (torch.float32, ())
    assert all(torch.equal(files.load(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("max_shard_bytes", [None, 30, 1])
def test_written_files_are_read_by_the_library(tmp_path: Path, max_shard_bytes: int | None) -> None:
    write_weights(tmp_path, Memory(TENSORS), max_shard_bytes=max_shard_bytes)
    read = {name: t for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in TENSORS.items())
    assert (tmp_path / INDEX).is_file() == (max_shard_bytes is not None)
    assert WeightFiles(tmp_path).specs == Memory(TENSORS).specs


def test_written_tensors_are_aligned(tmp_path: Path) -> None:
    write_weights(tmp_path, Memory(TENSORS))
    data = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, spec in WeightFiles(tmp_path).specs.items():
        assert header[name]["data_offsets"][0] % spec.dtype.itemsize == 0


def test_only_floating_tensors_are_cast(tmp_path: Path) -> None:
    write_weights(tmp_path, Memory(TENSORS), dtype=torch.bfloat16)
    specs = WeightFiles(tmp_path).specs
    assert {name: spec.dtype for name, spec in specs.items()} == {
        "a": torch.bfloat16, "b": torch.bfloat16, "c": torch.int64, "d": torch.bfloat16,
    }  # fmt: skip


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive = []

    class Counting(Memory):
        def load(self, name: str) -> Tensor:
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = super().load(name).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    write_weights(tmp_path, Counting({f"t{i}": torch.full((3,), float(i)) for i in range(6)}))
    assert len(alive) == 6


def expect_refusal(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(path)
    assert caught.value.code == 5
    assert caught.value.why
    assert caught.value.fix
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1, -20])
def test_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    expect_refusal(folder, WEIGHTS)


def test_trailing_bytes(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    expect_refusal(folder, WEIGHTS, "bytes")


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickle_under_another_name_never_runs(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "executed"
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Bomb(target), protocol=protocol))
    expect_refusal(tmp_path, WEIGHTS)
    assert not target.exists()
    pickle.loads((tmp_path / WEIGHTS).read_bytes())
    assert target.exists(), "the pickle is harmless: this test proves nothing"


def test_torch_archive_under_another_name(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / WEIGHTS)
    expect_refusal(tmp_path, "pickle or a zip")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_folder_of_pickles(tmp_path: Path, name: str) -> None:
    torch.save(TENSORS, tmp_path / name)
    expect_refusal(tmp_path, name, "safetensors")


def test_folder_without_weights(tmp_path: Path) -> None:
    expect_refusal(tmp_path, WEIGHTS)
    expect_refusal(tmp_path / "absent", "no such folder")


@pytest.mark.parametrize(
    "header",
    [
        "no json at all",
        "[]",
        '{"a": 3}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        "[" * 100_000,
    ],
)
def test_impossible_header(tmp_path: Path, header: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8)
    expect_refusal(tmp_path, WEIGHTS)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_weights(tmp_path, Memory(TENSORS), max_shard_bytes=1)
    return tmp_path


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00004.safetensors").unlink()
    expect_refusal(shards, "model-00002-of-00004.safetensors")


def test_index_that_disagrees(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    (shards / INDEX).write_text(json.dumps(index))
    expect_refusal(shards, "ghost")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a"}}'])
def test_damaged_index(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    expect_refusal(shards, INDEX)


def test_comparison_lists_everything_sorted() -> None:
    f32 = torch.float32
    expected = {name: TensorSpec(f32, (2,)) for name in ("x", "m2", "m1", "w", "int")}
    found = {name: TensorSpec(f32, (2,)) for name in ("x", "u2", "u1")}
    found |= {"w": TensorSpec(torch.bfloat16, (3, 1)), "int": TensorSpec(torch.int8, (2,))}
    coverage = compare(expected, found)
    assert coverage.missing == ("m1", "m2")
    assert coverage.unexpected == ("u1", "u2")
    assert coverage.mismatched == ("int: [2] int8, expected [2]", "w: [3, 1] bfloat16, expected [2]")
    with pytest.raises(CheckpointError) as caught:
        coverage.require_complete("folder")
    text = str(caught.value)
    assert [text.index(word) for word in ("m1", "m2", "u1", "u2", "int:", "w:")] == sorted(
        text.index(word) for word in ("m1", "m2", "u1", "u2", "int:", "w:")
    )
    compare(expected, expected).require_complete("folder")
