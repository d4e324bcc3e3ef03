"""Correspondence between views: correct keypoints, calibration, and how long a match survives (GASP's diagnostics).

Shapes: T views in order of their distance from the first one's view, P points.
"""

from dataclasses import dataclass

import numpy as np

from geometry.arrays import ArrayLike, BoolArray, FloatArray, bool_array, check_finite, float64_array


@dataclass(frozen=True, eq=False)
class MatchMetrics:
    """How well matched cells agree with true places.

    Attributes:
        correct: (T, P) bool, within the distance; of every point, visible or not.
        per_view: (T,) share of a view's visible points that are correct; NaN for a view without any.
        pck: the share over the visible points of all views.
        visible_points: their number.
    """

    correct: BoolArray
    per_view: FloatArray
    pck: float
    visible_points: int


def match_metrics(pred: ArrayLike, gt: ArrayLike, visible: ArrayLike, max_distance: float = 2.0) -> MatchMetrics:
    """Share of correct keypoints: those whose cell is at most `max_distance` cells from the true place.

    Args:
        pred: (T, P, 2) matched cells.
        gt: (T, P, 2) true places in continuous cell coordinates, cell centres at integers. May be anything, NaN
            included, where not visible.
        visible: (T, P) bool, the points to score.
        max_distance: in cells, Euclidean; a point at exactly this distance is correct.

    Raises:
        ValueError: shapes differ, no point is visible, or a visible point has no true place.
    """
    target = float64_array(gt, "gt", ("T", "P", 2))
    source = float64_array(pred, "pred", target.shape)
    mask = bool_array(visible, "visible", target.shape[:-1])
    if not mask.any():
        raise ValueError("visible: no visible point")
    check_finite(target[mask], "gt at visible points")
    correct = np.linalg.norm(source - target, axis=-1) <= max_distance
    counts = np.count_nonzero(mask, axis=-1)
    hits = np.count_nonzero(correct & mask, axis=-1)
    per_view = np.divide(hits, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return MatchMetrics(correct, per_view, float(hits.sum() / counts.sum()), int(counts.sum()))


def confidence_correlation(confidence: ArrayLike, correct: ArrayLike, visible: ArrayLike) -> float:
    """Pearson correlation of confidence and being correct (0 or 1) over the visible points.

    NaN when either has no variance: all are correct, all wrong, or all equally confident.

    Args:
        confidence: any shape.
        correct: bool, the same shape.
        visible: bool, the same shape; the points that count.

    Raises:
        ValueError: shapes differ.
    """
    values = float64_array(confidence, "confidence")
    mask = bool_array(visible, "visible", values.shape)
    hits = bool_array(correct, "correct", values.shape)[mask]
    values = values[mask]
    if len(values) == 0 or np.ptp(values) == 0 or hits.all() or not hits.any():
        return float("nan")
    return float(np.corrcoef(values, hits.astype(np.float64))[0, 1])


def temporal_robustness(pck: ArrayLike) -> FloatArray:
    """Correct keypoints (T,) at growing distance from the first view, as a share of those at the first distance.

    NaN everywhere when none is correct at the first distance.

    Raises:
        ValueError: not a row of at least one number.
    """
    values = float64_array(pck, "pck", ("T",))
    if len(values) == 0:
        raise ValueError("pck: needs at least one distance")
    return values / values[0] if values[0] > 0 else np.full_like(values, np.nan)
