"""Metric scale of a clip: its pseudo-label from a metric depth teacher, and losses between scales.

Shape legend: ... any batch of clips, T views, H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from geometry.losses.masked import masked_mean, masked_quantile
from geometry.rotations import at_least_float32
from geometry.types import TensorFields

CANONICAL_FOCAL = 300.0  # focal length in pixels at which the metric teacher's raw depth is in metres


@dataclass(frozen=True)
class MetricScaleRule:
    """Which pixels the scale is fitted to.

    Attributes:
        max_sky: sky probability from which a pixel is sky.
        min_pixels: pixels that are not sky, below which a clip has no scale.
        min_metric_depth: metres that a pixel's metric depth must exceed.
        min_relative_depth: relative units that a pixel's relative depth must exceed.
    """

    max_sky: float = 0.3
    min_pixels: int = 10
    min_metric_depth: float = 1e-2
    min_relative_depth: float = 1e-3


@dataclass(frozen=True, eq=False)
class MetricScale(TensorFields):
    """Pseudo-label of each clip.

    Attributes:
        scale: (...) metres per relative unit; 1 where invalid.
        valid: (...) bool, whether enough pixels were left.
        pixels: (..., T, H, W) bool, those that it was fitted to.
        least_confidence: (...) the median confidence that they had to reach; infinite where everything is sky.
    """

    scale: Tensor
    valid: Tensor
    pixels: Tensor
    least_confidence: Tensor


def metric_depth(raw_depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth in metres from a canonical metric teacher: raw * f / 300, f = (fx + fy) / 2.

    Args:
        raw_depth: (..., H, W).
        intrinsics: (..., 3, 3) in pixels of the teacher's input.
    """
    focal = (intrinsics[..., 0, 0] + intrinsics[..., 1, 1]) / 2
    return at_least_float32(raw_depth) * focal[..., None, None] / CANONICAL_FOCAL


@torch.no_grad()
def fit_metric_scale(
    relative_depth: Tensor, confidence: Tensor, metric: Tensor, sky: Tensor, rule: MetricScaleRule
) -> MetricScale:
    """One scale per clip by least squares, metric ~ scale * relative, over confident pixels that are not sky.

    A clip with too few pixels is invalid, which is no error. Pixels that are not finite are left out.

    Args:
        relative_depth, confidence: (..., T, H, W) of the teacher whose unit is to be measured.
        metric: depth in metres (..., T, H, W), from `metric_depth`.
        sky: probability (..., T, H, W).
        rule: which pixels count.

    Returns:
        The scale, its validity, and the pixels behind it.
    """
    relative_depth, confidence, metric = (at_least_float32(x) for x in (relative_depth, confidence, metric))
    not_sky = sky < rule.max_sky
    least = masked_quantile(confidence.flatten(-3), not_sky.flatten(-3), 0.5)  # (...)
    confident = not_sky & (confidence >= least[..., None, None, None])
    deep = (metric > rule.min_metric_depth) & (relative_depth > rule.min_relative_depth)
    pixels = confident & deep & metric.isfinite() & relative_depth.isfinite()

    metric, relative_depth = (torch.where(pixels, depth, 0).flatten(-3) for depth in (metric, relative_depth))
    valid = (not_sky.flatten(-3).sum(-1) >= rule.min_pixels) & pixels.flatten(-3).any(-1)
    square = torch.where(valid, relative_depth.square().sum(-1), 1)
    scale = torch.where(valid, (metric * relative_depth).sum(-1) / square, 1)
    return MetricScale(scale, valid, pixels, least)


def log1p_scale_loss(scale: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean |log(1 + s) - log(1 + s*)| over the valid entries of (...) (GeoVR's released code)."""
    scale, target = (torch.where(valid, at_least_float32(s), 1) for s in (scale, target.detach()))
    return masked_mean((scale.log1p() - target.log1p()).abs(), valid)


def log_scale_loss(scale: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean |log s - log s*| over the valid entries of (...) (GeoVR eq. 4)."""
    scale, target = (torch.where(valid, at_least_float32(s), 1) for s in (scale, target.detach()))
    return masked_mean((scale.log() - target.log()).abs(), valid)
