"""Means over valid entries, without a host synchronisation and without indexing by a mask.

Shape legend: ... any batch, S views, H W pixels.
"""

import torch
from torch import Tensor

from geometry.transforms import length

_COUNT_EPS = 1e-8  # the released code's guard of its means


def counted_samples(valid: Tensor) -> Tensor:
    """Which samples count (...): those with a valid pixel in (..., S, H, W)."""
    return valid.flatten(-3).any(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean of the values where the mask is True; 0 when it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def mean_distance(points: Tensor, valid: Tensor) -> Tensor:
    """Mean norm of each sample's valid points: (..., S, H, W, 3) -> (...); 1 where there is none, or all are zero."""
    distance = length(torch.where(valid[..., None], points, 0))
    mean = distance.sum((-3, -2, -1)) / (valid.sum((-3, -2, -1)) + _COUNT_EPS)
    return torch.where(mean > 0, mean, 1)
