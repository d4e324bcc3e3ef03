"""The geometry loss of G2VLM: points, normals, global points, cameras, confidence (released code; paper eq. 2-7).

`geometry_losses` is the whole; every step of it is a public pure function. Nothing here has parameters, synchronises
with the host, or indexes by a mask: excluded entries are replaced before any arithmetic touches them, so that whatever
the ground truth holds at invalid pixels reaches neither values nor gradients.

A sample without a valid pixel has weight zero in every term: point terms average over valid pixels, and the normal and
camera terms over the blocks and pairs of the samples that count (its sky still teaches the confidence). With a valid
pixel in every sample these are the released means.

Shape legend: ... any batch (usually B samples), S views, H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from geometry.losses.masked import counted_samples, masked_mean
from geometry.losses.normalization import (
    GeometryTargets,
    depth_weights,
    normalize_prediction,
    normalize_targets,
    optimal_scale,
)
from geometry.losses.terms import (
    camera_losses,
    confidence_loss,
    count_blocks,
    normal_head_loss,
    normal_head_target,
    normal_loss,
    normal_mask,
    weighted_point_error,
)
from geometry.types import GeometryPrediction, expect_shape

TERM_COUNTS = {
    "points": "pixels",
    "global_points": "pixels",
    "confidence": "pixels",
    "normal": "normal_blocks",
    "normal_head": "normal_pixels",
    "translation": "camera_pairs",
    "rotation": "camera_pairs",
}  # term -> the entry of `GeometryLosses.counts` that it is a mean over (confidence: its first part)


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
        "normal_blocks": count_blocks(valid.shape, with_normals),
        "camera_pairs": counted.sum() * (views * (views - 1)),
    }
