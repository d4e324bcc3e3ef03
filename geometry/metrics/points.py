"""Point-map metrics: accuracy, completion, normal consistency, after Sim(3) alignment and ICP.

The protocol of the pi3 line of evaluators (`evaluate_points`): Umeyama on all valid pixels of all views, point-to-point
ICP, nearest-neighbour distances in both directions without cap or down-sampling. A dataset's value is the plain mean
over the sequences that were evaluated (`geometry.metrics.aggregate.plain_mean`).

Shapes: S views, H W pixels, N predicted and M ground-truth points. Distances are in the unit of the ground truth.
"""

from dataclasses import dataclass

import numpy as np

from geometry.arrays import ArrayLike, BoolArray, FloatArray, bool_array, check_finite, float64_array
from geometry.registration import (
    Cloud,
    Registration,
    apply_similarity,
    apply_transform,
    fit_similarity,
    icp_point_to_point,
    nearest_neighbours,
)
from geometry.types import Similarity


@dataclass(frozen=True)
class DistanceMetrics:
    """Distance from each predicted point to the nearest true one (accuracy), and the reverse (completion)."""

    accuracy_mean: float
    accuracy_median: float
    completion_mean: float
    completion_median: float


@dataclass(frozen=True)
class PointMetrics(DistanceMetrics):
    """Distances and normal consistency.

    `nc1` = |n_pred . n_gt| over predicted points and their nearest true points, `nc2` the same over true points,
    `nc` the average of the two (of the medians as well).
    """

    nc1_mean: float
    nc1_median: float
    nc2_mean: float
    nc2_median: float

    @property
    def nc_mean(self) -> float:
        """Normal consistency, mean."""
        return (self.nc1_mean + self.nc2_mean) / 2

    @property
    def nc_median(self) -> float:
        """Normal consistency, average of the two medians."""
        return (self.nc1_median + self.nc2_median) / 2


@dataclass(frozen=True)
class PointEvaluation:
    """Scores with the alignment that led to them.

    Attributes:
        metrics: scores after ICP.
        similarity: Sim(3), prediction -> ground truth.
        registration: ICP on top of it.
        num_points: points in each cloud.
    """

    metrics: PointMetrics
    similarity: Similarity
    registration: Registration
    num_points: int


def evaluate_points(pred: ArrayLike, gt: ArrayLike, valid: ArrayLike, icp_distance: float) -> PointEvaluation:
    """Run the whole protocol on one sequence: Umeyama -> ICP -> metrics.

    Args:
        pred: (..., 3) predicted points, one per ground-truth pixel, in any frame and scale.
        gt: (..., 3) ground-truth points in one world frame.
        valid: (...,) bool, pixels with ground truth.
        icp_distance: largest ICP correspondence, in the unit of `gt`; the benchmarks use 0.1 m, and 100 mm on DTU.

    Raises:
        ValueError: shapes differ, fewer than three pixels are valid, or a valid point is not finite.
    """
    source, true_points = corresponding_points(pred, gt, valid)
    return evaluate_correspondences(source, Cloud(true_points), icp_distance)


def evaluate_correspondences(source: FloatArray, target: Cloud, icp_distance: float) -> PointEvaluation:
    """`evaluate_points` on predicted points (N, 3) and a cloud of the corresponding true ones, finite both.

    Several predictions of one scene share the cloud, hence its search tree and its normals.

    Raises:
        ValueError: fewer than three points, or all predicted points coincide.
    """
    similarity = fit_similarity(source, target.points)
    aligned = apply_similarity(similarity, source)
    registration = icp_point_to_point(aligned, target, icp_distance)
    metrics = point_metrics(apply_transform(registration.transform, aligned), target)
    return PointEvaluation(metrics, similarity, registration, len(target))


def corresponding_points(pred: ArrayLike, gt: ArrayLike, valid: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The valid points of both maps (..., 3), as two clouds (N, 3) in the same order.

    Raises:
        ValueError: shapes differ, fewer than three pixels are valid, or a valid point is not finite.
    """
    target = float64_array(gt, "gt")
    source = float64_array(pred, "pred", target.shape)
    mask = bool_array(valid, "valid", target.shape[:-1])
    if target.shape[-1] != 3:
        raise ValueError(f"gt: expected shape (..., 3), given {target.shape}")
    if np.count_nonzero(mask) < 3:
        raise ValueError(f"valid: needs at least 3 valid pixels, given {np.count_nonzero(mask)}")
    check_finite(source[mask], "pred at valid pixels")
    check_finite(target[mask], "gt at valid pixels")
    return source[mask], target[mask]


def thin_mask(valid: ArrayLike, max_points: int) -> BoolArray:
    """Keep at most `max_points` valid pixels (...,), evenly spaced in storage order: for quick looks only."""
    mask = bool_array(valid, "valid")
    index = np.flatnonzero(mask)
    count = min(max_points, len(index))
    kept = np.zeros(mask.size, dtype=np.bool_)
    kept[index[np.arange(count) * len(index) // max(count, 1)]] = True
    return kept.reshape(mask.shape)


def point_metrics(pred: ArrayLike | Cloud, gt: ArrayLike | Cloud) -> PointMetrics:
    """Distances and normal consistency of two aligned clouds (N, 3) and (M, 3), each with kNN normals of its own."""
    source, target = Cloud.of(pred, "pred"), Cloud.of(gt, "gt")
    accuracy, nearest_gt = nearest_neighbours(source.points, target)
    completion, nearest_pred = nearest_neighbours(target.points, source)
    nc1 = _absolute_cosine(source.normals, target.normals[nearest_gt])
    nc2 = _absolute_cosine(target.normals, source.normals[nearest_pred])
    return PointMetrics(*_mean_median(accuracy), *_mean_median(completion), *_mean_median(nc1), *_mean_median(nc2))


def distance_metrics(pred: ArrayLike | Cloud, gt: ArrayLike | Cloud) -> DistanceMetrics:
    """Accuracy and completion alone of two aligned clouds (N, 3) and (M, 3)."""
    source, target = Cloud.of(pred, "pred"), Cloud.of(gt, "gt")
    accuracy, _ = nearest_neighbours(source.points, target)
    completion, _ = nearest_neighbours(target.points, source)
    return DistanceMetrics(*_mean_median(accuracy), *_mean_median(completion))


def completion_ratio(pred: ArrayLike, gt: ArrayLike, threshold: float) -> float:
    """Share of true points (M, 3) with a predicted point (N, 3) closer than `threshold`."""
    distance, _ = nearest_neighbours(Cloud.of(gt, "gt").points, Cloud.of(pred, "pred"))
    return float(np.mean(distance < threshold))


def _absolute_cosine(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.abs(np.sum(a * b, axis=-1))  # (N,)


def _mean_median(values: FloatArray) -> tuple[float, float]:
    return float(np.mean(values)), float(np.median(values))
