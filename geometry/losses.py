"""The geometry loss of G2VLM: points, normals, global points, cameras, confidence (released code; paper eq. 2-7).

`geometry_losses` is the whole; every step of it is a public pure function. Nothing here has parameters, synchronises
with the host, or indexes by a mask: excluded entries are replaced before any arithmetic touches them, so that whatever
the ground truth holds at invalid pixels reaches neither values nor gradients.

A sample without a valid pixel has weight zero in every term: point terms average over valid pixels, and the normal and
camera terms over the blocks and pairs of the samples that count (its sky still teaches the confidence). With a valid
pixel in every sample these are the released means.

Shape legend: ... any batch (usually B samples), S views, H W pixels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.alignment import align_points_scale, sample_valid
from geometry.pointmaps import depth_edges, normals_from_points
from geometry.transforms import apply_rigid, invert_rigid, length, relative_cam, small_matmul
from geometry.types import GeometryPrediction, TensorFields, expect_bool, expect_shape, expect_trailing
from geometry.vectors import Vectors, angle_between, coordinates, cross

ALIGNMENT_SAMPLES = 4096  # valid pixels per sample that the scale is fitted to
EDGE_RTOL = 0.03  # depth step that excludes a pixel from normal terms
HUBER_DELTA = 0.1  # of translations, in normalised units
CONFIDENT_ERROR = 0.02  # weighted point error below which a pixel should be confident
TERM_COUNTS = {
    "points": "pixels",
    "global_points": "pixels",
    "confidence": "pixels",
    "normal": "normal_blocks",
    "normal_head": "normal_pixels",
    "translation": "camera_pairs",
    "rotation": "camera_pairs",
}  # term -> the entry of `GeometryLosses.counts` that it is a mean over (confidence: its first part)
_COUNT_EPS = 1e-8  # the released code's guard of its means
_COSINE_MARGIN = 1e-6  # keeps arccos differentiable
_MIN_ANGLE, _MAX_ANGLE, _SMOOTH_ANGLE = math.radians(1), math.radians(90), math.radians(3)


@dataclass(frozen=True, eq=False)
class GeometryTargets(TensorFields):
    """Ground truth of one batch of scenes, in any world frame and at any scale.

    Attributes:
        world_points: (..., S, H, W, 3); anything, NaN included, at invalid pixels.
        cam_to_world: (..., S, 4, 4), OpenCV axes.
        valid: (..., S, H, W) bool, True = use.
        normal_enabled: (...) bool, whether the sample's depth is good enough for normal terms.
        sky: (..., S, H, W) bool, pixels that should have no confidence.
        normals: (..., S, H, W, 3) exact unit normals in the camera frame, for the normal head; without them the
            normals of the true points are used.
    """

    world_points: Tensor
    cam_to_world: Tensor
    valid: Tensor
    normal_enabled: Tensor
    sky: Tensor | None = None
    normals: Tensor | None = None

    def __post_init__(self) -> None:
        expect_trailing("world_points", self.world_points, (None, None, None, 3))
        *batch, views, height, width, _ = self.world_points.shape
        expect_shape("cam_to_world", self.cam_to_world, *batch, views, 4, 4)
        expect_shape("valid", self.valid, *batch, views, height, width)
        expect_shape("normal_enabled", self.normal_enabled, *batch)
        expect_shape("sky", self.sky, *batch, views, height, width)
        expect_shape("normals", self.normals, *batch, views, height, width, 3)
        for field in ("valid", "normal_enabled", "sky"):
            expect_bool(field, getattr(self, field))


@dataclass(frozen=True)
class GeometryLossWeights:
    """Weights of the terms. The defaults are the paper's; the released code uses `translation=100`.

    Attributes:
        points: local point term.
        normal: point-map normal term.
        global_points: global point term; it counts only when the prediction has global points.
        camera: lambda_cam, of translation * translation loss + rotation loss.
        translation: lambda_trans.
        normal_head: angular error of `prediction.normals`; 0 leaves the term out (set it when the normals are learned).
        confidence: confidence terms; they count only when the prediction has a confidence.
        depth_floor: the per-pixel weight is 1 / max(z, depth_floor * mean z of the view).
    """

    points: float = 1.0
    normal: float = 1.0
    global_points: float = 1.0
    camera: float = 0.2
    translation: float = 200.0
    normal_head: float = 0.0
    confidence: float = 0.05
    depth_floor: float = 0.1

    def factors(self) -> dict[str, float]:
        """What each term of `GeometryLosses.terms` is multiplied by in the total."""
        return {
            "points": self.points,
            "normal": self.normal,
            "global_points": self.global_points,
            "translation": self.camera * self.translation,
            "rotation": self.camera,
            "normal_head": self.normal_head,
            "confidence": self.confidence,
        }


@dataclass(frozen=True, eq=False)
class GeometryLosses:
    """Result of `geometry_losses`.

    Attributes:
        total: weighted sum, a scalar with gradient.
        terms: unweighted scalars: points, normal, translation, rotation, and when present global_points, normal_head,
            confidence.
        scale: optimal scale of each sample (...), without gradient; 1 for a sample without valid pixels.
        counts: how many samples, pixels, normal_blocks, camera_pairs and normal_pixels the means were taken over;
            `TERM_COUNTS` says which is whose, so that terms of several batches can be joined exactly.
    """

    total: Tensor
    terms: dict[str, Tensor]
    scale: Tensor
    counts: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class NormalizedTargets(TensorFields):
    """Targets in the first view's camera frame, with mean point distance one.

    Attributes:
        local_points: (..., S, H, W, 3).
        global_points: (..., S, H, W, 3), the world points in the first view's frame.
        cam_to_world: (..., S, 4, 4), "world" being the first view's frame.
        divisor: (...) the mean distance that was divided out.
    """

    local_points: Tensor
    global_points: Tensor
    cam_to_world: Tensor
    divisor: Tensor


def geometry_losses(
    prediction: GeometryPrediction, targets: GeometryTargets, weights: GeometryLossWeights
) -> GeometryLosses:
    """The whole geometry loss (G2VLM eq. 2), in float32 or better.

    Args:
        prediction: of any scale; gradients flow to every field that a term reads.
        targets: of the same batch and image size.
        weights: of the terms.

    Returns:
        The weighted total, the terms, the optimal scales and the counts behind the means.
    """
    expect_shape("targets.world_points", targets.world_points, *prediction.local_points.shape)
    dtype = torch.promote_types(prediction.local_points.dtype, targets.world_points.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    prediction, targets = prediction.to(dtype), targets.to(dtype)

    valid, counted = targets.valid, counted_samples(targets.valid)
    with_normals = counted & targets.normal_enabled
    target = normalize_targets(targets)
    prediction = normalize_prediction(prediction, valid)
    weight = depth_weights(target.local_points[..., 2], valid, weights.depth_floor)
    scale = optimal_scale(prediction.local_points, target.local_points, weight, valid)
    error = weighted_point_error(prediction.local_points, target.local_points, weight, valid, scale)
    smooth = normal_mask(target.local_points, valid, targets.normal_enabled)

    terms = {
        "points": masked_mean(error, valid),
        "normal": normal_loss(prediction.local_points, target.local_points, smooth, with_normals),
    }
    terms["translation"], terms["rotation"] = camera_losses(
        prediction.cam_to_world, target.cam_to_world, scale, counted
    )
    if prediction.global_points is not None:
        global_error = weighted_point_error(prediction.global_points, target.global_points, weight, valid, scale)
        terms["global_points"] = masked_mean(global_error, valid)
    counts = _counts(valid, with_normals, counted)
    if weights.normal_head:
        true_normals, defined = normal_head_target(target.local_points, smooth, targets.normals)
        terms["normal_head"] = normal_head_loss(prediction.normals, true_normals, defined)
        counts["normal_pixels"] = defined.sum()
    if prediction.confidence is not None:
        terms["confidence"] = confidence_loss(prediction.confidence, error, valid, targets.sky)

    factors = weights.factors()
    total = torch.stack([factors[name] * term for name, term in terms.items()]).sum()
    return GeometryLosses(total, terms, scale, counts)


def _counts(valid: Tensor, with_normals: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """How many entries each kind of mean was taken over."""
    views = valid.shape[-3]
    return {
        "samples": counted.sum(),
        "pixels": valid.sum(),
        "normal_blocks": _blocks(valid.shape, with_normals),
        "camera_pairs": counted.sum() * (views * (views - 1)),
    }


# ---- means ----------------------------------------------------------------------------------------------------------


def counted_samples(valid: Tensor) -> Tensor:
    """Which samples count (...): those with a valid pixel in (..., S, H, W)."""
    return valid.flatten(-3).any(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean of the values where the mask is True; 0 when it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def _mean_distance(points: Tensor, valid: Tensor) -> Tensor:
    """Mean norm of each sample's valid points: (..., S, H, W, 3) -> (...); 1 where there is none, or all are zero."""
    distance = length(torch.where(valid[..., None], points, 0))
    mean = distance.sum((-3, -2, -1)) / (valid.sum((-3, -2, -1)) + _COUNT_EPS)
    return torch.where(mean > 0, mean, 1)


# ---- normalisation and scale ----------------------------------------------------------------------------------------


def normalize_targets(targets: GeometryTargets) -> NormalizedTargets:
    """Ground truth in the first view's camera frame, divided by the mean distance of the valid points to its origin.

    Non-finite points at invalid pixels become zero first; a non-finite valid point stays, so that the loss shows it.
    A sample without valid pixels has divisor 1.
    """
    usable = targets.valid[..., None] | targets.world_points.isfinite()
    world_to_first = invert_rigid(targets.cam_to_world[..., 0, :, :])  # (..., 4, 4)
    points = apply_rigid(world_to_first, torch.where(usable, targets.world_points, 0))
    cam_to_first = small_matmul(world_to_first[..., None, :, :], targets.cam_to_world)
    divisor = _mean_distance(points, targets.valid)
    points = points / divisor[..., None, None, None, None]
    cam_to_first = scale_translations(cam_to_first, 1 / divisor)
    local_points = apply_rigid(invert_rigid(cam_to_first), points)
    return NormalizedTargets(local_points, points, cam_to_first, divisor)


def normalize_prediction(prediction: GeometryPrediction, valid: Tensor) -> GeometryPrediction:
    """Points and translations divided by the mean norm of the local points at valid pixels (..., S, H, W).

    Gradient flows through the divisor, so the result does not depend on the prediction's scale.
    """
    divisor = _mean_distance(prediction.local_points, valid)
    per_point = divisor[..., None, None, None, None]
    global_points = prediction.global_points
    return replace(
        prediction,
        local_points=prediction.local_points / per_point,
        cam_to_world=scale_translations(prediction.cam_to_world, 1 / divisor),
        global_points=None if global_points is None else global_points / per_point,
    )


def scale_translations(poses: Tensor, scale: Tensor) -> Tensor:
    """Poses (..., S, 4, 4) with each sample's translations multiplied by its scale (...)."""
    moved = poses[..., :3, 3:] * scale[..., None, None, None]
    return torch.cat([torch.cat([poses[..., :3, :3], moved], dim=-1), poses[..., 3:, :]], dim=-2)


def depth_weights(depth: Tensor, valid: Tensor, floor: float) -> Tensor:
    """Weight of each pixel: 1 / (max(z, floor * mean valid z of its view) + 1e-6), and 0 where invalid.

    Args:
        depth, valid: (..., S, H, W).
        floor: fraction of the view's mean depth below which weights stop growing.

    Returns:
        (..., S, H, W).
    """
    depth = torch.where(valid, depth, 0)
    mean = depth.sum((-2, -1)) / valid.sum((-2, -1)).clamp_min(1)  # (..., S)
    weight = 1 / (torch.maximum(depth, floor * mean[..., None, None]) + 1e-6)
    return torch.where(valid, weight, 0)


@torch.no_grad()
def optimal_scale(
    points: Tensor, target: Tensor, weight: Tensor, valid: Tensor, samples: int = ALIGNMENT_SAMPLES
) -> Tensor:
    """One scale per sample that takes predicted to true local points: argmin_s sum w |s x_pred - x| (G2VLM s*).

    It is fitted to evenly spread valid pixels of all views together (`alignment.sample_valid`); a negative scale loses
    its sign. No gradient flows through it.

    Args:
        points, target: (..., S, H, W, 3).
        weight, valid: (..., S, H, W).
        samples: how many pixels to fit to.

    Returns:
        (...); 1 for a sample without valid pixels.
    """
    index, any_valid = sample_valid(valid.flatten(-3), samples)  # (..., n)

    def pick(points: Tensor) -> Tensor:
        return points.flatten(-4, -2).gather(-2, index[..., None].expand(*index.shape, 3))

    picked_weight = weight.flatten(-3).gather(-1, index)
    scale = align_points_scale(pick(points), pick(target), torch.where(any_valid[..., None], picked_weight, 0))
    return scale.abs()


# ---- terms ----------------------------------------------------------------------------------------------------------


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
    return torch.stack(angles).sum() / _blocks(mask.shape, counted).clamp_min(1) / (4 * max(height, width))


def _blocks(shape: torch.Size, counted: Tensor) -> Tensor:
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
