"""Activations of supervision heads, all on float32 values."""

from collections.abc import Callable

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """x."""
    return x


def inverse_log(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1): linear near zero, exponential far from it; for coordinates of any range."""
    return torch.where(x < 0, -torch.expm1(-x), torch.expm1(x))  # unlike with sign(x), the gradient at zero is 1


def one_plus_exp(x: Tensor) -> Tensor:
    """1 + exp(x): a confidence."""
    return 1 + x.exp()
