"""Gradients of steps that change nothing: what tests of several processes and objectives compare."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train.step import Trainer


@contextmanager
def kept_gradients(trainer: Trainer, model: nn.Module, heads: nn.Module | None = None) -> Iterator[dict[str, Tensor]]:
    """Inside, a step fills the dict with whole gradients by name, before clipping, and leaves the weights as they are.

    Those of the heads have `heads.` before their names.
    """
    kept: dict[str, Tensor] = {}
    engine = trainer.engine

    def keep(parameters: Any, max_norm: float) -> Tensor:
        for prefix, module in (("", model), ("heads.", heads or nn.Module())):
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    kept[prefix + name] = engine.whole(parameter.grad)
        return torch.tensor(torch.nan)  # a norm that is no number: the optimizer is passed over

    clip, engine.clip = engine.clip, keep
    try:
        yield kept
    finally:
        engine.clip = clip
