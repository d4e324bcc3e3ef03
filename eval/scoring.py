"""Scores of one system on one item (the views of one scene).

S views, H W pixels, P = S (S-1) / 2 pairs of views. Masks come from the ground truth alone: a prediction that is not
finite at a valid pixel is a failure of the item, never a pixel to leave out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from eval.protocols import Protocol
from eval.truth import ALL_PARTS, Part, Truth
from g2vlm.data.types import SceneSample
from geometry import GeometryPrediction, apply_rigid, invert_rigid, normals_from_points
from geometry.metrics.depth import ALIGNMENTS, evaluate_depth
from geometry.metrics.normals import normal_metrics
from geometry.metrics.points import evaluate_correspondences
from geometry.metrics.poses import RELATIVE_POSES, pair_errors

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
        nc_*: normal consistency of the two clouds after the same alignment, 0..1: |n . n'| of the kNN normals of
            nearest points, both directions averaged.
        point_scale: of Umeyama's similarity.
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
    nc_mean: float = NOT_SCORED
    nc_median: float = NOT_SCORED
    num_points: int = 0
    point_scale: float = NOT_SCORED
    normal_derived_mean_deg: float = NOT_SCORED
    normal_derived_median_deg: float = NOT_SCORED
    normal_derived_pixels: int = 0
    normal_output_mean_deg: float = NOT_SCORED
    normal_output_median_deg: float = NOT_SCORED
    normal_output_pixels: int = 0
    rotation_deg: tuple[float, ...] = ()
    translation_deg: tuple[float, ...] = ()
    num_zero_baseline: int = 0


def score(
    prediction: GeometryPrediction, sample: SceneSample, protocol: Protocol, parts: Sequence[Part] = ALL_PARTS
) -> Row:
    """`score_against` the truth of a sample.

    Raises:
        InputError: the sample has no usable ground truth.
        ValueError: as in `score_against`.
    """
    return score_against(Truth.of(sample, protocol), prediction, parts)


def score_against(truth: Truth, prediction: GeometryPrediction, parts: Sequence[Part] = ALL_PARTS) -> Row:
    """Score a prediction for the views of an item.

    Args:
        truth: what is known of the S views, and the protocol; what is not known is not scored.
        prediction: at the size of the truth, in any world frame and scale.
        parts: what of the prediction to score.

    Raises:
        ValueError: the prediction is not finite where it is scored, or no alignment exists.
    """
    sample = truth.sample
    chosen = truth.parts & set(parts)
    height, width = sample.size
    row = Row(sample.scene, sample.view_ids, height, width, int(truth.valid.sum()))
    if "depth" in chosen:
        row = _with_depth(row, prediction, truth)
    if "points" in chosen:
        row = _with_points(row, prediction, truth)
    if "derived normals" in chosen:
        row = _with_derived_normals(row, prediction, truth)
    if "output normals" in chosen:
        row = _with_output_normals(row, prediction, truth)
    if "poses" in chosen and sample.num_views > 1:
        row = _with_poses(row, prediction, truth)
    return row


def _with_depth(row: Row, prediction: GeometryPrediction, truth: Truth) -> Row:
    assert truth.depth is not None
    result = evaluate_depth(prediction.depth, truth.depth, ALIGNMENTS[truth.protocol.depth.alignment])
    metrics, alignment = result.metrics, result.alignment
    return replace(row, abs_rel=metrics.abs_rel, delta_1=metrics.delta_1, depth_scale=alignment.scale)


def _with_points(row: Row, prediction: GeometryPrediction, truth: Truth) -> Row:
    mask, target = truth.scored_points
    points = apply_rigid(prediction.cam_to_world.double(), prediction.local_points.double())
    result = evaluate_correspondences(points[mask].numpy(), target, truth.protocol.points.icp_distance)
    metrics = result.metrics
    return replace(
        row,
        num_points=result.num_points,
        point_scale=float(result.similarity.scale),
        accuracy_mean=metrics.accuracy_mean,
        accuracy_median=metrics.accuracy_median,
        completion_mean=metrics.completion_mean,
        completion_median=metrics.completion_median,
        nc_mean=metrics.nc_mean,
        nc_median=metrics.nc_median,
    )


def _with_derived_normals(row: Row, prediction: GeometryPrediction, truth: Truth) -> Row:
    predicted, _ = normals_from_points(prediction.local_points.double(), truth.valid)
    errors = _normal_errors(predicted, *truth.derived_normals)
    if errors is None:
        return row
    mean, median, pixels = errors
    return replace(row, normal_derived_mean_deg=mean, normal_derived_median_deg=median, normal_derived_pixels=pixels)


def _with_output_normals(row: Row, prediction: GeometryPrediction, truth: Truth) -> Row:
    errors = _normal_errors(prediction.normals.double(), *truth.output_normals)
    if errors is None:
        return row
    mean, median, pixels = errors
    return replace(row, normal_output_mean_deg=mean, normal_output_median_deg=median, normal_output_pixels=pixels)


def _normal_errors(predicted: Tensor, true: Tensor, mask: Tensor) -> tuple[float, float, int] | None:
    """Mean and median angle and the number of pixels; a prediction without direction counts as 90 degrees."""
    if not mask.any():
        return None
    predicted, true = predicted[mask], true[mask]  # (n, 3)
    across = torch.linalg.cross(true, one_hot(true.abs().argmin(dim=-1), 3).to(true.dtype))
    missing = (predicted == 0).all(dim=-1, keepdim=True)
    everywhere = torch.ones(len(true), dtype=torch.bool)
    metrics = normal_metrics(torch.where(missing, across, predicted), true, everywhere)
    return metrics.mean_deg, metrics.median_deg, metrics.valid_pixels


def _with_poses(row: Row, prediction: GeometryPrediction, truth: Truth) -> Row:
    assert truth.cam_to_world is not None
    predicted, true = invert_rigid(prediction.cam_to_world.double()), invert_rigid(truth.cam_to_world)
    errors = pair_errors(predicted, true, RELATIVE_POSES[truth.protocol.poses.relative])
    return replace(
        row,
        rotation_deg=tuple(errors.rotation_deg.tolist()),
        translation_deg=tuple(errors.translation_deg.tolist()),
        num_zero_baseline=int(errors.zero_baseline.sum()),
    )
