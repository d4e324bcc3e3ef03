"""The model that a run starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from g2vlm.checkpoint import load_model
from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.errors import InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.stock.model import is_stock, load_stock
from train.config import RunConfig
from train.lora import add_adapters, peft_settings
from train.stock.model import PROJECTIONS
from train.student import OurStudent, StockStudent, Student


def starting_student(config: RunConfig) -> Student:
    """The model of a run with its adapters, if it has any: ours, or the stock one of a folder.

    Raises:
        InputError: unknown preset or config key, unusable adapters, or objectives that a stock model cannot have.
        CheckpointError: the folder is unusable.
        MissingExtra: adapters without peft.
    """
    if not is_stock(config.model):
        return OurStudent(starting_model(config))
    if config.objectives.geometry is not None:
        fix = "set it to null; geovr, gasp and spatialsv supervise any model"
        raise InputError("objectives.geometry with a stock model", "it has no geometry heads", fix)
    if config.lora is not None and config.lora.experts != ("semantic",):
        raise InputError("lora.experts with a stock model", "its language model is the only expert", "leave them out")
    folder = Path(str(config.model))
    adapters = None if config.lora is None else peft_settings(config.lora, str(folder), PROJECTIONS)
    model = load_stock(folder).train()
    if adapters is not None:
        add_adapters(model, adapters, config.runtime.seed)
    return StockStudent(model, folder)


def starting_model(config: RunConfig) -> G2VLMForConditionalGeneration:
    """The model of a run with its adapters, if it has any.

    Raises:
        InputError: unknown preset or config key, or unusable adapters.
        CheckpointError: the folder is unusable.
        MissingExtra: adapters without peft.
    """
    name = config.model if isinstance(config.model, str) else config.model.get("checkpoint")
    adapters = None if config.lora is None else peft_settings(config.lora, name)
    model = build_model(config.model, config.runtime.seed)
    if adapters is not None:
        add_adapters(model, adapters, config.runtime.seed)
    return model


def build_model(model: str | dict[str, Any], seed: int) -> G2VLMForConditionalGeneration:
    """The float32 model that a run starts from.

    Args:
        model: a preset, a checkpoint folder, {preset: name, key: value, part: {key: value}}, or a checkpoint folder
            and the fusion that it gets: {checkpoint: folder, fusion: {key: value}}.
        seed: of random weights.

    Raises:
        InputError: unknown preset or config key.
        CheckpointError: the folder is unusable.
    """
    if isinstance(model, str):
        return load_model(model, dtype=torch.float32, seed=seed).train()
    if "checkpoint" in model:
        return fused_checkpoint(model, seed).train()
    config = preset_with(dict(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return G2VLMForConditionalGeneration(config).train()


def fused_checkpoint(overrides: dict[str, Any], seed: int) -> G2VLMForConditionalGeneration:
    """A checkpoint's float32 model with a new fusion: its weights are drawn, all others are the checkpoint's.

    Args:
        overrides: `checkpoint`, a folder, and `fusion`, keys of `FusionConfig`; those left out have their defaults.
        seed: of the fusion's weights.

    Raises:
        InputError: other keys, or a checkpoint that has a fusion already.
        CheckpointError: the folder is unusable.
    """
    if overrides.keys() != {"checkpoint", "fusion"} or not isinstance(overrides["fusion"], dict):
        why = f"a checkpoint gets a fusion and nothing else; given: {', '.join(overrides)}"
        raise InputError("unusable model config", why, "give {checkpoint: FOLDER, fusion: {init: zero}}")
    model = load_model(overrides["checkpoint"], dtype=torch.float32)
    if model.config.fusion is not None:
        fix = f"leave it as it is: --model {overrides['checkpoint']}"
        raise InputError(f"{overrides['checkpoint']} has a fusion already", "its trained weights would be lost", fix)
    with torch.random.fork_rng(devices=[]), readable_config():
        torch.manual_seed(seed)
        model.add_fusion(_part_with("fusion", FusionConfig(), overrides["fusion"]))
    return model


def preset_with(overrides: dict[str, Any]) -> G2VLMConfig:
    """A preset with some of its values replaced, those of its parts one by one."""
    name = overrides.pop("preset", "tiny")
    if name not in PRESETS:
        raise InputError(f"no preset {name}", f"presets: {', '.join(PRESETS)}", "correct model.preset")
    preset = PRESETS[name]()
    with readable_config():
        values = {
            key: _part_with(key, getattr(preset, key) or _ABSENT[key], value) if isinstance(value, dict) else value
            for key, value in overrides.items()
        }
        return PRESETS[name](**values)


@contextmanager
def readable_config() -> Iterator[None]:
    """What a model's config refuses, as an InputError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError("unusable model config", str(error), "see g2vlm/config.py for the keys of a model") from None


_ABSENT = {"fusion": FusionConfig()}
"""What overrides change where a preset has no such part."""


def _part_with(name: str, part: Any, overrides: dict[str, Any]) -> Any:
    for key, value in overrides.items():
        if not hasattr(part, key):
            raise ValueError(f"unknown key {name}.{key}; known: {', '.join(f.name for f in fields(part))}")
        known = getattr(part, key)
        accepted = {float: (int, float), tuple: (list, tuple)}.get(type(known), type(known))
        if not isinstance(value, accepted) or isinstance(value, bool) != isinstance(known, bool):
            raise TypeError(f"{name}.{key} is {value!r}, and should be of the kind of {known!r}")
    return replace(part, **overrides)
