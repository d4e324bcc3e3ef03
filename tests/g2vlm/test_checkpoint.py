"""Models in folders: strict loading with every difference listed, both precisions, Auto classes, presets, hub ids."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import g2vlm.checkpoint
from g2vlm.checkpoint import inspect, load_model, read_config, save_model
from g2vlm.config import G2VLMConfig
from g2vlm.errors import CheckpointError, InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.weights import INDEX, WEIGHTS
from tests.g2vlm.test_model import small_config


@pytest.fixture(scope="module")
def model() -> G2VLMForConditionalGeneration:
    torch.manual_seed(0)
    return G2VLMForConditionalGeneration(small_config()).eval()


@pytest.fixture
def folder(model, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def assert_same_state(first, second) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def own_values(config: G2VLMConfig) -> dict:
    return {name: value for name, value in config.to_diff_dict().items() if name != "dtype"}


def buffers(model) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


def test_save_and_load(model, folder: Path) -> None:
    loaded = load_model(folder)
    assert_same_state(loaded, model)
    assert own_values(loaded.config) == own_values(model.config)
    assert not loaded.training
    assert not loaded.geometry_encoder.mask_token.requires_grad
    assert sum(p.requires_grad for p in loaded.parameters()) == sum(p.requires_grad for p in model.parameters())
    assert buffers(loaded).keys() == buffers(model).keys()
    assert all(torch.equal(buffer, buffers(model)[name]) for name, buffer in buffers(loaded).items())


def test_shards(model, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", max_shard_size="100KB")
    assert (tmp_path / "model" / INDEX).is_file()
    assert_same_state(load_model(tmp_path / "model"), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", torch.bfloat16])
def test_any_storage_in_any_precision(model, tmp_path: Path, stored: torch.dtype, wanted) -> None:
    save_model(model, tmp_path / "model", dtype=stored)
    assert {spec.dtype for spec in inspect(tmp_path / "model").values()} == {stored}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    loaded = load_model(tmp_path / "model", dtype=wanted)
    dtype = torch.float32 if wanted == "float32" else wanted
    for name, tensor in loaded.state_dict().items():
        fp32 = any(f"{head}." in name for head in ("point_head", "camera_head", "normal_head", "confidence_head"))
        assert tensor.dtype == (torch.float32 if fp32 else dtype), name
        assert torch.equal(tensor, model.state_dict()[name].to(stored).to(tensor.dtype)), name


def test_auto_classes(model, folder: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(folder), G2VLMConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(loaded, G2VLMForConditionalGeneration)
    assert_same_state(loaded, model)


def test_from_pretrained_keeps_its_arguments(folder: Path) -> None:
    loaded, info = G2VLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, geometry_attention="frame"
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.geometry_attention == "frame"
    assert info["missing_keys"] == set()


def test_device_map(folder: Path) -> None:
    pytest.importorskip("accelerate")
    loaded = G2VLMForConditionalGeneration.from_pretrained(folder, device_map={"": "cpu"})
    assert loaded.device.type == "cpu"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("load", [load_model, G2VLMForConditionalGeneration.from_pretrained])
def test_every_difference_is_listed(folder: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(tensors) -> None:
        del tensors["lm_head.weight"], tensors["decoder.layers.1.semantic.mlp.up_proj.weight"]
        tensors["extra.one"] = tensors["extra.two"] = torch.ones(1)
        tensors["embed_tokens.weight"] = torch.ones(3, 2)
        tensors["heads.point_head.proj.bias"] = torch.ones(1)

    def fail(*args: object) -> None:
        raise AssertionError("weights were allocated")

    rewrite(folder, damage)
    monkeypatch.setattr(G2VLMForConditionalGeneration, "_load_pretrained_model", fail)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    for name in ("lm_head.weight", "decoder.layers.1.semantic.mlp.up_proj.weight", "extra.one", "extra.two"):
        assert name in text
    assert "embed_tokens.weight: [3, 2] float32, expected [40, 32]" in text
    assert "heads.point_head.proj.bias: [1]" in text


def test_state_dict_is_held_to_the_same_rule(model) -> None:
    state = model.state_dict()
    state["extra"] = state.pop("lm_head.weight")
    state["embed_tokens.weight"] = torch.ones(3, 2)
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        G2VLMForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state)
    assert all(name in str(caught.value) for name in ("extra", "lm_head.weight", "embed_tokens.weight: [3, 2]"))


def change_config(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["decoder"].update(hiden_size=3), "decoder.hidden_size"),
        (lambda c: c.update(geometri_attention="global"), "geometry_attention"),
        (lambda c: c.update(geometry_attention="local"), "'local'"),
        (lambda c: c.update(decoder=3), "config"),
        (lambda c: c["decoder"].update(hidden_size="wide"), "config"),
        (lambda c: c["decoder"].update(num_kv_heads=0), "config"),
        (lambda c: c["decoder"].update(num_layers="2"), "decoder.num_layers"),
        (lambda c: c["decoder"].update(rms_norm_eps="small"), "decoder.rms_norm_eps"),
        (lambda c: c["decoder"].update(vocab_size=-1), "negative"),
        (lambda c: c.update(model_type="bert"), "model_type g2vlm"),
        (lambda c: c.pop("model_type"), "config.json"),
    ],
)
def test_unusable_config(folder: Path, change, words: str) -> None:
    change_config(folder, change)
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff", "[" * 100_000])
def test_garbage_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


def test_a_stock_qwen_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(CheckpointError, match="g2vlm convert"):
        load_model(tmp_path)


def test_saving_never_overwrites_unasked(model, folder: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        save_model(model, folder)
    save_model(model, folder, overwrite=True)
    (folder / "thesis.docx").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.docx"):
        save_model(model, folder, overwrite=True)
    assert (folder / "thesis.docx").is_file()


def test_failed_saving_leaves_nothing(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_destination(model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/model"):
        with pytest.raises(InputError):
            save_model(model, tmp_path / name)


def test_presets_are_seeded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="g2vlm"):
        first = load_model("tiny", seed=1)
    assert "random weights: preset tiny, seed 1" in caplog.text
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_same_state(load_model("tiny", seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(load_model("tiny", seed=2).lm_head.weight, first.lm_head.weight)
    assert load_model("tiny", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny", "small", "paper_2b"])
def test_preset_configs(name: str) -> None:
    assert read_config(name).to_dict() == getattr(G2VLMConfig, name)().to_dict()


def test_configs_of_folders(model, folder: Path) -> None:
    assert read_config(folder).decoder == model.config.decoder


@pytest.mark.parametrize("source", ["absent", "a/b/c", Path("a/b"), "/no/such", ""])
def test_no_such_source(source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g2vlm.checkpoint, "snapshot_download", None)
    with pytest.raises(InputError):
        load_model(source) if source else load_model("missing")


def test_hub_id(model, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision))
        assert not any("py" in pattern or "bin" in pattern for pattern in allow_patterns)
        return os.fspath(folder)

    monkeypatch.setattr(g2vlm.checkpoint, "snapshot_download", download)
    with caplog.at_level(logging.WARNING, logger="g2vlm"):
        assert_same_state(load_model("owner/name", revision="a" * 40), model)
        assert "revision" not in caplog.text
        load_model("owner/name", revision="main")
    assert "owner/name without revision" in caplog.text
    assert calls == [("owner/name", "a" * 40), ("owner/name", "main")]


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(g2vlm.checkpoint, "snapshot_download", fail)
    with pytest.raises(InputError, match="no route"):
        load_model("owner/name", revision="a" * 40)


def test_unsupported_precision(folder: Path) -> None:
    with pytest.raises(InputError, match="float16"):
        load_model(folder, dtype=torch.float16)
