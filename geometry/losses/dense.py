"""Losses of maps against a teacher's: plain and confidence-weighted regression, gradients, scale-invariant depth.

A published form is data: how outliers are left out (`Trim`), and how the gradients of one stride are averaged
(`Average`). VGGT's trainer and GeoVR differ in both; `VGGT` and `GEOVR` name the pairs.

Excluded entries are replaced before any arithmetic touches them, so whatever stands there, NaN included, reaches
neither values nor gradients. Where nothing is valid a loss is zero and keeps its graph. Everything is computed in
float32 or better; targets, and statistics that choose entries, carry no gradient.

Shape legend: ... any batch, H W pixels, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from geometry.losses.masked import masked_mean, masked_quantile, order_statistic
from geometry.rotations import at_least_float32
from geometry.transforms import length

STRIDES = (1, 2, 4, 8)  # of the gradient terms
LIMIT = 100.0  # largest cost of one entry
MIN_TRIMMED = 1000  # entries without which no outliers are sought
MIN_STRIDE_PIXELS = 10  # valid pixels below which GeoVR leaves a stride out


@dataclass(frozen=True)
class ConfidenceWeights:
    """Weights of a confidence-weighted term, `gamma * loss * confidence - alpha * log(confidence)`."""

    gamma: float = 1.0
    alpha: float = 0.2

    def weigh(self, values: Tensor, confidence: Tensor) -> Tensor:
        """The term of each entry; values and confidence (positive) have one shape."""
        return self.gamma * values * confidence - self.alpha * confidence.log()


# ---- which pixels count ---------------------------------------------------------------------------------------------


def drop_least_confident(mask: Tensor, confidence: Tensor, fraction: float) -> Tensor:
    """The mask without the pixels whose teacher confidence is below its quantile `fraction` over the mask.

    Args:
        mask, confidence: (..., H, W); one quantile for all of them.
        fraction: in [0, 1]; 0 keeps everything.
    """
    return mask & (confidence >= masked_quantile(confidence.flatten(), mask.flatten(), fraction))


def require_pixels(mask: Tensor, minimum: int) -> Tensor:
    """The mask if it has at least `minimum` pixels, else an empty one (GeoVR's depth loss: 100)."""
    return mask & (mask.sum() >= minimum)


# ---- trimming -------------------------------------------------------------------------------------------------------

Trim: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Values and mask of any one shape -> values and mask to average."""


def keep_all(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """No trimming."""
    return values, mask


def trim_vggt(
    values: Tensor, mask: Tensor, quantile: float = 0.98, limit: float = LIMIT, minimum: int = MIN_TRIMMED
) -> tuple[Tensor, Tensor]:
    """VGGT's trainer: clamp at the limit, then keep what is strictly below the nearest-rank quantile.

    With at most `minimum` masked entries nothing is done; when at most as many would be kept, the clamped values stay.

    Args:
        values, mask: of one shape; one quantile for all of them.
        quantile: in [0, 1].
        limit: largest value.
        minimum: number of entries.
    """
    count = mask.sum()
    clamped = values.clamp_max(limit)
    rank = (quantile * (count - 1).double()).round().long()
    kept = mask & (clamped < order_statistic(clamped.flatten(), mask.flatten(), rank))
    kept = torch.where(kept.sum() > minimum, kept, mask)
    many = count > minimum
    return torch.where(many, clamped, values), torch.where(many, kept, mask)


def trim_geovr(
    values: Tensor, mask: Tensor, quantile: float = 0.98, limit: float = LIMIT, minimum: int = MIN_TRIMMED
) -> tuple[Tensor, Tensor]:
    """GeoVR's released code: keep what is at most the quantile (next rank above) of the values clamped at the limit.

    With at most `minimum` masked entries nothing is done; when fewer would be kept, all values are clamped instead.

    Args:
        values, mask: of one shape; one quantile for all of them.
        quantile: in [0, 1].
        limit: largest value.
        minimum: number of entries.
    """
    count = mask.sum()
    clamped = values.clamp_max(limit)
    rank = (quantile * (count - 1).double()).ceil().long()
    kept = mask & (values <= order_statistic(clamped.flatten(), mask.flatten(), rank))
    many, enough = count > minimum, kept.sum() >= minimum
    return torch.where(many & ~enough, clamped, values), torch.where(many & enough, kept, mask)


# ---- regression -----------------------------------------------------------------------------------------------------


def residual_norm(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Euclidean distance over the channels: (..., H, W, C) -> (..., H, W), 0 outside the mask (..., H, W)."""
    return length(_difference(prediction, target, mask[..., None]))


def regression_loss(residual: Tensor, mask: Tensor, trim: Trim = keep_all) -> Tensor:
    """Mean residual (..., H, W) over the mask, after trimming."""
    return masked_mean(*trim(residual, mask))


def confidence_regression_loss(
    residual: Tensor, confidence: Tensor, mask: Tensor, weights: ConfidenceWeights, trim: Trim = keep_all
) -> Tensor:
    """Mean of gamma r c - alpha log c over the mask, after trimming (aleatoric uncertainty; VGGT, DUSt3R, GeoVR eq. 3).

    Args:
        residual: (..., H, W), from `residual_norm`.
        confidence: (..., H, W), the prediction's, positive inside the mask.
        mask: (..., H, W).
        weights: gamma and alpha.
        trim: which entries of the weighted term to leave out.

    Returns:
        A scalar.
    """
    confidence = torch.where(mask, at_least_float32(confidence), 1)
    return masked_mean(*trim(weights.weigh(residual, confidence), mask))


def silog_loss(prediction: Tensor, target: Tensor, mask: Tensor, focus: float = 0.5, epsilon: float = 1e-6) -> Tensor:
    """Scale-invariant depth error sqrt(mean d^2 - focus (mean d)^2 + epsilon), d = log p - log g; 0 without pixels.

    Args:
        prediction, target: depth (..., H, W), positive inside the mask.
        mask: (..., H, W).
        focus: 1 forgives any scale, 0 none.
        epsilon: keeps the root differentiable.

    Returns:
        A scalar.
    """
    prediction, target = (torch.where(mask, at_least_float32(depth), 1) for depth in (prediction, target.detach()))
    error = prediction.log() - target.log()
    spread = masked_mean(error.square(), mask) - focus * masked_mean(error, mask).square()
    return torch.where(mask.any(), (spread + epsilon).sqrt(), 0 * spread)


def _difference(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Prediction minus target, 0 outside a mask that broadcasts."""
    prediction, target = (torch.where(mask, at_least_float32(values), 0) for values in (prediction, target.detach()))
    return prediction - target


# ---- gradients ------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """Cost of the residual's steps between neighbours of a map (..., h, w) at one stride; 0 where it does not count."""

    x: Tensor  # (..., h, w-1), from each pixel to its right neighbour
    y: Tensor  # (..., h-1, w), to its lower neighbour
    x_valid: Tensor  # both pixels are valid
    y_valid: Tensor
    valid: Tensor  # (..., h, w)


Average: TypeAlias = Callable[[Steps], tuple[Tensor, Tensor]]
"""Steps of one stride -> their scalar value, and whether the stride counts (0 or 1)."""


def per_pixel(steps: Steps) -> tuple[Tensor, Tensor]:
    """VGGT's trainer: the sum over both directions, divided by the number of valid pixels; every stride counts."""
    count = steps.valid.sum()
    total = (steps.x.sum() + steps.y.sum()) * (count > 0)
    return total / count.clamp_min(1), torch.ones_like(total)


def per_direction(steps: Steps) -> tuple[Tensor, Tensor]:
    """GeoVR's released code: mean over x plus mean over y; a stride with fewer than 10 valid pixels does not count."""
    value = masked_mean(steps.x, steps.x_valid) + masked_mean(steps.y, steps.y_valid)
    return value, (steps.valid.sum() >= MIN_STRIDE_PIXELS).to(value.dtype)


@dataclass(frozen=True)
class DenseForm:
    """One published way to write the dense losses.

    Attributes:
        trim: which outliers of the regression terms to leave out.
        average: how the gradient terms average one stride.
    """

    trim: Trim = keep_all
    average: Average = per_pixel


VGGT = DenseForm(trim_vggt, per_pixel)
GEOVR = DenseForm(trim_geovr, per_direction)


def gradient_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, strides: Sequence[int] = STRIDES, average: Average = per_pixel
) -> Tensor:
    """Gradient matching at several strides: |dx e| and |dy e|, e = prediction - target, each clamped at 100.

    Args:
        prediction, target: (..., H, W).
        mask: (..., H, W); a step counts when both its pixels are in it.
        strides: the maps are subsampled by slicing, starting at the first pixel.
        average: of one stride; the result is the mean over the strides that count.

    Returns:
        A scalar.
    """
    error = _difference(prediction, target, mask)
    return _mean_of_strides([_steps(error[..., ::s, ::s], mask[..., ::s, ::s]) for s in strides], average)


def confidence_gradient_loss(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    mask: Tensor,
    weights: ConfidenceWeights,
    strides: Sequence[int] = STRIDES,
    average: Average = per_pixel,
    legacy_unmasked_log: bool = False,
) -> Tensor:
    """`gradient_loss` with gamma |d e| c - alpha log c for each step, c being that of the right or lower pixel.

    Args:
        prediction, target, mask: (..., H, W).
        confidence: (..., H, W), the prediction's, positive (with `legacy_unmasked_log` outside the mask too).
        weights: gamma and alpha.
        strides: as in `gradient_loss`.
        average: as in `gradient_loss`.
        legacy_unmasked_log: VGGT's trainer adds the -alpha log c of steps that do not count, too.

    Returns:
        A scalar.
    """
    error, confidence = _difference(prediction, target, mask), at_least_float32(confidence)

    def weigh(step: Tensor, step_valid: Tensor, step_confidence: Tensor) -> Tensor:
        counted = step_valid | legacy_unmasked_log
        return weights.weigh(step, torch.where(counted, step_confidence, 1))

    strided: list[Steps] = []
    for s in strides:
        steps, c = _steps(error[..., ::s, ::s], mask[..., ::s, ::s]), confidence[..., ::s, ::s]
        x, y = weigh(steps.x, steps.x_valid, c[..., :, 1:]), weigh(steps.y, steps.y_valid, c[..., 1:, :])
        strided.append(steps._replace(x=x, y=y))
    return _mean_of_strides(strided, average)


def _steps(error: Tensor, mask: Tensor) -> Steps:
    """Absolute steps of one map (..., h, w), clamped at the limit."""
    x_valid, y_valid = mask[..., :, 1:] & mask[..., :, :-1], mask[..., 1:, :] & mask[..., :-1, :]
    x, y = (error.diff(dim=dim).abs().clamp_max(LIMIT) for dim in (-1, -2))
    return Steps(torch.where(x_valid, x, 0), torch.where(y_valid, y, 0), x_valid, y_valid, mask)


def _mean_of_strides(strided: Sequence[Steps], average: Average) -> Tensor:
    values, counted = zip(*(average(steps) for steps in strided), strict=True)
    return (torch.stack(values) * torch.stack(counted)).sum() / torch.stack(counted).sum().clamp_min(1)
