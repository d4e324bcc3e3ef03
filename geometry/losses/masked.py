"""Statistics of valid entries, without a host synchronisation and without indexing by a mask.

Shape legend: ... any batch, S views, H W pixels, n entries of a list.
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


def order_statistic(values: Tensor, mask: Tensor, rank: Tensor) -> Tensor:
    """The value at a rank (0 = smallest) among the masked entries of each list, without gradient.

    Args:
        values, mask: (..., n).
        rank: (...) int; ranks outside the list take its nearest end.

    Returns:
        (...); infinite where nothing is in the mask.
    """
    ordered = torch.where(mask, values.detach(), torch.inf).sort(dim=-1).values
    last = (mask.sum(-1) - 1).clamp_min(0)
    return ordered.gather(-1, torch.minimum(rank.clamp_min(0), last)[..., None])[..., 0]


def masked_quantile(values: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The linearly interpolated quantile of the masked entries of each list, without gradient.

    Args:
        values, mask: (..., n).
        quantile: in [0, 1].

    Returns:
        (...); infinite where nothing is in the mask.
    """
    position = quantile * (mask.sum(-1) - 1).clamp_min(0).double()
    below, above = (order_statistic(values, mask, rank.long()) for rank in (position.floor(), position.ceil()))
    return torch.where(below == above, below, torch.lerp(below, above, position.frac().to(values.dtype)))
