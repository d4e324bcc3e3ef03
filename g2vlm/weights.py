"""Named tensors in safetensors files: checked before they are read, read one at a time, written one at a time.

Only safetensors is ever opened: a header of JSON and raw numbers, nothing that can run.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from g2vlm.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
MAX_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


Specs = Mapping[str, TensorSpec]


class TensorSource(Protocol):
    """Tensors by name, each made when it is asked for."""

    @property
    def specs(self) -> Specs:
        """Name -> dtype and shape of every tensor."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        ...


class WeightFiles:
    """The tensors of a checkpoint folder, or of one safetensors file.

    Every header is read and checked against its file's size at construction; tensors are mapped from the files.

    Raises:
        CheckpointError: a file is absent, damaged, or something else than safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._open: dict[Path, Any] = {}
        for file, names in _locate(self.path).items():
            header = read_header(file)
            _check_shard(file, header, names)
            self.specs.update(header)
            self._files.update(dict.fromkeys(header, file))

    def load(self, name: str) -> Tensor:
        """The tensor, backed by its file until it is changed."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)


def sha256(path: Path) -> str:
    """Of a file, as `sha256sum` prints it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, or the one file that `path` is.

    Raises:
        CheckpointError: there is none.
    """
    return sorted(_locate(Path(path)))


def _locate(path: Path) -> dict[Path, set[str] | None]:
    """Weight files -> the names the index promises in them (None without an index)."""
    if path.is_file():
        return {path: None}
    if (path / WEIGHTS).is_file():
        return {path / WEIGHTS: None}
    if (path / INDEX).is_file():
        return _read_index(path / INDEX)
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in PICKLES) if path.is_dir() else []
    if pickles:
        raise CheckpointError(
            f"no safetensors weights in {path}",
            f"only {', '.join(pickles)}, whose format can run code when it is opened",
            "save the weights as safetensors where they come from, and use that folder",
        )
    why = f"it holds neither {WEIGHTS} nor {INDEX}" if path.is_dir() else "there is no such folder"
    raise CheckpointError(f"no weights in {path}", why, "give the folder that holds the checkpoint's files")


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"damaged index {index}", "it has no weight_map from tensor to file", "download it again")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"refused index {index}", f"{file!r} lies outside the folder", "use plain file names")
        names = shards.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing:
        raise CheckpointError(
            f"incomplete checkpoint {index.parent}", f"missing {', '.join(missing)}", "download the missing files"
        )
    return shards


def _check_shard(file: Path, header: Specs, names: set[str] | None) -> None:
    if names is None or names == header.keys():
        return
    differ = sorted(names ^ header.keys())
    raise CheckpointError(
        f"{file} does not hold what {INDEX} says", f"differing: {', '.join(differ)}", "download both files again"
    )


def read_header(file: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: the header is no safetensors header, or promises other data than the file holds.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(start := stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise _damaged(file, _what_it_is(start, size))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(value) for name, value in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be read ({type(error).__name__}: {error})") from None
    position = 0
    for begin, end, spec in sorted(entries.values(), key=lambda entry: entry[:2]):
        if begin != position or end - begin != spec.num_bytes:
            raise _damaged(file, "the places of its tensors do not follow each other")
        position = end
    if position != size - 8 - length:
        raise _damaged(file, f"its tensors need {position} bytes, and it holds {size - 8 - length}")
    return {name: spec for name, (_, _, spec) in entries.items()}


def _entry(value: Mapping[str, Any]) -> tuple[int, int, TensorSpec]:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("shapes and offsets must be whole numbers")
    return begin, end, TensorSpec(DTYPES[value["dtype"]], shape)


def _what_it_is(start: bytes, size: int) -> str:
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        return "it is a pickle or a zip archive under another name; it was not opened"
    return f"not safetensors, or cut off inside its header ({size} bytes)"


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"unusable weight file {file}", why, "download or copy the file again")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is absent or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"missing {file}", "the checkpoint needs it", "copy the whole folder again") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"unreadable {file}", f"{error}", "download or copy the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"unreadable {file}", "it is not a JSON object", "download or copy the file again")
    return value


@dataclass(frozen=True)
class Coverage:
    """How a checkpoint's tensors differ from those that an architecture needs; all names, sorted."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        groups = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape or type": self.mismatched}
        return "\n".join(
            f"{len(names)} {title}:" + "".join(f"\n    {name}" for name in names)
            for title, names in groups.items()
            if names
        )

    def require_complete(self, source: object) -> None:
        """Raise a CheckpointError that lists every difference, if there is any."""
        if self.missing or self.unexpected or self.mismatched:
            raise CheckpointError(
                f"the weights of {source} do not fit the architecture that its config describes",
                str(self),
                "use the config that belongs to these weights, or download both again",
            )


def compare(expected: Specs, found: Specs) -> Coverage:
    """Hold a checkpoint's tensors against the expected ones: names, shapes, and that they are floating point."""
    mismatched = [
        f"{name}: {list(found[name].shape)} {_short(found[name].dtype)}, expected {list(spec.shape)}"
        for name, spec in expected.items()
        if name in found and (found[name].shape != spec.shape or not found[name].dtype.is_floating_point)
    ]
    return Coverage(
        missing=tuple(sorted(expected.keys() - found.keys())),
        unexpected=tuple(sorted(found.keys() - expected.keys())),
        mismatched=tuple(sorted(mismatched)),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast(specs: Specs, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """The specs with every floating dtype replaced; None keeps them."""
    return {
        name: TensorSpec(dtype if dtype and spec.dtype.is_floating_point else spec.dtype, spec.shape)
        for name, spec in specs.items()
    }


def write_weights(
    folder: Path, source: TensorSource, dtype: torch.dtype | None = None, max_shard_bytes: int | None = None
) -> None:
    """Write a source's tensors in its order, with one tensor in memory at a time.

    Args:
        folder: where model.safetensors, or the shards and their index, go.
        source: the tensors.
        dtype: storage type of floating-point tensors; None keeps each tensor's own.
        max_shard_bytes: start a new file before one grows beyond this; None writes a single file.
    """
    specs = cast(source.specs, dtype)
    shards = _split(specs, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0], source)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, source)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(specs: Specs, max_bytes: int | None) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if max_bytes and shards[-1] and filled + spec.num_bytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.num_bytes
    return shards


def _write_file(file: Path, specs: Specs, source: TensorSource) -> None:
    """The safetensors format: the header's length, the JSON header, the data; widest types first, for alignment."""
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape = specs[name]
        end = position + specs[name].num_bytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = source.load(name)
            assert tensor.shape == specs[name].shape, f"{name}: {tuple(tensor.shape)}"
            stream.write(_raw_bytes(tensor.to(specs[name].dtype)))
        stream.flush()
        os.fsync(stream.fileno())


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def storage_dtype(specs: Specs) -> torch.dtype:
    """The type in which most values are stored."""
    totals: dict[torch.dtype, int] = {}
    for spec in specs.values():
        totals[spec.dtype] = totals.get(spec.dtype, 0) + math.prod(spec.shape)
    return max(totals, key=lambda dtype: totals[dtype], default=torch.float32)


def common_size(specs: Specs, places: Sequence[str]) -> int | None:
    """The commonest size at places written `name:axis`: one damaged tensor does not decide; None when none is there."""
    split = [(name, int(axis)) for name, axis in (place.split(":") for place in places)]
    sizes = [specs[name].shape[axis] for name, axis in split if name in specs and len(specs[name].shape) > axis]
    return Counter(sizes).most_common(1)[0][0] if sizes else None
