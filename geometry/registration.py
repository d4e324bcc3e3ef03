"""Bringing two point clouds together and reading normals off them: Sim(3) fit, point-to-point ICP, kNN normals.

ICP and normals follow Open3D's definitions, whose numbers the point-map benchmarks report. float64 on the host,
deterministic: parallel queries do not change a result.

Shapes: N source points, M target points, k neighbours.
"""

# scipy and roma have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from dataclasses import dataclass
from typing import cast

import numpy as np
import roma
import torch
from scipy.spatial import KDTree

from geometry.alignment import umeyama
from geometry.arrays import ArrayLike, FloatArray, IntArray, finite_array
from geometry.transforms import rigid
from geometry.types import Similarity

POINTS_PER_CHUNK = 1 << 16  # bounds the neighbourhoods held at once to about 50 MB


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


def nearest_neighbours(query: FloatArray, points: FloatArray) -> tuple[FloatArray, IntArray]:
    """Distance (Q,) to, and index (Q,) of, the nearest of `points` (N, 3) for each of `query` (Q, 3)."""
    distance, index = KDTree(points).query(query, workers=-1)
    return np.asarray(distance), np.asarray(index)


def icp_point_to_point(
    source: ArrayLike,
    target: ArrayLike,
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
    moved = _cloud(source, "source", 1)
    fixed = _cloud(target, "target", 1)
    if not max_distance > 0:
        raise ValueError(f"max_distance: must be positive, given {max_distance}")
    tree = KDTree(fixed)
    transform = np.eye(4)
    current = _correspondences(moved, tree, max_distance)
    for _ in range(max_iterations):
        if len(current.source_index) < 3:
            break
        update = _fit_rigid(moved[current.source_index], fixed[current.target_index])
        transform = update @ transform
        moved = apply_transform(update, moved)
        previous, current = current, _correspondences(moved, tree, max_distance)
        settled = abs(previous.fitness - current.fitness) < relative_fitness
        if settled and abs(previous.inlier_rmse - current.inlier_rmse) < relative_rmse:
            break
    return Registration(transform, current.fitness, current.inlier_rmse)


def estimate_normals(points: ArrayLike, num_neighbours: int = 30) -> FloatArray:
    """Unit normals (N, 3) of unknown sign: the direction of least variance of each point's nearest neighbours.

    The neighbourhood counts the point itself (Open3D's `estimate_normals` default); a smaller cloud uses all points.

    Raises:
        ValueError: fewer than three points, or a value that is not finite.
    """
    cloud = _cloud(points, "points", 3)
    tree = KDTree(cloud)
    count = min(num_neighbours, len(cloud))
    normals = np.empty_like(cloud)
    for start in range(0, len(cloud), POINTS_PER_CHUNK):
        chunk = slice(start, start + POINTS_PER_CHUNK)
        _, index = tree.query(cloud[chunk], k=count, workers=-1)  # (n, k)
        normals[chunk] = _least_variance_direction(cloud[index])
    return normals


@dataclass(frozen=True)
class _Correspondences:
    source_index: IntArray  # (n,)
    target_index: IntArray  # (n,)
    fitness: float
    inlier_rmse: float


def _correspondences(source: FloatArray, target: KDTree, max_distance: float) -> _Correspondences:
    distance, index = target.query(source, distance_upper_bound=max_distance, workers=-1)
    found = np.flatnonzero(np.isfinite(distance))  # (n,); a source point without target has infinite distance
    squared = np.asarray(distance)[found] ** 2
    rmse = float(np.sqrt(np.mean(squared))) if len(found) else 0.0
    return _Correspondences(found, np.asarray(index)[found], len(found) / len(source), rmse)


def _fit_rigid(source: FloatArray, target: FloatArray) -> FloatArray:
    """Least-squares rigid (4, 4) between corresponding points, source -> target."""
    motion = roma.rigid_points_registration(torch.from_numpy(source), torch.from_numpy(target))
    rotation, translation = cast("tuple[torch.Tensor, torch.Tensor]", motion)
    return rigid(rotation, translation).numpy()


def _least_variance_direction(neighbours: FloatArray) -> FloatArray:
    """Neighbourhoods (n, k, 3) -> eigenvector (n, 3) of the smallest eigenvalue of their covariance."""
    centred = neighbours - neighbours.mean(axis=1, keepdims=True)
    covariance = centred.swapaxes(1, 2) @ centred  # (n, 3, 3), times k
    return np.linalg.eigh(covariance).eigenvectors[:, :, 0]


def _cloud(points: ArrayLike, name: str, least: int) -> FloatArray:
    cloud = finite_array(points, name, ("N", 3))
    if len(cloud) < least:
        raise ValueError(f"{name}: needs at least {least} points, given {len(cloud)}")
    return cloud
