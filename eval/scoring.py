"""Scores of one item (the views of one scene), and of all items together.

S views, H W pixels, P = S (S-1) / 2 pairs of views. Masks come from the ground truth alone: a prediction that is not
finite at a valid pixel is a failure of the item, never a pixel to leave out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from eval.protocols import Average, NormalRule, PointRule, PoseRule, Protocol
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from geometry import GeometryPrediction, apply_rigid, invert_rigid, normals_from_points, unproject
from geometry.metrics.depth import ALIGNMENTS, evaluate_depth
from geometry.metrics.normals import normal_metrics
from geometry.metrics.points import corresponding_points, distance_metrics, thin_mask
from geometry.metrics.poses import RELATIVE_POSES, PairErrors, pair_errors, pose_metrics
from geometry.registration import apply_similarity, apply_transform, fit_similarity, icp_point_to_point

Part = Literal["depth", "points", "derived normals", "output normals", "poses"]
ALL_PARTS: tuple[Part, ...] = ("depth", "points", "derived normals", "output normals", "poses")
NOT_SCORED = math.nan


@dataclass(frozen=True)
class Row:
    """What one system scored on one item; NaN where a part was not scored.

    Attributes:
        item: name of the scene.
        view_ids: names of its views, in order.
        height, width: of the views in pixels.
        valid_pixels: with true depth, over all views.
        abs_rel, delta_1: mean |p-g|/g and the share of max(p/g, g/p) < 1.25, after one scale for the item.
        depth_scale: that scale.
        accuracy_*, completion_*: distances predicted -> true points and back after Umeyama and ICP, in the unit of the
            data; num_points in each cloud.
        normal_derived_*: degrees between normals derived from predicted and from true points by the same rule.
        normal_output_*: degrees between the normals the model puts out and the true ones.
        rotation_deg, translation_deg: (P,) of the relative poses of the pairs i < j.
        num_zero_baseline: pairs whose two true cameras are at one place; their translation error is noise.
    """

    item: str
    view_ids: tuple[str, ...]
    height: int
    width: int
    valid_pixels: int
    abs_rel: float = NOT_SCORED
    delta_1: float = NOT_SCORED
    depth_scale: float = NOT_SCORED
    accuracy_mean: float = NOT_SCORED
    accuracy_median: float = NOT_SCORED
    completion_mean: float = NOT_SCORED
    completion_median: float = NOT_SCORED
    num_points: int = 0
    normal_derived_mean_deg: float = NOT_SCORED
    normal_derived_median_deg: float = NOT_SCORED
    normal_derived_pixels: int = 0
    normal_output_mean_deg: float = NOT_SCORED
    normal_output_median_deg: float = NOT_SCORED
    normal_output_pixels: int = 0
    rotation_deg: tuple[float, ...] = ()
    translation_deg: tuple[float, ...] = ()
    num_zero_baseline: int = 0


# ---------------------------------------------------------------------------------------------- ground truth


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of an item in float64; absent parts are None.

    Attributes:
        valid: (S, H, W) bool, pixels with finite positive depth below the protocol's limit.
        depth: (S, H, W), zero where invalid.
        local_points: (S, H, W, 3); needs intrinsics.
        world_points: (S, H, W, 3); needs intrinsics and poses.
        normals: (S, H, W, 3) as given with the data, zero where undefined.
        cam_to_world: (S, 4, 4).
    """

    valid: Tensor
    depth: Tensor | None
    local_points: Tensor | None
    world_points: Tensor | None
    normals: Tensor | None
    cam_to_world: Tensor | None

    @classmethod
    def of(cls, sample: SceneSample, max_depth: float | None = None) -> "Truth":
        """The truth that a sample holds.

        Raises:
            InputError: neither depth nor poses, no valid pixel, or a pose that is not finite.
        """
        valid, depth = _valid_depth(sample, max_depth)
        poses = None if sample.cam_to_world is None else sample.cam_to_world.double()
        if poses is not None and not poses.isfinite().all():
            raise InputError(f"cannot score {sample.scene}", "a true pose is not finite", "check the scene's poses")
        if depth is None and poses is None:
            raise InputError(f"cannot score {sample.scene}", "it has neither depth nor poses", "use --dataset images")
        local = None if depth is None or sample.intrinsics is None else unproject(depth, sample.intrinsics.double())
        world = None if local is None or poses is None else apply_rigid(poses, local)
        normals = None if sample.normals is None else sample.normals.double()
        return cls(valid, depth, local, world, normals, poses)

    def parts(self) -> set[Part]:
        """What can be scored against it."""
        has: dict[Part, object] = {
            "depth": self.depth,
            "points": self.world_points,
            "derived normals": self.local_points,
            "output normals": self.local_points,
            "poses": self.cam_to_world,
        }
        return {part for part, value in has.items() if value is not None}

    def smooth(self, rule: NormalRule) -> Tensor:
        """(S, H, W) bool: valid pixels away from steps of the depth, and from holes, by the protocol's rule."""
        assert self.depth is not None
        inverse = torch.where(self.valid, 1 / self.depth, 0)
        bend = torch.maximum(_second_difference(inverse), _second_difference(inverse.mT).mT)
        return self.valid & (bend <= rule.max_bend * inverse)


def _second_difference(values: Tensor) -> Tensor:
    """|v[i-1] - 2 v[i] + v[i+1]| along the last axis; 0 at its two ends."""
    inner = (values[..., :-2] - 2 * values[..., 1:-1] + values[..., 2:]).abs()
    return pad(inner, (1, 1))


def _valid_depth(sample: SceneSample, max_depth: float | None) -> tuple[Tensor, Tensor | None]:
    if sample.depth is None:
        return torch.zeros(sample.num_views, *sample.size, dtype=torch.bool), None
    depth = sample.depth.double()
    valid = depth.isfinite() & (depth > 0) & (depth < (math.inf if max_depth is None else max_depth))
    if sample.valid is not None:
        valid = valid & sample.valid
    if not valid.any():
        raise InputError(f"cannot score {sample.scene}", "no pixel has valid depth", "check the scene's depth maps")
    return valid, torch.where(valid, depth, 0)


# ---------------------------------------------------------------------------------------------- one item


def score(
    prediction: GeometryPrediction, sample: SceneSample, protocol: Protocol, parts: Sequence[Part] = ALL_PARTS
) -> Row:
    """Score a prediction for the views of a sample.

    Args:
        prediction: for the S views at the sample's size, in any world frame and scale.
        sample: with ground truth; what it lacks is not scored.
        protocol: alignments and constants.
        parts: what of the prediction to score.

    Raises:
        InputError: the sample has no usable ground truth.
        ValueError: the prediction is not finite where it is scored, or no alignment exists.
    """
    truth = Truth.of(sample, protocol.depth.max_depth)
    chosen = truth.parts() & set(parts)
    height, width = sample.size
    row = Row(sample.scene, sample.view_ids, height, width, int(truth.valid.sum()))
    if "depth" in chosen:
        row = _with_depth(row, prediction, truth, protocol)
    if "points" in chosen:
        row = _with_points(row, prediction, truth, protocol.points)
    if "derived normals" in chosen:
        row = _with_derived_normals(row, prediction, truth, protocol.normals)
    if "output normals" in chosen:
        row = _with_output_normals(row, prediction, truth, protocol.normals)
    if "poses" in chosen and sample.num_views > 1:
        row = _with_poses(row, prediction, truth, protocol.poses)
    return row


def _with_depth(row: Row, prediction: GeometryPrediction, truth: Truth, protocol: Protocol) -> Row:
    assert truth.depth is not None
    result = evaluate_depth(prediction.depth, truth.depth, ALIGNMENTS[protocol.depth.alignment])
    metrics, alignment = result.metrics, result.alignment
    return replace(row, abs_rel=metrics.abs_rel, delta_1=metrics.delta_1, depth_scale=alignment.scale)


def _with_points(row: Row, prediction: GeometryPrediction, truth: Truth, rule: PointRule) -> Row:
    assert truth.world_points is not None
    mask = truth.valid if rule.max_points is None else thin_mask(truth.valid, rule.max_points)
    points = apply_rigid(prediction.cam_to_world.double(), prediction.local_points.double())
    source, target = corresponding_points(points, truth.world_points, mask)
    aligned = apply_similarity(fit_similarity(source, target), source)
    icp = icp_point_to_point(aligned, target, rule.icp_distance)
    distances = distance_metrics(apply_transform(icp.transform, aligned), target)
    return replace(
        row,
        num_points=len(target),
        accuracy_mean=distances.accuracy_mean,
        accuracy_median=distances.accuracy_median,
        completion_mean=distances.completion_mean,
        completion_median=distances.completion_median,
    )


def _with_derived_normals(row: Row, prediction: GeometryPrediction, truth: Truth, rule: NormalRule) -> Row:
    assert truth.local_points is not None
    true, exists = normals_from_points(truth.local_points, truth.valid)
    predicted, _ = normals_from_points(prediction.local_points.double(), truth.valid)
    errors = _normal_errors(predicted, true, exists & truth.smooth(rule))
    if errors is None:
        return row
    mean, median, pixels = errors
    return replace(row, normal_derived_mean_deg=mean, normal_derived_median_deg=median, normal_derived_pixels=pixels)


def _with_output_normals(row: Row, prediction: GeometryPrediction, truth: Truth, rule: NormalRule) -> Row:
    """Against the normals given with the data, or else those derived from its points away from depth steps."""
    assert truth.local_points is not None
    if truth.normals is not None:
        true, mask = truth.normals, truth.valid & (truth.normals.norm(dim=-1) > 0)
    else:
        true, exists = normals_from_points(truth.local_points, truth.valid)
        mask = exists & truth.smooth(rule)
    errors = _normal_errors(prediction.normals.double(), true, mask)
    if errors is None:
        return row
    mean, median, pixels = errors
    return replace(row, normal_output_mean_deg=mean, normal_output_median_deg=median, normal_output_pixels=pixels)


def _normal_errors(predicted: Tensor, true: Tensor, mask: Tensor) -> tuple[float, float, int] | None:
    """Mean and median angle and the number of pixels; a prediction without direction counts as 90 degrees."""
    if not mask.any():
        return None
    across = torch.linalg.cross(true, one_hot(true.abs().argmin(dim=-1), 3).to(true.dtype))
    missing = (predicted == 0).all(dim=-1, keepdim=True)
    metrics = normal_metrics(torch.where(missing, across, predicted), true, mask)
    return metrics.mean_deg, metrics.median_deg, metrics.valid_pixels


def _with_poses(row: Row, prediction: GeometryPrediction, truth: Truth, rule: PoseRule) -> Row:
    assert truth.cam_to_world is not None
    predicted, true = invert_rigid(prediction.cam_to_world.double()), invert_rigid(truth.cam_to_world)
    errors = pair_errors(predicted, true, RELATIVE_POSES[rule.relative])
    return replace(
        row,
        rotation_deg=tuple(errors.rotation_deg.tolist()),
        translation_deg=tuple(errors.translation_deg.tolist()),
        num_zero_baseline=int(errors.zero_baseline.sum()),
    )


# ---------------------------------------------------------------------------------------------- all items


def summarise(rows: Sequence[Row], protocol: Protocol) -> dict[str, float]:
    """A system's metrics over all items; what was scored on no item is absent.

    Depth, points and normals are averaged over the items as the protocol says; pairs of views are pooled.
    """
    averages: dict[str, Average] = {
        "abs_rel": protocol.depth.average,
        "delta_1": protocol.depth.average,
        **dict.fromkeys(_names("accuracy", "completion"), protocol.points.average),
        **dict.fromkeys(_names("normal_derived", "normal_output", suffix="_deg"), protocol.normals.average),
    }
    means = {name: _mean(rows, name, average) for name, average in averages.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)} | _pooled_poses(rows, protocol.poses)


def _names(*stems: str, suffix: str = "") -> list[str]:
    return [f"{stem}_{statistic}{suffix}" for stem in stems for statistic in ("mean", "median")]


def _mean(rows: Sequence[Row], name: str, average: Average) -> float:
    values = np.array([getattr(row, name) for row in rows], dtype=np.float64)
    weights = np.array([row.valid_pixels if average == "pixels" else 1 for row in rows], dtype=np.float64)
    scored = ~np.isnan(values)
    return float(values[scored] @ weights[scored] / weights[scored].sum()) if scored.any() else NOT_SCORED


def _pooled_poses(rows: Sequence[Row], rule: PoseRule) -> dict[str, float]:
    rotation = np.array([error for row in rows for error in row.rotation_deg], dtype=np.float64)  # (pairs,)
    translation = np.array([error for row in rows for error in row.translation_deg], dtype=np.float64)
    if not len(rotation):
        return {}
    unknown = np.zeros(len(rotation), dtype=np.bool_)
    metrics = pose_metrics(PairErrors(rotation, translation, unknown), rule.thresholds, rule.auc_limits)
    return {
        "rotation_median_deg": float(np.median(rotation)),
        "translation_median_deg": float(np.median(translation)),
        **{f"rra_{k}": value for k, value in metrics.rra.items()},
        **{f"rta_{k}": value for k, value in metrics.rta.items()},
        **{f"auc_{k}": value for k, value in metrics.auc.items()},
        "num_pairs": metrics.num_pairs,
        "num_zero_baseline": sum(row.num_zero_baseline for row in rows),
    }
