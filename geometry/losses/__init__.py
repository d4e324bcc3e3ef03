"""Losses as pure functions: of the geometry heads, and of geometric supervision by a teacher."""

from geometry.losses.masked import counted_samples, masked_mean
from geometry.losses.normalization import (
    ALIGNMENT_SAMPLES,
    GeometryTargets,
    NormalizedTargets,
    depth_weights,
    normalize_prediction,
    normalize_targets,
    optimal_scale,
    scale_translations,
)
from geometry.losses.reconstruction import TERM_COUNTS, GeometryLosses, GeometryLossWeights, geometry_losses
from geometry.losses.terms import (
    CONFIDENT_ERROR,
    EDGE_RTOL,
    HUBER_DELTA,
    camera_losses,
    confidence_loss,
    normal_head_loss,
    normal_head_target,
    normal_loss,
    normal_mask,
    weighted_point_error,
)

__all__ = [
    "ALIGNMENT_SAMPLES",
    "CONFIDENT_ERROR",
    "EDGE_RTOL",
    "HUBER_DELTA",
    "TERM_COUNTS",
    "GeometryLossWeights",
    "GeometryLosses",
    "GeometryTargets",
    "NormalizedTargets",
    "camera_losses",
    "confidence_loss",
    "counted_samples",
    "depth_weights",
    "geometry_losses",
    "masked_mean",
    "normal_head_loss",
    "normal_head_target",
    "normal_loss",
    "normal_mask",
    "normalize_prediction",
    "normalize_targets",
    "optimal_scale",
    "scale_translations",
    "weighted_point_error",
]
