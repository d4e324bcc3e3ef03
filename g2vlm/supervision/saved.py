"""What a supervision learned, in files beside a model: `NAME.safetensors`, and `NAME.json` to build its modules again.

    heads/spatialsv.json           {"kind": "spatialsv", "config": {...}, "fit": {...}}
    heads/spatialsv.safetensors    the weights of the heads and of the probe tokens

The model itself holds none of it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2vlm.errors import CheckpointError, InputError
from g2vlm.staging import write_errors
from g2vlm.supervision.base import Fit, Supervision
from g2vlm.weights import TensorSpec, compare, read_header, read_json

SUPERVISIONS = {
    "geovr": "g2vlm.supervision.geovr:GeoVR",
    "gasp": "g2vlm.supervision.gasp:GASP",
    "spatialsv": "g2vlm.supervision.spatialsv:SpatialSV",
}
"""Kind -> its class, imported when it is needed."""

CONFIGS = {
    "geovr": "g2vlm.supervision.geovr:GeoVRHeads",
    "gasp": "g2vlm.supervision.gasp:GASPHeads",
    "spatialsv": "g2vlm.supervision.spatialsv:SpatialSVHeads",
}
"""Kind -> the class of its config."""

KEYS = ("kind", "config", "fit")

_Made = TypeVar("_Made")


def kind_of(supervision: Supervision) -> str:
    """Its key in `SUPERVISIONS`.

    Raises:
        ValueError: a class that is not registered there.
    """
    own = f"{type(supervision).__module__}:{type(supervision).__qualname__}"
    for kind, place in SUPERVISIONS.items():
        if place == own:
            return kind
    raise ValueError(f"{own} is not among {', '.join(SUPERVISIONS.values())}")


def build_supervision(kind: str, config: Any, fit: Fit) -> Supervision:
    """A supervision with fresh weights.

    Raises:
        ValueError: a config or a fit that it refuses.
    """
    return _imported(SUPERVISIONS[kind])(config, fit)


def write_supervision(folder: Path, name: str, supervision: Supervision, weights: Mapping[str, Tensor]) -> None:
    """Write `NAME.safetensors`, then `NAME.json`.

    Args:
        folder: is made if it is absent; files of the same names are replaced.
        name: of the files.
        supervision: what the weights are of; its kind, config and fit are written.
        weights: whole tensors by their names in the supervision's state dict, whichever device they are on.

    Raises:
        CheckpointError: weights that are not those of such a supervision.
        InputError, ResourceError: the files cannot be written.
    """
    kind = kind_of(supervision)
    compare(_specs(kind, supervision.config, supervision.fit), _specs_of(weights)).require_complete(name)
    record = {"kind": kind, "config": asdict(supervision.config), "fit": asdict(supervision.fit)}
    weights_file, record_file = _files(folder, name)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        save_file(stored, weights_file, metadata={"format": "pt"})
        record_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_supervision(folder: Path, name: str) -> Supervision:
    """What `write_supervision` wrote, in evaluation mode on the CPU, every tensor in its stored precision.

    Raises:
        InputError: there are no such files.
        CheckpointError: an unknown kind or key, damaged files, or weights that do not fit the config.
    """
    weights_file, record_file = _files(folder, name)
    if not record_file.is_file():
        known = saved_names(folder)
        why = f"the folder holds {', '.join(known)}" if known else "the folder holds no heads"
        raise InputError(
            f"no heads {record_file.with_suffix('')}", why, "give FOLDER/NAME of NAME.json and NAME.safetensors"
        )
    kind, config, fit = _read_record(record_file)
    try:
        expected = _specs(kind, config, fit)
    except ValueError as error:
        raise _unusable(record_file, _line(error)) from None
    compare(expected, read_header(_present(weights_file))).require_complete(weights_file)
    supervision = build_supervision(kind, config, fit)
    supervision.load_state_dict(load_file(weights_file), assign=True)
    return supervision.eval()


def saved_names(folder: Path) -> list[str]:
    """Names of the heads that a folder holds."""
    return sorted(file.stem for file in folder.glob("*.json") if file.with_suffix(".safetensors").is_file())


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def _present(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(f"missing {file}", "the weights of the heads are absent", "copy the whole folder again")
    return file


def _read_record(file: Path) -> tuple[str, Any, Fit]:
    """Kind, config and fit.

    Raises:
        CheckpointError: the file holds something else.
    """
    record = read_json(file)
    if wrong := sorted(record.keys() ^ set(KEYS)):
        raise _unusable(file, f"it must have the keys {', '.join(KEYS)}; missing or unknown: {', '.join(wrong)}")
    kind = record["kind"]
    if kind not in SUPERVISIONS:
        raise _unusable(file, f"kind is {kind!r}; known: {', '.join(SUPERVISIONS)}")
    config = _from_plain(_imported(CONFIGS[kind]), record["config"], f"{file}: config")
    return kind, config, _from_plain(Fit, record["fit"], f"{file}: fit")


def _from_plain(kind: type[_Made], values: Any, place: str) -> _Made:
    """A config from what JSON makes of it, tuples and nested configs included; unknown keys are refused.

    Raises:
        CheckpointError: values that do not fit.
    """
    if not isinstance(values, dict):
        raise _unusable(place, f"expected an object, found {values!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config")
    try:
        return parser.instantiate(parser.parse_object({"config": values})).config
    except (ArgumentError, ValueError, TypeError) as error:
        raise _unusable(place, _line(error)) from None


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def _unusable(place: object, why: str) -> CheckpointError:
    return CheckpointError(f"unusable heads {place}", why, "use the files as the training run wrote them")


def _specs(kind: str, config: Any, fit: Fit) -> dict[str, TensorSpec]:
    """What its state dict holds, without memory for it."""
    with torch.device("meta"):
        return _specs_of(build_supervision(kind, config, fit).state_dict())


def _specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _imported(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
