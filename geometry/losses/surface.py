"""Normal loss over point maps with the four corner normals of every pixel (VGGT's trainer, SpatialSV).

Shape legend: ... any batch, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from geometry.losses.dense import ConfidenceWeights
from geometry.losses.masked import masked_mean
from geometry.pointmaps import neighbour_normals
from geometry.rotations import at_least_float32

NORMAL_STRIDES = (1, 2, 4)


def corner_normal_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, strides: Sequence[int] = NORMAL_STRIDES
) -> Tensor:
    """Mean of 1 - cos between the corner normals of two point maps, averaged over strides.

    Args:
        prediction, target: points (..., H, W, 3) in any one frame.
        mask: (..., H, W); a corner counts when its pixel and both neighbours are in it.
        strides: the maps are subsampled by slicing, starting at the first pixel.

    Returns:
        A scalar.
    """
    strided = [(prediction[..., ::s, ::s, :], target[..., ::s, ::s, :], mask[..., ::s, ::s]) for s in strides]
    means = [masked_mean(*_dissimilarity(*maps)) for maps in strided]
    return torch.stack(means).mean()


def confidence_corner_normal_loss(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    mask: Tensor,
    weights: ConfidenceWeights,
    strides: Sequence[int] = NORMAL_STRIDES,
) -> Tensor:
    """`corner_normal_loss` with gamma (1 - cos) c - alpha log c for each corner, c being that of its pixel.

    Args:
        prediction, target: points (..., H, W, 3) in any one frame.
        confidence: (..., H, W), the prediction's, positive inside the mask.
        mask: (..., H, W).
        weights: gamma and alpha.
        strides: as in `corner_normal_loss`.

    Returns:
        A scalar.
    """
    confidence = torch.where(mask, at_least_float32(confidence), 1)
    means: list[Tensor] = []
    for s in strides:
        points = prediction[..., ::s, ::s, :], target[..., ::s, ::s, :]
        values, valid = _dissimilarity(*points, mask[..., ::s, ::s])
        means.append(masked_mean(weights.weigh(values, confidence[..., ::s, ::s]), valid))
    return torch.stack(means).mean()


def _dissimilarity(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos of the corner normals and the corners' validity, both (4, ..., h, w)."""
    normals, valid = neighbour_normals(at_least_float32(prediction), mask)
    true_normals, _ = neighbour_normals(at_least_float32(target.detach()), mask)
    return 1 - (normals * true_normals).sum(-1).clamp(-1, 1), valid
