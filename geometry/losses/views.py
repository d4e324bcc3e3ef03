"""Point maps of several views in the first camera's frame, with confidence (DUSt3R).

Shape legend: ... any batch, S views (DUSt3R: 2), H W pixels.
"""

import torch
from torch import Tensor

from geometry.losses.dense import ConfidenceWeights, residual_norm
from geometry.losses.masked import mean_distance
from geometry.rotations import at_least_float32


def unit_mean_distance(points: Tensor, valid: Tensor) -> Tensor:
    """Points (..., S, H, W, 3) divided by the mean norm of the valid ones of all views together, with gradient."""
    points = torch.where(valid[..., None], at_least_float32(points), 0)
    return points / mean_distance(points, valid)[..., None, None, None, None]


def views_regression_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean Euclidean distance over each view's valid pixels, summed over the views.

    Args:
        prediction, target: points (..., S, H, W, 3) in the first camera's frame. DUSt3R passes both through
            `unit_mean_distance`, or the prediction alone where the target's scale is to be learned.
        valid: (..., S, H, W).

    Returns:
        A scalar.
    """
    return _sum_of_views(residual_norm(prediction, target, valid), valid)


def views_confidence_loss(
    prediction: Tensor, target: Tensor, confidence: Tensor, valid: Tensor, weights: ConfidenceWeights
) -> Tensor:
    """`views_regression_loss` with gamma r c - alpha log c for each pixel.

    Args:
        prediction, target: as in `views_regression_loss`.
        confidence, valid: (..., S, H, W); the confidence is positive where valid.
        weights: gamma and alpha.

    Returns:
        A scalar.
    """
    residual = residual_norm(prediction, target, valid)
    confidence = torch.where(valid, at_least_float32(confidence), 1)
    return _sum_of_views(weights.weigh(residual, confidence), valid)


def _sum_of_views(values: Tensor, valid: Tensor) -> Tensor:
    """Means over everything but the views, summed: (..., S, H, W) -> scalar."""
    views = values.movedim(-3, 0).flatten(1), valid.movedim(-3, 0).flatten(1)
    total, count = torch.where(views[1], views[0], 0).sum(-1), views[1].sum(-1)
    return (total / count.clamp_min(1)).sum()
