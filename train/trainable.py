"""Which parameters train: named groups with learning-rate multipliers, in place of mode flags."""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from g2vlm.errors import InputError
from train.lora import is_adapter

GROUPS = {
    "geometry_encoder": r"geometry_encoder\.",
    "projection": r"geometry_projection\.",
    "geometric_expert": r"decoder\.(layers\.\d+\.geometric|geometric_norm)\.",
    "semantic_expert": r"decoder\.(layers\.\d+\.semantic|semantic_norm)\.",
    "embeddings": r"embed_tokens\.",
    "lm_head": r"lm_head\.",
    "geometry_heads": r"heads\.",
    "semantic_encoder": r"semantic_encoder\.",
    "fusion": r"fusion\.",
}
"""Group -> pattern that the names of its parameters start with."""

PARTS = {"merger": ("semantic_encoder", r"semantic_encoder\.merger\.")}
"""Part of a group that can be named apart, such as the projector behind a frozen tower -> its group and its pattern."""

NEVER_TRAINED = ("geometry_encoder.mask_token",)
"""Belongs to the weights' layout and takes no part in the computation."""

_CHECKPOINTED = ("MoTLayer", "FrameBlock", "ContextBlock", "Qwen2VLVisionBlock", "Attention", "Mlp")


def group_of(name: str, named: Iterable[str] = (), groups: Mapping[str, str] = GROUPS) -> str:
    """The group of a parameter of the model, or the part of a group if it is among those `named`."""
    for part, (_, pattern) in PARTS.items():
        if part in named and re.match(pattern, name):
            return part
    return next(group for group, pattern in groups.items() if re.match(pattern, name))


def set_trainable(
    model: nn.Module, multipliers: Mapping[str, float], groups: Mapping[str, str] = GROUPS
) -> dict[str, list[str]]:
    """Freeze every group that is absent or has multiplier 0, and train the others: an expert with adapters, by these.

    Args:
        model: of any kind.
        multipliers: group -> of its learning rate.
        groups: of this kind of model, as `GROUPS`.

    Returns:
        Group -> names of its trained parameters.

    Raises:
        InputError: an unknown group, one that this model has no parameters of, or adapters whose group is frozen.
    """
    known = {**groups, **PARTS}
    for group in multipliers:
        if group not in known:
            near = difflib.get_close_matches(group, known, n=1)
            fix = f"did you mean {near[0]}?" if near else f"groups: {', '.join(known)}"
            raise InputError(f"unknown group trainable.{group}", "no such parameters exist", fix)
    trained: dict[str, list[str]] = {group: [] for group, factor in multipliers.items() if factor > 0}
    adapted = {group_of(name, (), groups) for name, _ in model.named_parameters() if is_adapter(name)}
    for group in sorted(adapted - trained.keys()):
        raise InputError(
            f"lora adapts the {group}, and trainable freezes it", "adapters have the multiplier of their group",
            f"add {group}: 1.0 to trainable, or take the expert out of lora.experts",
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        group = group_of(name, multipliers, groups)
        own = is_adapter(name) if group in adapted else name not in NEVER_TRAINED
        parameter.requires_grad_(group in trained and own)
        if parameter.requires_grad:
            trained[group].append(name)
    empty = [group for group, names in trained.items() if not names]
    if empty:
        raise InputError(
            f"trainable.{empty[0]} trains nothing",
            "this model has no such parameters",
            "leave the group out (the single encoder is semantic_encoder, a tied lm_head is embeddings)",
        )
    if not trained:
        raise InputError("nothing to train", "trainable is empty", f"name groups of: {', '.join(known)}")
    return trained


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute the inside of every block in backward instead of keeping it."""
    for module in model.modules():
        if type(module).__name__ in _CHECKPOINTED:
            recomputed: Any = partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = recomputed
