"""The terms of the geometry loss, each a pure function of normalised points and poses (G2VLM eq. 3-7).

Shape legend: ... any batch (usually B samples), S views, H W pixels.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.losses.masked import masked_mean
from geometry.losses.normalization import scale_translations
from geometry.pointmaps import depth_edges, normals_from_points
from geometry.transforms import relative_cam
from geometry.vectors import Vectors, angle_between, coordinates, cross

EDGE_RTOL = 0.03  # depth step that excludes a pixel from normal terms
HUBER_DELTA = 0.1  # of translations, in normalised units
CONFIDENT_ERROR = 0.02  # weighted point error below which a pixel should be confident
_COSINE_MARGIN = 1e-6  # keeps arccos differentiable
_MIN_ANGLE, _MAX_ANGLE, _SMOOTH_ANGLE = math.radians(1), math.radians(90), math.radians(3)


def weighted_point_error(points: Tensor, target: Tensor, weight: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """Per-pixel error of the point terms (G2VLM eq. 3): mean over xyz of w |s x_pred - x|, 0 where invalid.

    Args:
        points, target: (..., S, H, W, 3), local or global points.
        weight, valid: (..., S, H, W).
        scale: (...).

    Returns:
        (..., S, H, W); the term is its `masked_mean` over the valid pixels of the whole batch.
    """
    points = torch.where(valid[..., None], points, 0)
    target = torch.where(valid[..., None], target, 0)
    difference = scale[..., None, None, None, None] * points - target
    return difference.abs().mean(-1) * weight


def normal_mask(target: Tensor, valid: Tensor, normal_enabled: Tensor) -> Tensor:
    """Pixels (..., S, H, W) whose normals can be trusted: valid, off depth edges, in a sample with normals enabled.

    Args:
        target: true local points (..., S, H, W, 3); edges are read from their z, invalid pixels included.
        valid: (..., S, H, W).
        normal_enabled: (...).
    """
    return valid & ~depth_edges(target[..., 2], EDGE_RTOL) & normal_enabled[..., None, None, None]


def normal_loss(points: Tensor, target: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """Angle between the normals of predicted and true point maps (released code; G2VLM eq. 7).

    Each 2x2 block has four normals, one per corner, from the two edges that meet there. An angle counts when its three
    points are in the mask; it is clamped to [1, 90] degrees and smoothed (quadratic below 3 degrees). The sum of a
    block's four angles is averaged over all blocks of the counted samples, and divided by 4 max(H, W).

    Args:
        points, target: local points (..., S, H, W, 3); their scale does not matter.
        mask: (..., S, H, W), from `normal_mask`.
        counted: (...) samples that the mean is taken over.

    Returns:
        A scalar.
    """
    mask = mask & counted[..., None, None, None]
    predicted = _corners(coordinates(torch.where(mask[..., None], points, 0)))
    true = _corners(coordinates(torch.where(mask[..., None], target, 0)))
    usable = _corner_masks(mask)
    angles = [
        torch.where(use, _smooth(angle_between(p, t).clamp(_MIN_ANGLE, _MAX_ANGLE)), 0).sum()
        for p, t, use in zip(predicted, true, usable, strict=True)
    ]
    height, width = mask.shape[-2:]
    return torch.stack(angles).sum() / count_blocks(mask.shape, counted).clamp_min(1) / (4 * max(height, width))


def count_blocks(shape: torch.Size, counted: Tensor) -> Tensor:
    """How many 2x2 blocks the counted samples of a (..., S, H, W) batch have."""
    views, height, width = shape[-3:]
    return counted.sum() * (views * (height - 1) * (width - 1))


def _quads(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The corners of all 2x2 blocks of (..., H, W), walking around: left-up, right-up, right-down, left-down."""
    left, right = values[..., :-1], values[..., 1:]
    return left[..., :-1, :], right[..., :-1, :], right[..., 1:, :], left[..., 1:, :]


def _corners(points: Vectors) -> Iterator[Vectors]:
    """Normals (not unit) at the four corners of all 2x2 blocks; coordinates (..., S, H, W) -> (..., S, H-1, W-1)."""
    quads = [_around(_quads(coordinate)) for coordinate in points]
    for x, y, z in zip(*quads, strict=True):
        to_before, to_after = ([axis[i] - axis[1] for axis in (x, y, z)] for i in (0, 2))
        yield cross(to_before, to_after)


def _corner_masks(mask: Tensor) -> Iterator[Tensor]:
    """Whether the three points of each of the four corners are in the mask, each (..., S, H-1, W-1)."""
    for before, corner, after in _around(_quads(mask)):
        yield before & corner & after


def _around(corners: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every corner between its two neighbours on the block's outline."""
    for i in range(4):
        yield corners[i - 1], corners[i], corners[(i + 1) % 4]


def _smooth(angle: Tensor) -> Tensor:
    """Quadratic below 3 degrees, linear above: e^2 / (2 beta) or e - beta / 2."""
    beta = _SMOOTH_ANGLE
    return torch.where(angle < beta, angle.square() / (2 * beta), angle - beta / 2)


def normal_head_target(target: Tensor, mask: Tensor, normals: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the normal head should predict, and where.

    Args:
        target: true local points (..., S, H, W, 3).
        mask: (..., S, H, W), from `normal_mask`.
        normals: exact normals (..., S, H, W, 3); None derives them from the points of the mask.

    Returns:
        normals (..., S, H, W, 3) and where they are defined (..., S, H, W).
    """
    return normals_from_points(target, mask) if normals is None else (normals, mask)


def normal_head_loss(normals: Tensor, target: Tensor, defined: Tensor) -> Tensor:
    """Mean angle in radians between predicted and true unit normals.

    Args:
        normals, target: (..., S, H, W, 3) in the camera frame.
        defined: (..., S, H, W), pixels to count, from `normal_head_target`.

    Returns:
        A scalar.
    """
    normals, target = (torch.where(defined[..., None], vectors, 0) for vectors in (normals, target))
    return masked_mean(angle_between(coordinates(normals), coordinates(target)), defined)


def camera_losses(cam_to_world: Tensor, target: Tensor, scale: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of the relative poses over all ordered pairs of different views (G2VLM eq. 4-6).

    Translation: Huber (delta 0.1) of s* t_pred - t, averaged over pairs and xyz. Rotation: the mean of
    arccos((tr(R_pred' R) - 1) / 2) in radians, the cosine kept 1e-6 inside [-1, 1].

    Args:
        cam_to_world, target: (..., S, 4, 4).
        scale: (...), multiplies the predicted translations.
        counted: (...) samples that the means are taken over.

    Returns:
        The two scalars; zero when there is no pair.
    """
    identity = torch.eye(4, dtype=target.dtype, device=target.device)
    true = relative_cam(torch.where(counted[..., None, None, None], target, identity))  # (..., S, S, 4, 4)
    predicted = relative_cam(scale_translations(cam_to_world, scale))
    different = ~torch.eye(target.shape[-3], dtype=torch.bool, device=target.device)
    pairs = different & counted[..., None, None]  # (..., S, S)

    translation = F.huber_loss(predicted[..., :3, 3], true[..., :3, 3], reduction="none", delta=HUBER_DELTA).mean(-1)
    trace = (predicted[..., :3, :3] * true[..., :3, :3]).sum(-2).sum(-1)  # of R_pred' R
    cosine = (trace - 1) / 2
    rotation = torch.arccos(cosine.clamp(-1 + _COSINE_MARGIN, 1 - _COSINE_MARGIN))
    return masked_mean(translation, pairs), masked_mean(rotation, pairs)


def confidence_loss(logits: Tensor, error: Tensor, valid: Tensor, sky: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the confidence against "the point is right", and against 0 in the sky.

    Args:
        logits: (..., S, H, W).
        error: (..., S, H, W) from `weighted_point_error`; a pixel is right below 0.02. No gradient flows to it.
        valid: (..., S, H, W), the pixels of the first mean.
        sky: (..., S, H, W), those of the second, valid ones excluded; default none.

    Returns:
        The sum of the two means.
    """
    right = (error < CONFIDENT_ERROR).to(logits.dtype)
    loss = masked_mean(F.binary_cross_entropy_with_logits(logits, right, reduction="none"), valid)
    if sky is None:
        return loss
    return loss + masked_mean(F.softplus(logits), sky & ~valid)
