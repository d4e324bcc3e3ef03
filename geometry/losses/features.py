"""Alignment of student features with a teacher's: grids brought together, cosine and relational terms.

GeoVR resizes the student to the (optionally pooled) teacher; SpatialSV and 3DRS pool the teacher to the student.

Shape legend: ... any batch, usually T views; h w grid of patches, N tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.losses.masked import masked_mean
from geometry.rotations import at_least_float32


def resize_to_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features (..., h, w, C) on another grid (..., *size, C), bilinear with half-pixel centres."""
    return _channels_last(
        F.interpolate(_channels_first(features), size, mode="bilinear", align_corners=False), features
    )


def pool_patches(features: Tensor, factor: int) -> Tensor:
    """Means over blocks of `factor` x `factor` patches: (..., h, w, C) -> (..., h/factor, w/factor, C).

    Raises:
        ValueError: the grid is not a multiple of the factor.
    """
    height, width = features.shape[-3:-1]
    if height % factor or width % factor:
        raise ValueError(f"features: a grid of {height} x {width} patches cannot be pooled {factor} x {factor}")
    return _channels_last(F.avg_pool2d(_channels_first(features), factor), features)


def pool_to_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Features (..., h, w, C) averaged over the cells of another grid (..., *size, C) (adaptive average pooling)."""
    return _channels_last(F.adaptive_avg_pool2d(_channels_first(features), size), features)


def cosine_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean of 1 - cos over tokens.

    Args:
        student, teacher: (..., C); no gradient flows to the teacher.
        valid: (...) bool, tokens that count.

    Returns:
        A scalar.
    """
    student, teacher = _usable(student, valid), _usable(teacher.detach(), valid)
    return masked_mean(1 - (student * teacher).sum(-1), valid)


def relational_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Mean |S_student - S_teacher| over all pairs of tokens, S being the tokens' cosines with each other (3DRS).

    Args:
        student, teacher: (..., N, C), their channels may differ; no gradient flows to the teacher.
        valid: (..., N) bool; a pair counts when both its tokens do.

    Returns:
        A scalar.
    """
    student, teacher = _usable(student, valid), _usable(teacher.detach(), valid)
    difference = cosines(student, student) - cosines(teacher, teacher)
    return masked_mean(difference.abs(), valid[..., :, None] & valid[..., None, :])


def unit_vectors(features: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in float32 or better; zero vectors stay zero."""
    return F.normalize(at_least_float32(features), dim=-1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All dot products of unit vectors (..., n, C) and (..., m, C): (..., n, m), never in half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _usable(features: Tensor, valid: Tensor) -> Tensor:
    """Unit vectors; zero, without gradient, where invalid."""
    return unit_vectors(torch.where(valid[..., None], features, 0))


def _channels_first(features: Tensor) -> Tensor:
    """(..., h, w, C) -> (n, C, h, w) in float32 or better."""
    return at_least_float32(features).reshape(-1, *features.shape[-3:]).movedim(-1, 1)


def _channels_last(maps: Tensor, like: Tensor) -> Tensor:
    """(n, C, h, w) -> (..., h, w, C) with the batch of `like`."""
    return maps.movedim(1, -1).reshape(*like.shape[:-3], *maps.shape[-2:], maps.shape[1])
