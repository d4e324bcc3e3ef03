"""Fusions of stock models in folders: the same answers after loading, the stock model as it was, one line per error."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2vlm.errors import CheckpointError, InputError
from g2vlm.fused_backbones import FusedLlavaVideo, FusedModel, FusedQwen, tokens_per_frame
from g2vlm.fusion_config import FusionConfig
from g2vlm.fusion_weights import RECORD, WEIGHTS, load_fusion, save_fusion, training_prompt
from g2vlm.model.fusion import NoFusion
from tests.g2vlm.stock import randomise, vision_model
from tests.g2vlm.test_fused_backbones import OTHER, SIDE, frames, llava, llava_inputs, qwen_inputs

CONFIG = FusionConfig(head_dim=16, source="given", token_dim=OTHER, tokens="patches")
PROJECTOR = "model.multi_modal_projector"


def logits(fused: FusedModel) -> torch.Tensor:
    """Answers of a fused model to fixed inputs and geometry."""
    config: Any = fused.model.config
    video = isinstance(fused, FusedLlavaVideo)
    inputs = llava_inputs(tokens_per_frame(SIDE)) if video else qwen_inputs(config.model_type)
    with torch.no_grad(), fused.given_frames.use(frames(4, 4, 6) if video else frames(5, 5, None, 7)):
        return fused(**inputs).logits


def trained(model: Any, config: FusionConfig = CONFIG) -> FusedModel:
    kind = FusedLlavaVideo if model.config.model_type == "llava_next_video" else FusedQwen
    fused = kind.of(model, config)
    randomise(fused.fusion)
    return fused.eval()


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    save_fusion(trained(vision_model("qwen2_vl")), CONFIG, tmp_path / "fusion", prompt="timed")
    return tmp_path / "fusion"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_fusion_survives_a_folder(family: str, tmp_path: Path) -> None:
    fused = trained(vision_model(family))
    save_fusion(fused, CONFIG, tmp_path / "fusion")
    stock = vision_model(family)
    before = copy.deepcopy(stock.state_dict())
    assert torch.equal(logits(load_fusion(stock, tmp_path / "fusion")), logits(fused))
    assert stock.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    assert all(name.startswith("fusion.") for name in load_file(tmp_path / "fusion" / WEIGHTS))


def test_a_projector_that_was_trained_goes_with_it(tmp_path: Path) -> None:
    fused = trained(llava())
    for parameter in fused.model.get_submodule(PROJECTOR).parameters():
        parameter.data += 0.3
    save_fusion(fused, CONFIG, tmp_path / "fusion", (PROJECTOR,), "timed")
    stock = llava()
    before = copy.deepcopy(stock.state_dict())
    loaded = load_fusion(stock, tmp_path / "fusion")
    assert torch.equal(logits(loaded), logits(fused))
    moved = {name for name, tensor in stock.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith(f"{PROJECTOR}.")}


def test_the_record_says_what_it_is(qwen: Path) -> None:
    record = json.loads((qwen / RECORD).read_text())
    assert (record["place"], record["model_type"]) == ("qwen", "qwen2_vl")
    assert (record["visual_dim"], record["geometry_dim"], record["config"]["tokens"]) == (64, OTHER, "patches")
    assert training_prompt(qwen) == record["training_prompt"] == "timed"


def test_the_dtype_is_the_models(qwen: Path) -> None:
    fused = load_fusion(vision_model("qwen2_vl").to(torch.bfloat16), qwen)
    assert {parameter.dtype for parameter in fused.fusion.parameters()} == {torch.bfloat16}


def rewritten(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def recorded(folder: Path, **values: Any) -> None:
    (folder / RECORD).write_text(json.dumps(json.loads((folder / RECORD).read_text()) | values))


DAMAGE: dict[str, tuple[Any, str]] = {
    "missing tensor": (
        lambda f: rewritten(f, lambda t: t.pop("fusion.query.bias")), "1 missing, such as fusion.query.bias",
    ),
    "extra tensor": (
        lambda f: rewritten(f, lambda t: t.update(more=torch.ones(1))), "1 not expected, such as more",
    ),
    "another shape": (
        lambda f: rewritten(f, lambda t: t.update({"fusion.query.bias": torch.ones(3)})),
        r"1 of another shape, such as fusion.query.bias: \[3\] float32, expected \[64\]",
    ),
    "other values": (
        lambda f: rewritten(f, lambda t: t.update({"fusion.query.bias": torch.ones(64)})), "its SHA-256 is not that",
    ),
    "cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), "unusable weight file",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no record": (lambda f: (f / RECORD).unlink(), "missing .*fusion.json"),
    "another width": (lambda f: recorded(f, visual_dim=32), "its visual_dim is 32, the model's 64"),
    "another source": (lambda f: recorded(f, geometry_dim=7), "its geometry_dim is 7, the model's 12"),
    "unknown key": (lambda f: recorded(f, config={"head": 3}), "unexpected keyword argument 'head'"),
    "unknown place": (lambda f: recorded(f, place="here"), "schema, place or training_prompt"),
    "no widths": (lambda f: recorded(f, visual_dim=None), "visual_dim is not as"),
    "heads that do not fit": (lambda f: recorded(f, config={"source": "given", "head_dim": 48}), "do not fill 64"),
    "unknown module": (lambda f: recorded(f, modules=["model.resampler"]), "the model has no module model.resampler"),
    "own tokens": (lambda f: recorded(f, config={}), "a stock model's tokens are given"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_and_the_model_left_alone(kind: str, qwen: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(qwen)
    model = vision_model("qwen2_vl")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_fusion(model, qwen)
    assert all("\n" not in line for line in (caught.value.what, caught.value.why, caught.value.fix))
    assert not model.model.visual._forward_hooks


def test_other_models_are_refused(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="trained on a qwen2_vl, and this is a llava_next_video"):
        load_fusion(llava(), qwen)


def test_what_cannot_be_saved(qwen: Path, tmp_path: Path) -> None:
    fused = trained(vision_model("qwen2_vl"))
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((FusedQwen(fused.model, NoFusion()), CONFIG, tmp_path / "new"), "nothing to save"),
        ((fused, CONFIG, tmp_path / "new", ("model.projector",)), "no module model.projector"),
        ((fused, CONFIG, tmp_path / "new", (), "timely"), "unknown prompt 'timely'"),
        ((fused, CONFIG, qwen), "is not empty"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            save_fusion(*arguments)
    assert not (tmp_path / "new").exists()
    save_fusion(fused, CONFIG, qwen, overwrite=True)
    assert training_prompt(qwen) is None
