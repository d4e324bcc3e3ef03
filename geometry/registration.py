"""Bringing two point clouds together and reading normals off them: Sim(3) fit, point-to-point ICP, kNN normals.

ICP and normals follow Open3D's definitions, whose numbers the point-map benchmarks report. float64 on the host,
deterministic: parallel queries do not change a result.

Shapes: N source points, M target points, k neighbours.
"""

# scipy and roma have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial import KDTree

from geometry.alignment import umeyama
from geometry.arrays import ArrayLike, FloatArray, IntArray, finite_array
from geometry.types import Similarity

POINTS_PER_CHUNK = 1 << 16  # bounds the neighbourhoods held at once to about 50 MB
ROUND_OFF = 1e-12  # of a covariance, relative to the points; nothing below it says anything
POINTS_PER_THREAD = 1 << 16  # starting threads for fewer queries takes longer than it saves


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points (N, 3) with what is made from them once: the search tree, and normals of unknown sign."""

    points: FloatArray

    def __len__(self) -> int:
        return len(self.points)

    @classmethod
    def of(cls, points: "ArrayLike | Cloud", name: str, least: int = 1) -> "Cloud":
        """A cloud of checked points; a cloud is returned as it is.

        Raises:
            ValueError: fewer than `least` points, another shape than (N, 3), or a value that is not finite.
        """
        cloud = points if isinstance(points, Cloud) else cls(finite_array(points, name, ("N", 3)))
        if len(cloud) < least:
            raise ValueError(f"{name}: needs at least {least} points, given {len(cloud)}")
        return cloud

    @cached_property
    def tree(self) -> KDTree:
        """For nearest neighbours."""
        return KDTree(self.points)

    @cached_property
    def normals(self) -> FloatArray:
        """(N, 3) by `estimate_normals`."""
        return estimate_normals(self)


@dataclass(frozen=True)
class Registration:
    """Result of ICP.

    Attributes:
        transform: (4, 4) rigid, source -> target.
        fitness: share of source points with a target point within the correspondence distance.
        inlier_rmse: root mean square distance of those correspondences, in the unit of the points.
    """

    transform: FloatArray
    fitness: float
    inlier_rmse: float


def fit_similarity(source: ArrayLike, target: ArrayLike) -> Similarity:
    """Least-squares Sim(3) from source (N, 3) to corresponding target (N, 3), in float64 (Umeyama 1991).

    Raises:
        ValueError: fewer than three points, a value that is not finite, or a source without extent.
    """
    src = finite_array(source, "source", ("N", 3))
    tgt = finite_array(target, "target", src.shape)
    if len(src) < 3:
        raise ValueError(f"source: a similarity needs at least 3 points, given {len(src)}")
    if np.ptp(src, axis=0).max() == 0:
        raise ValueError("source: all points coincide, the scale is undefined")
    return umeyama(torch.from_numpy(src), torch.from_numpy(tgt))


def apply_similarity(similarity: Similarity, points: FloatArray) -> FloatArray:
    """`Similarity.apply` on a host array (N, 3)."""
    return similarity.apply(torch.from_numpy(points)).numpy()


def apply_transform(transform: FloatArray, points: FloatArray) -> FloatArray:
    """Move points (N, 3) by a rigid transform (4, 4)."""
    return points @ transform[:3, :3].T + transform[:3, 3]


def nearest_neighbours(query: FloatArray, cloud: Cloud) -> tuple[FloatArray, IntArray]:
    """Distance (Q,) to, and index (Q,) of, the nearest point of a cloud for each of `query` (Q, 3)."""
    distance, index = cloud.tree.query(query, workers=_threads(query))
    return np.asarray(distance), np.asarray(index)


def icp_point_to_point(
    source: ArrayLike,
    target: ArrayLike | Cloud,
    max_distance: float,
    *,
    relative_fitness: float = 1e-6,
    relative_rmse: float = 1e-6,
    max_iterations: int = 30,
) -> Registration:
    """Rigid point-to-point ICP from the identity, with Open3D's correspondences and stopping rule.

    Each iteration fits the rigid motion between the source points and their nearest target points, where these are
    strictly closer than `max_distance`. It stops when fitness and inlier rmse both change by less than their limits, or
    when fewer than three correspondences are left.

    Args:
        source: (N, 3) points to move.
        target: (M, 3) points to reach.
        max_distance: largest correspondence distance, in the unit of the points.
        relative_fitness: limit on the change of fitness.
        relative_rmse: limit on the change of the inlier rmse, in the unit of the points.
        max_iterations: upper limit on rigid updates.

    Raises:
        ValueError: a cloud is empty or not finite, or `max_distance` is not positive.
    """
    moved = Cloud.of(source, "source").points
    fixed = Cloud.of(target, "target")
    if not max_distance > 0:
        raise ValueError(f"max_distance: must be positive, given {max_distance}")
    transform = np.eye(4)
    current = _correspondences(moved, fixed, max_distance)
    for _ in range(max_iterations):
        if len(current.source_index) < 3:
            break
        update = _fit_rigid(moved[current.source_index], fixed.points[current.target_index])
        transform = update @ transform
        moved = apply_transform(update, moved)
        previous, current = current, _correspondences(moved, fixed, max_distance)
        settled = abs(previous.fitness - current.fitness) < relative_fitness
        if settled and abs(previous.inlier_rmse - current.inlier_rmse) < relative_rmse:
            break
    return Registration(transform, current.fitness, current.inlier_rmse)


def estimate_normals(points: ArrayLike | Cloud, num_neighbours: int = 30) -> FloatArray:
    """Unit normals (N, 3) of unknown sign: the direction of least variance of each point's nearest neighbours.

    The neighbourhood counts the point itself (Open3D's `estimate_normals` default); a smaller cloud uses all points.

    Raises:
        ValueError: fewer than three points, or a value that is not finite.
    """
    cloud = Cloud.of(points, "points", 3)
    count = min(num_neighbours, len(cloud))
    normals = np.empty_like(cloud.points)
    for start in range(0, len(cloud), POINTS_PER_CHUNK):
        chunk = cloud.points[start : start + POINTS_PER_CHUNK]
        _, index = cloud.tree.query(chunk, k=count, workers=_threads(chunk))  # (n, k)
        normals[start : start + POINTS_PER_CHUNK] = _least_variance_direction(cloud.points[index])
    return normals


@dataclass(frozen=True)
class _Correspondences:
    source_index: IntArray  # (n,)
    target_index: IntArray  # (n,)
    fitness: float
    inlier_rmse: float


def _threads(query: FloatArray) -> int:
    """For a search of scipy's: one, or all (-1)."""
    return -1 if len(query) >= POINTS_PER_THREAD else 1


def _correspondences(source: FloatArray, target: Cloud, max_distance: float) -> _Correspondences:
    distance, index = target.tree.query(source, distance_upper_bound=max_distance, workers=_threads(source))
    found = np.flatnonzero(np.isfinite(distance))  # (n,); a source point without target has infinite distance
    squared = np.asarray(distance)[found] ** 2
    rmse = float(np.sqrt(np.mean(squared))) if len(found) else 0.0
    return _Correspondences(found, np.asarray(index)[found], len(found) / len(source), rmse)


def _fit_rigid(source: FloatArray, target: FloatArray) -> FloatArray:
    """Least-squares rigid (4, 4) between corresponding points, source -> target (Umeyama 1991 without scale).

    Points at one place or on one line leave the rotation open; then it is none, whatever their rounding suggests.
    """
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    spread = source - source_mean
    U, size, Vt = np.linalg.svd((target - target_mean).T @ spread)
    motion = np.eye(4)
    if size[1] > ROUND_OFF * np.linalg.norm(spread) * np.linalg.norm(target):
        U[:, 2] *= np.sign(np.linalg.det(U @ Vt))  # a rotation, not a reflection
        motion[:3, :3] = U @ Vt
    motion[:3, 3] = target_mean - motion[:3, :3] @ source_mean
    return motion


def _least_variance_direction(neighbours: FloatArray) -> FloatArray:
    """Neighbourhoods (n, k, 3) -> eigenvector (n, 3) of the smallest eigenvalue of their covariance."""
    centred = neighbours - neighbours.mean(axis=1, keepdims=True)
    covariance = centred.swapaxes(1, 2) @ centred  # (n, 3, 3), times k
    return np.linalg.eigh(covariance).eigenvectors[:, :, 0]
