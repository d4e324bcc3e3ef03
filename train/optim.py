"""AdamW over the trained groups, and the learning rate over the run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from train.config import OptimConfig, ScheduleConfig


class HeadGroup(NamedTuple):
    """What trains with a model without being part of it, and the multiplier of its learning rate."""

    name: str
    module: nn.Module
    multiplier: float


def build_optimizer(
    model: nn.Module,
    trained: Mapping[str, Sequence[str]],
    multipliers: Mapping[str, float],
    config: OptimConfig,
    heads: Sequence[HeadGroup] = (),
) -> torch.optim.AdamW:
    """AdamW with one parameter group per trained group; a group's entry `multiplier` scales its learning rate.

    Args:
        model: the model.
        trained: group -> names of its parameters.
        multipliers: of every group.
        config: of the optimizer.
        heads: one more group each.
    """
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "multiplier": multipliers[group], "name": group}
        for group, names in trained.items()
    ]
    groups += [
        {"params": [*own.module.parameters()], "multiplier": own.multiplier, "name": f"heads.{own.name}"}
        for own in heads
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """The rate of a step in [0, steps): linear from peak / warmup to the peak, then as `kind` says to `final_lr`."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.kind == "constant":
        share = min((steps - 1 - step) / config.decay, 1.0) if config.decay else 1.0
    else:
        progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
        share = (1 + math.cos(math.pi * min(progress, 1))) / 2
    return config.final_lr + (peak - config.final_lr) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
