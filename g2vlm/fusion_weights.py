"""The fusion of a stock model in a folder of its own, beside the model, which stays as it was.

The folder holds fusion.safetensors (the fusion's parameters under `fusion.`, and those of the stock model's modules
that were trained with it, such as the projector, under `model.`) and fusion.json: the fusion's config, widths, where it
stands, the prompt of its training, and the SHA-256 of the other file.

    save_fusion(fused, config, folder, modules=("model.multi_modal_projector",), prompt="timed")
    fused = load_fusion(stock_model, folder)
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from g2vlm.errors import CheckpointError, InputError
from g2vlm.fused_backbones import FUSED, FusedModel
from g2vlm.fusion_config import FusionConfig
from g2vlm.model.fusion import SpatialVisualViewFusion
from g2vlm.prompts import VIDEO_PROMPTS
from g2vlm.staging import staged_folder
from g2vlm.weights import TensorSpec, compare, read_header, read_json, sha256

WEIGHTS, RECORD = "fusion.safetensors", "fusion.json"
SCHEMA = 1


def save_fusion(
    fused: FusedModel,
    config: FusionConfig,
    folder: Path,
    modules: Sequence[str] = (),
    prompt: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a fusion; nothing of the stock model but what is named.

    Args:
        fused: a stock model and its fusion.
        config: that the fusion was built of.
        folder: to make.
        modules: of the stock model that were trained too, such as `model.multi_modal_projector`.
        prompt: key of `VIDEO_PROMPTS` that it was trained with; None if no video was asked about.
        overwrite: replace a folder that is not empty.

    Raises:
        InputError: no fusion, an unknown module or prompt, or a folder that is taken or cannot be written.
        ResourceError: the disk is full.
    """
    if not isinstance(fused.fusion, SpatialVisualViewFusion):
        raise InputError("nothing to save", "the model has no fusion", "save the model alone")
    if prompt is not None and prompt not in VIDEO_PROMPTS:
        raise InputError(f"unknown prompt {prompt!r}", f"known are {', '.join(VIDEO_PROMPTS)}", "name one of them")
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in _own(fused.model, fused.fusion, modules).items()
    }
    record = {
        "schema": SCHEMA,
        "place": next(name for name, kind in FUSED.items() if type(fused) is kind),
        "model_type": _model_type(fused.model),
        "config": asdict(config),
        **_widths(fused.fusion),
        "modules": list(modules),
        "training_prompt": prompt,
    }
    with staged_folder(folder, overwrite, sum(tensor.nbytes for tensor in tensors.values())) as staging:
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps({**record, "sha256": sha256(staging / WEIGHTS)}, indent=2, sort_keys=True) + "\n"
        (staging / RECORD).write_text(text, encoding="utf-8")
        (staging / WEIGHTS).chmod((staging / RECORD).stat().st_mode)


def load_fusion(model: nn.Module, folder: Path) -> FusedModel:
    """Put a saved fusion on a stock model, on the model's device and in its dtype, in evaluation mode.

    Args:
        model: as the fusion was trained on; nothing of it changes if the fusion does not fit, and otherwise only the
            modules that were saved with it.
        folder: that `save_fusion` made.

    Raises:
        CheckpointError: a file is absent or damaged, or its tensors are not those of this model's fusion.
    """
    record, file = _read_record(folder), folder / WEIGHTS
    if record["model_type"] != _model_type(model):
        why = f"it was trained on a {record['model_type']}, and this is a {_model_type(model)}"
        raise CheckpointError(f"the fusion of {folder} is for another model", why, "load the model it was trained on")
    kind = FUSED[record["place"]]
    try:
        fusion = kind.new_fusion(model, FusionConfig(**record["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"unusable {folder / RECORD}", str(error), "copy both files again") from None
    _require_widths(folder, record, fusion)
    try:
        expected = _own(model, fusion, record["modules"])
    except InputError as error:
        raise CheckpointError(
            f"the fusion of {folder} is for another model", error.what, "load the model it was trained on"
        ) from None
    _require_intact(file, record, expected)
    stored = load_file(file)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])
    return kind(model, fusion).eval()


def training_prompt(folder: Path) -> str | None:
    """Key of `VIDEO_PROMPTS` that a fusion was trained with; errors as in `load_fusion`."""
    return _read_record(folder)["training_prompt"]


def _own(model: nn.Module, fusion: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of the fusion and of modules of the stock model.

    Raises:
        InputError: an unknown module, or one without tensors.
    """
    tensors = {f"fusion.{name}": tensor for name, tensor in fusion.state_dict().items()}
    state = model.state_dict()
    for module in modules:
        own = {f"model.{name}": tensor for name, tensor in state.items() if name.startswith(f"{module}.")}
        if not own:
            raise InputError(
                f"the model has no module {module}", "nothing of it could be saved or loaded", "correct it"
            )
        tensors |= own
    return tensors


def _model_type(model: nn.Module) -> str:
    config: Any = model.config
    return config.model_type


def _widths(fusion: nn.Module) -> dict[str, int]:
    assert isinstance(fusion, SpatialVisualViewFusion)
    return {"visual_dim": fusion.key.out_features, "geometry_dim": fusion.key.in_features}


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / RECORD)
    kinds = {
        "place": str,
        "model_type": str,
        "config": dict,
        "visual_dim": int,
        "geometry_dim": int,
        "modules": list,
        "sha256": str,
    }
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if record.get("schema") != SCHEMA or wrong or record["place"] not in FUSED or "training_prompt" not in record:
        why = f"{', '.join(wrong) or 'schema, place or training_prompt'} is not as `save_fusion` writes it"
        raise CheckpointError(f"unusable {folder / RECORD}", why, "copy both files again")
    return record


def _require_widths(folder: Path, record: dict[str, Any], fusion: nn.Module) -> None:
    for key, own in _widths(fusion).items():
        if record[key] != own:
            why = f"its {key} is {record[key]}, the model's {own}"
            raise CheckpointError(
                f"the fusion of {folder} is for another model", why, "load the model it was trained on"
            )


def _require_intact(file: Path, record: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """The tensors expected and no others, as they were written; the first of the differences in one line."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing", f"{RECORD} is there alone", "copy the whole folder again")
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    differ = compare(specs, read_header(file))
    groups = {"missing": differ.missing, "not expected": differ.unexpected, "of another shape": differ.mismatched}
    if parts := [f"{len(names)} {what}, such as {names[0]}" for what, names in groups.items() if names]:
        raise CheckpointError(f"{file} is of another fusion", "; ".join(parts), "use the folder as it was saved")
    if sha256(file) != record["sha256"]:
        raise CheckpointError(f"{file} is damaged", f"its SHA-256 is not that of {RECORD}", "copy both files again")
