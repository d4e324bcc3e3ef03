"""A system's metrics over all items, in the averages that the field's protocols use.

*macro*: the mean over scenes, every scene the same. *micro*: over all pixels, or all pairs of views, together, so that
large scenes count more. Protocols differ in which one they report; a name without suffix is the protocol's own.
"""

import math
from collections.abc import Sequence

import numpy as np

from eval.protocols import Average, PoseRule, Protocol
from eval.scoring import NOT_SCORED, Row
from geometry.metrics.poses import PairErrors, PoseMetrics, mean_pose_metrics, pose_metrics

MACRO, MICRO = "macro", "micro"
SCENE_METRICS = (
    "accuracy_mean", "accuracy_median", "completion_mean", "completion_median", "nc_mean", "nc_median",
    "normal_derived_median_deg", "normal_output_median_deg",
)  # fmt: skip
"""Always means over scenes: no protocol averages them otherwise, or (medians) they have no other average."""


def summarise(rows: Sequence[Row], protocol: Protocol) -> dict[str, float]:
    """A system's metrics over all items; what was scored on no item is absent.

    `abs_rel` is the protocol's average, `abs_rel_macro` and `abs_rel_micro` are both; likewise delta, mean normal
    errors, RRA, RTA and AUC. Medians of pose errors are those of all pairs.
    """
    depth, normals = protocol.depth.average, protocol.normals.average
    metrics = {
        **_both(rows, "abs_rel", "valid_pixels", depth),
        **_both(rows, "delta_1", "valid_pixels", depth),
        **{name: _mean(rows, name) for name in SCENE_METRICS},
        **_both(rows, "normal_derived_mean_deg", "normal_derived_pixels", normals),
        **_both(rows, "normal_output_mean_deg", "normal_output_pixels", normals),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)} | _poses(rows, protocol.poses)


def _both(rows: Sequence[Row], name: str, pixels: str, average: Average) -> dict[str, float]:
    return _chosen(name, {MACRO: _mean(rows, name), MICRO: _mean(rows, name, pixels)}, average)


def _chosen(name: str, values: dict[Average, float], average: Average) -> dict[str, float]:
    return {name: values[average], **{f"{name}_{kind}": value for kind, value in values.items()}}


def _mean(rows: Sequence[Row], name: str, pixels: str | None = None) -> float:
    """Mean over the items that were scored, weighted by a count of pixels if one is named."""
    values = np.array([getattr(row, name) for row in rows], dtype=np.float64)
    weights = np.array([1 if pixels is None else getattr(row, pixels) for row in rows], dtype=np.float64)
    scored = ~np.isnan(values)
    return float(values[scored] @ weights[scored] / weights[scored].sum()) if scored.any() else NOT_SCORED


def _poses(rows: Sequence[Row], rule: PoseRule) -> dict[str, float]:
    rotation = [error for row in rows for error in row.rotation_deg]  # (pairs of all items,)
    translation = [error for row in rows for error in row.translation_deg]
    if not rotation:
        return {}
    pooled = _accuracies(rotation, translation, rule)
    scenes = [_accuracies(row.rotation_deg, row.translation_deg, rule) for row in rows if row.rotation_deg]
    averages: dict[Average, dict[str, float]] = {MACRO: _named(mean_pose_metrics(scenes)), MICRO: _named(pooled)}
    metrics = {
        "rotation_median_deg": float(np.median(rotation)),
        "translation_median_deg": float(np.median(translation)),
    }
    for name in averages[MICRO]:
        metrics |= _chosen(name, {kind: values[name] for kind, values in averages.items()}, rule.average)
    return {
        **metrics,
        "num_pairs": pooled.num_pairs,
        "num_zero_baseline": sum(row.num_zero_baseline for row in rows),
    }


def _accuracies(rotation: Sequence[float], translation: Sequence[float], rule: PoseRule) -> PoseMetrics:
    unknown = np.zeros(len(rotation), dtype=np.bool_)
    errors = PairErrors(np.array(rotation, dtype=np.float64), np.array(translation, dtype=np.float64), unknown)
    return pose_metrics(errors, rule.thresholds, rule.auc_limits)


def _named(metrics: PoseMetrics) -> dict[str, float]:
    stems = {"rra": metrics.rra, "rta": metrics.rta, "auc": metrics.auc}
    return {f"{stem}_{limit}": value for stem, values in stems.items() for limit, value in values.items()}
