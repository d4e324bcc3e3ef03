"""Depth metrics and the alignments that published depth tables use.

Protocol of one image (mono depth) or one stacked sequence (video depth), as the CUT3R line of evaluators runs it:
resize the prediction to the ground truth (`resize_bicubic`), align on valid pixels, clip, score (`evaluate_depth`);
a dataset's value weights each result by its valid pixels (`average_depth`).

Shapes: n valid pixels, H W pixels, `...` any leading sizes. Depth is z in the unit of the ground truth.
"""

# scipy has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize

from geometry.alignment import weighted_l1_scale
from geometry.arrays import ArrayLike, BoolArray, FloatArray, bool_array, check_finite, finite_array, float64_array

LOG_FLOOR = 1e-5  # aligned predictions below it are raised to it before the logarithm and the ratios


@dataclass(frozen=True)
class ScaleShift:
    """An alignment: `aligned = scale * predicted + shift`."""

    scale: float
    shift: float = 0.0


Alignment: TypeAlias = Callable[[FloatArray, FloatArray], ScaleShift]  # (pred (n,), gt (n,)) -> ScaleShift


@dataclass(frozen=True)
class DepthMetrics:
    """Scores over `valid_pixels` pixels with prediction p and ground truth g.

    `abs_rel` = mean |p-g|/g, `sq_rel` = mean (p-g)^2/g, `rmse`, `log_rmse`; `delta_k` = share of pixels with
    max(p/g, g/p) < 1.25^k. `delta_0` is zero by definition; the peers print it, so it is kept.
    """

    abs_rel: float
    sq_rel: float
    rmse: float
    log_rmse: float
    delta_0: float
    delta_1: float
    delta_2: float
    delta_3: float
    valid_pixels: int


@dataclass(frozen=True)
class DepthEvaluation:
    """The scores, and the alignment (before clipping) they were computed with."""

    metrics: DepthMetrics
    alignment: ScaleShift


def evaluate_depth(
    pred: ArrayLike,
    gt: ArrayLike,
    align: Alignment,
    *,
    max_depth: float | None = None,
    mask: ArrayLike | None = None,
    clip_max: float | None = None,
) -> DepthEvaluation:
    """Score depth after ONE alignment over everything passed: an image (H, W) or a whole sequence (S, H, W).

    The alignment sees the pixels with 0 < gt < `max_depth`; the scores see those of them that are also in `mask`.

    Args:
        pred: (...,) predicted depth at the ground truth's resolution.
        gt: (...,) ground truth; values that are not positive and finite are invalid.
        align: one of `ALIGNMENTS`, or a function of the same form.
        max_depth: ground truth at or beyond it is invalid.
        mask: (...,) bool, True = score this pixel.
        clip_max: upper limit put on the aligned prediction.

    Raises:
        ValueError: the shapes differ, no pixel is valid, or the prediction is not finite at a valid pixel.
    """
    target = float64_array(gt, "gt")
    source = float64_array(pred, "pred", target.shape)
    valid = valid_depth(target, max_depth)
    scored = valid if mask is None else valid & bool_array(mask, "mask", target.shape)
    if not scored.any():
        raise ValueError(f"gt: no valid pixel among {target.size} (0 < gt < {max_depth}, and inside the mask)")
    check_finite(source[valid], "pred at valid pixels")

    alignment = align(source[valid], target[valid])
    aligned = alignment.scale * source[scored] + alignment.shift  # (n,)
    if clip_max is not None:
        aligned = np.minimum(aligned, clip_max)
    return DepthEvaluation(depth_metrics(aligned, target[scored]), alignment)


def valid_depth(gt: ArrayLike, max_depth: float | None = None) -> BoolArray:
    """True where ground-truth depth is finite, positive and below `max_depth`."""
    depth = float64_array(gt, "gt")
    return np.isfinite(depth) & (depth > 0) & (depth < (np.inf if max_depth is None else max_depth))


def depth_metrics(pred: ArrayLike, gt: ArrayLike) -> DepthMetrics:
    """Score aligned depth (n,) against positive ground truth (n,).

    The prediction is raised to `LOG_FLOOR` for `log_rmse` and the ratios of `delta_k`, not for the other scores.

    Raises:
        ValueError: a value is not finite, a ground truth is not positive, or there is no pixel.
    """
    g = finite_array(gt, "gt", ("n",))
    p = finite_array(pred, "pred", g.shape)
    if g.size == 0 or g.min() <= 0:
        raise ValueError("gt: needs at least one pixel, and only positive depth")
    error = p - g
    floored = np.maximum(p, LOG_FLOOR)
    ratio = np.maximum(floored / g, g / floored)
    delta = [float(np.mean(ratio < 1.25**k)) for k in range(4)]
    return DepthMetrics(
        abs_rel=float(np.mean(np.abs(error) / g)),
        sq_rel=float(np.mean(error**2 / g)),
        rmse=float(np.sqrt(np.mean(error**2))),
        log_rmse=float(np.sqrt(np.mean((np.log(floored) - np.log(g)) ** 2))),
        delta_0=delta[0],
        delta_1=delta[1],
        delta_2=delta[2],
        delta_3=delta[3],
        valid_pixels=int(g.size),
    )


def average_depth(results: Sequence[DepthMetrics]) -> DepthMetrics:
    """Dataset value: every score averaged with the valid pixels as weights (not a plain mean over images).

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("results: needs at least one image")
    rows = np.array([astuple(result) for result in results], dtype=np.float64)  # (images, 9)
    pixels = rows[:, -1]
    scores = pixels @ rows[:, :-1] / pixels.sum()
    return DepthMetrics(*(float(score) for score in scores), valid_pixels=int(pixels.sum()))


def resize_bicubic(depth: ArrayLike, height: int, width: int) -> FloatArray:
    """Resize depth (H, W) to (height, width) as OpenCV's INTER_CUBIC does.

    Kernel a = -0.75, outer pixel edges aligned, no antialiasing.
    """
    image = torch.from_numpy(float64_array(depth, "depth", ("H", "W")))
    resized = torch.nn.functional.interpolate(image[None, None], (height, width), mode="bicubic", align_corners=False)
    return resized[0, 0].numpy()


# Alignments: predicted (n,), ground truth (n,) -> ScaleShift. Errors are |scale * pred + shift - gt|.


def align_metric(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """No alignment, for models that predict metres."""
    return ScaleShift(1.0)


def align_median(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """Ratio of the lower medians, median(gt) / median(pred); CUT3R's mono depth."""
    return ScaleShift(_divide(lower_median(gt), lower_median(pred), "median of pred"))


def align_scale_irls(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """Scale by ten rounds of reweighted least squares for the L1 error, at least 1e-3; pi3's and G2VLM's default.

    Starts from the ratio of means; weights are 1 / (error + 1e-8). Where an error happens to be almost zero that weight
    depends on rounding, so the rounds run in float32 as the peers' do.
    """
    p, g = _float32(pred), _float32(gt)
    scale = g.mean() / p.mean()
    for _ in range(10):
        weight = 1 / ((scale * p - g).abs() + 1e-8)
        scale = (weight * p * g).sum() / (weight * p * p).sum()
    if not torch.isfinite(scale):
        raise ValueError("pred: depth is zero everywhere or cancels out, no scale exists")
    return ScaleShift(max(float(scale), 1e-3))


def align_lstsq(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """Ordinary least squares for scale and shift (the smallest solution where the prediction is constant)."""
    design = np.stack([pred, np.ones_like(pred)], axis=1)  # (n, 2)
    scale, shift = np.linalg.lstsq(design, gt)[0]
    return ScaleShift(float(scale), float(shift))


def align_lad(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """Scale and shift of the smallest sum of absolute errors, by scipy's BFGS from (median ratio, 0)."""
    start = align_median(pred, gt)

    def loss(parameters: FloatArray) -> float:
        return float(np.abs(parameters[0] * pred + parameters[1] - gt).sum())

    scale, shift = minimize(loss, x0=np.array([start.scale, start.shift])).x
    return ScaleShift(float(scale), float(shift))


def align_lad2_adam_slow(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """The peers' "scale & shift" of video depth: `lad2_adam` with learning rate 1e-4."""
    return lad2_adam(pred, gt, learning_rate=1e-4)


def align_lad2_adam_fast(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """The peers' "scale & shift" for NYU-v2: `lad2_adam` with learning rate 1e-3."""
    return lad2_adam(pred, gt, learning_rate=1e-3)


def lad2_adam(pred: FloatArray, gt: FloatArray, learning_rate: float) -> ScaleShift:
    """Scale and shift by at most 1000 Adam steps on the SUM of absolute errors, from (median ratio, 0), in float32.

    Stops when the loss changes by less than 1e-6. A step moves a parameter by about `learning_rate`, so the result is
    often far from the optimum: published numbers carry that. `align_lad` is the converged answer.
    """
    start = align_median(pred, gt)
    p, g = _float32(pred), _float32(gt)
    scale = torch.tensor(start.scale, dtype=torch.float32, requires_grad=True)
    shift = torch.tensor(start.shift, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([scale, shift], lr=learning_rate)
    previous = float("inf")
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (scale * p + shift - g).abs().sum()
        loss.backward()
        optimizer.step()
        current = float(loss.detach())
        if abs(previous - current) < 1e-6:
            break
        previous = current
    return ScaleShift(float(scale.detach()), float(shift.detach()))


def align_l1_scale(pred: FloatArray, gt: FloatArray) -> ScaleShift:
    """The scale of the smallest AbsRel, exactly.

    mean |s p - g| / g is minimal at the median of the ratios g/p with the weights p/g.
    """
    if not pred.any():
        raise ValueError("pred: zero at every valid pixel, no scale exists")
    p, g = torch.from_numpy(pred), torch.from_numpy(gt)
    return ScaleShift(float(weighted_l1_scale(p, g, 1 / g)))


ALIGNMENTS: dict[str, Alignment] = {
    "metric": align_metric,
    "median": align_median,
    "scale_irls": align_scale_irls,
    "lstsq": align_lstsq,
    "lad": align_lad,
    "lad2_adam_lr1e-4": align_lad2_adam_slow,
    "lad2_adam_lr1e-3": align_lad2_adam_fast,
    "l1_scale": align_l1_scale,
}


def best_constant_depth(gt: ArrayLike, max_depth: float | None = None) -> float:
    """The one depth for a whole scene (...,) with the smallest AbsRel: what a model must beat.

    Raises:
        ValueError: no pixel is valid.
    """
    depth = float64_array(gt, "gt")
    depth = depth[valid_depth(depth, max_depth)]
    if depth.size == 0:
        raise ValueError(f"gt: no valid pixel (0 < gt < {max_depth})")
    return align_l1_scale(np.ones_like(depth), depth).scale


def lower_median(values: FloatArray) -> float:
    """The middle value (n,), the smaller of the two middle ones for even counts (as torch.median)."""
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])


def _float32(values: FloatArray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _divide(numerator: float, denominator: float, name: str) -> float:
    if denominator == 0:
        raise ValueError(f"{name}: is zero, no scale exists")
    return numerator / denominator
