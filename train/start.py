"""The model that a run starts from."""

from dataclasses import replace
from typing import Any

import torch

from g2vlm.checkpoint import load_model
from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.errors import InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from train.config import RunConfig
from train.lora import add_adapters, peft_settings


def starting_model(config: RunConfig) -> G2VLMForConditionalGeneration:
    """The model of a run with its adapters, if it has any.

    Raises:
        InputError: unknown preset or config key, or unusable adapters.
        CheckpointError: the folder is unusable.
        MissingExtra: adapters without peft.
    """
    name = config.model if isinstance(config.model, str) else None
    adapters = None if config.lora is None else peft_settings(config.lora, name)
    model = build_model(config.model, config.runtime.seed)
    if adapters is not None:
        add_adapters(model, adapters, config.runtime.seed)
    return model


def build_model(model: str | dict[str, Any], seed: int) -> G2VLMForConditionalGeneration:
    """The float32 model that a run starts from.

    Args:
        model: a preset, a checkpoint folder, or {preset: name, key: value, part: {key: value}}.
        seed: of random weights.

    Raises:
        InputError: unknown preset or config key.
        CheckpointError: the folder is unusable.
    """
    if isinstance(model, str):
        return load_model(model, dtype=torch.float32, seed=seed).train()
    config = preset_with(dict(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return G2VLMForConditionalGeneration(config).train()


def preset_with(overrides: dict[str, Any]) -> G2VLMConfig:
    """A preset with some of its values replaced, those of its parts one by one."""
    name = overrides.pop("preset", "tiny")
    if name not in PRESETS:
        raise InputError(f"no preset {name}", f"presets: {', '.join(PRESETS)}", "correct model.preset")
    preset = PRESETS[name]()
    try:
        values = {
            key: _part_with(key, getattr(preset, key) or _ABSENT[key], value) if isinstance(value, dict) else value
            for key, value in overrides.items()
        }
        return PRESETS[name](**values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError("unusable model config", str(error), "see g2vlm/config.py for the keys of a model") from None


_ABSENT = {"fusion": FusionConfig()}
"""What overrides change where a preset has no such part."""


def _part_with(name: str, part: Any, overrides: dict[str, Any]) -> Any:
    for key, value in overrides.items():
        known = getattr(part, key)
        accepted = {float: (int, float), tuple: (list, tuple)}.get(type(known), type(known))
        if not isinstance(value, accepted) or isinstance(value, bool) != isinstance(known, bool):
            raise TypeError(f"{name}.{key} is {value!r}, and should be of the kind of {known!r}")
    return replace(part, **overrides)
