"""LoRA through peft (extra `lora`): adapters on the experts' projections, and what stands for them in files.

An adapted projection computes W x + alpha / rank * B A x with W frozen (LoRA, arXiv 2106.09685, eq. 3). In the state
dict W is called `base_layer`; files hold the ordinary model, W + alpha / rank * B A, and apart from it A and B.
"""

import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from g2vlm.errors import InputError, MissingExtra
from train.config import AdapterConfig

EXPERTS = ("semantic", "geometric")
PROJECTIONS = AdapterConfig().modules

TARGETS = r"decoder\.layers\.\d+\.({experts})\.(attention|mlp)\.({modules})"
"""Names of our own model's projections, of some experts and kinds."""

_NAME = "default"  # peft's own for the only adapter of a model
_DOWN, _UP, _BASE = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight", ".base_layer."


def peft_settings(config: AdapterConfig, start: str | None = None, targets: str = TARGETS) -> Any:
    """The peft.LoraConfig of a run's adapters.

    Args:
        config: of the adapters.
        start: the name or folder of the model that they are trained on.
        targets: pattern of the projections' names with places for `experts` and `modules`.

    Raises:
        InputError: unknown experts or modules, or impossible numbers.
        MissingExtra: peft is not installed.
    """
    _check_names("experts", config.experts, EXPERTS)
    _check_names("modules", config.modules, PROJECTIONS)
    for key, value, allowed, fits in (
        ("rank", config.rank, "at least 1", config.rank >= 1),
        ("alpha", config.alpha, "above 0", config.alpha > 0),
        ("dropout", config.dropout, "at least 0 and below 1", 0 <= config.dropout < 1),
    ):
        if not fits:
            raise InputError(f"unusable lora.{key}: {value}", f"it has to be {allowed}", f"set lora.{key}")
    return _peft().LoraConfig(
        base_model_name_or_path=start,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets.format(experts="|".join(config.experts), modules="|".join(config.modules)),
    )


def _check_names(key: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not given:
        raise InputError(f"lora.{key} is empty", "nothing would get adapters", f"name some of: {', '.join(known)}")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"unknown name {name} in lora.{key}", f"known: {', '.join(known)}", fix)


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise MissingExtra("LoRA needs the package peft", "it is not installed", "pip install 'g2vlm[lora]'") from None


def add_adapters(model: nn.Module, settings: Any, seed: int) -> None:
    """Put peft's layers in the place of the projections; the model computes what it did until they are trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(settings, model)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's A or B."""
    return name.endswith((_DOWN, _UP))


def is_adapted(name: str) -> bool:
    """Whether a parameter belongs to a projection with an adapter, which leaves it as it is."""
    return _BASE in name


def plain_name(name: str) -> str:
    """The name of a parameter, not of an adapter, in an ordinary model."""
    return name.replace(_BASE, ".")


def split(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What files hold of a model.

    Args:
        model: with adapters or without.
        state: its full tensors under their own names.

    Returns:
        The weights of an ordinary model, adapters merged into them; and the adapters, none in a model without.
    """
    adapters = {name: tensor for name, tensor in state.items() if is_adapter(name)}
    weights = {plain_name(name): tensor for name, tensor in state.items() if name not in adapters}
    for name, down in adapters.items():  # (rank, in)
        if name.endswith(_DOWN):
            place, settings = name.removesuffix(_DOWN), _settings(model)
            up = adapters[place + _UP]  # (out, rank)
            weights[f"{place}.weight"] = weights[f"{place}.weight"] + settings.lora_alpha / settings.r * (up @ down)
    return weights, adapters


def write_adapters(folder: Path, model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """The adapters of a model, as `split` gives them, in peft's own layout."""
    _settings(model).save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    tensors = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor for name, tensor in adapters.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod((folder / "adapter_config.json").stat().st_mode)


def _settings(model: nn.Module) -> Any:
    return getattr(model, "peft_config")[_NAME]  # noqa: B009 (peft sets it)
