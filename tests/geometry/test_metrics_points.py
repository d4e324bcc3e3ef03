"""Properties of registration, point-map and normal metrics, and inputs they must refuse."""

from dataclasses import astuple

import numpy as np
import pytest
import roma
import torch

from geometry import registration
from geometry.metrics.aggregate import plain_mean
from geometry.metrics.normals import normal_metrics
from geometry.metrics.points import (
    DistanceMetrics,
    completion_ratio,
    corresponding_points,
    distance_metrics,
    evaluate_correspondences,
    evaluate_points,
    point_metrics,
    thin_mask,
)
from geometry.registration import Cloud, apply_transform, estimate_normals, icp_point_to_point


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def surface(rng: np.random.Generator) -> np.ndarray:
    """Two views of a curved surface, (2, 20, 25, 3)."""
    x, y = rng.uniform(-1, 1, size=(2, 2, 20, 25))
    return np.stack([x, y, 0.4 * np.sin(3 * x) + 0.3 * y**2 + 2], axis=-1)


@pytest.fixture
def valid(rng: np.random.Generator) -> np.ndarray:
    return rng.random((2, 20, 25)) < 0.9


def rotation(degrees: float) -> np.ndarray:
    axis = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return roma.rotvec_to_rotmat(axis / axis.norm() * np.radians(degrees)).numpy()


def moved(points: np.ndarray, degrees: float, scale: float, shift: float) -> np.ndarray:
    return scale * points @ rotation(degrees).T + shift


# Protocol


def test_prediction_up_to_a_similarity_is_perfect(surface: np.ndarray, valid: np.ndarray) -> None:
    result = evaluate_points(moved(surface, 130, 3, -4), surface, valid, icp_distance=0.1)
    np.testing.assert_allclose(astuple(result.metrics)[:4], 0, atol=1e-10)
    np.testing.assert_allclose(astuple(result.metrics)[4:], 1, atol=1e-8)
    assert result.metrics.nc_mean == pytest.approx(1)
    assert result.num_points == valid.sum()
    assert result.registration.fitness == 1
    assert float(result.similarity.scale) == pytest.approx(1 / 3)


def test_similarity_of_the_prediction_does_not_matter(
    surface: np.ndarray, valid: np.ndarray, rng: np.random.Generator
) -> None:
    noisy = surface + 0.02 * rng.normal(size=surface.shape)
    plain = evaluate_points(noisy, surface, valid, 0.1).metrics
    other = evaluate_points(moved(noisy, 77, 0.2, 9), surface, valid, 0.1).metrics
    np.testing.assert_allclose(astuple(other), astuple(plain), rtol=1e-6)


def test_order_of_pixels_does_not_matter(surface: np.ndarray, valid: np.ndarray, rng: np.random.Generator) -> None:
    noisy = surface + 0.02 * rng.normal(size=surface.shape)
    order = rng.permutation(valid.size)
    shuffled = [array.reshape(valid.size, -1)[order] for array in (noisy, surface, valid)]
    plain = evaluate_points(noisy, surface, valid, 0.1).metrics
    other = evaluate_points(shuffled[0], shuffled[1], shuffled[2][:, 0], 0.1).metrics
    np.testing.assert_allclose(astuple(other), astuple(plain), rtol=1e-8)


def test_tensors_and_arrays_agree(surface: np.ndarray, valid: np.ndarray) -> None:
    tensors = evaluate_points(torch.from_numpy(surface), torch.from_numpy(surface), torch.from_numpy(valid), 0.1)
    assert tensors.metrics == evaluate_points(surface, surface, valid, 0.1).metrics


def test_pixels_without_ground_truth_do_not_matter(surface: np.ndarray, valid: np.ndarray) -> None:
    broken = np.where(valid[..., None], surface, np.nan)
    result = evaluate_points(broken, broken, valid, 0.1)
    assert result.metrics == evaluate_points(surface, surface, valid, 0.1).metrics


def test_distances_by_hand() -> None:
    pred = np.array([[0.0, 0, 0], [10, 0, 0], [1, 1, 0]])
    gt = np.array([[0.0, 0, 0], [1, 0, 0]])
    assert distance_metrics(pred, gt) == DistanceMetrics(
        accuracy_mean=pytest.approx(10 / 3), accuracy_median=1.0, completion_mean=0.5, completion_median=0.5
    )
    assert completion_ratio(pred, gt, 1.0) == 0.5
    assert completion_ratio(pred, gt, 1.001) == 1.0


def test_normal_consistency_ignores_the_sign_of_normals(surface: np.ndarray) -> None:
    cloud = surface.reshape(-1, 3)
    metrics = point_metrics(cloud, cloud[::-1])
    assert metrics.nc1_mean == pytest.approx(1)
    assert metrics.nc2_median == pytest.approx(1)


def test_crossed_planes_have_no_normal_consistency(rng: np.random.Generator) -> None:
    flat = np.concatenate([rng.uniform(-1, 1, size=(400, 2)), np.zeros((400, 1))], axis=1)
    metrics = point_metrics(flat, flat[:, [0, 2, 1]])
    assert metrics.nc1_mean < 1e-6
    assert metrics.nc_mean == pytest.approx((metrics.nc1_mean + metrics.nc2_mean) / 2)


def test_mean_over_sequences() -> None:
    first, second = DistanceMetrics(1, 2, 3, 4), DistanceMetrics(3, 4, 5, 6)
    assert plain_mean([first, second]) == DistanceMetrics(2, 3, 4, 5)
    with pytest.raises(ValueError, match="results"):
        plain_mean([])


def test_thinning_keeps_evenly_spaced_valid_pixels(valid: np.ndarray) -> None:
    thin = thin_mask(valid, 100)
    assert thin.sum() == 100
    assert not (thin & ~valid).any()
    gaps = np.diff(np.flatnonzero(thin[valid]))
    assert gaps.max() - gaps.min() <= 1
    np.testing.assert_array_equal(thin_mask(valid, 10**9), valid)
    assert not thin_mask(np.zeros(5, dtype=bool), 3).any()


def test_refused_point_maps(surface: np.ndarray, valid: np.ndarray) -> None:
    with pytest.raises(ValueError, match="valid: needs at least 3"):
        evaluate_points(surface, surface, np.zeros_like(valid), 0.1)
    with pytest.raises(ValueError, match="pred: expected shape"):
        evaluate_points(surface[:1], surface, valid, 0.1)
    with pytest.raises(ValueError, match="gt: expected shape"):
        corresponding_points(surface[..., :2], surface[..., :2], valid)
    with pytest.raises(ValueError, match="pred at valid pixels"):
        evaluate_points(surface * np.nan, surface, valid, 0.1)
    with pytest.raises(ValueError, match="coincide"):
        evaluate_points(surface * 0, surface, valid, 0.1)
    with pytest.raises(ValueError, match="pred: needs at least 1"):
        point_metrics(np.zeros((0, 3)), np.zeros((4, 3)))


# ICP


def test_icp_finds_a_small_motion(surface: np.ndarray) -> None:
    target = surface.reshape(-1, 3)
    result = icp_point_to_point(moved(target, 0.5, 1, 0.005), target, max_distance=0.1)
    np.testing.assert_allclose(result.transform[:3, :3], rotation(0.5).T, atol=1e-5)
    assert result.inlier_rmse < 1e-5
    assert result.fitness == 1


def test_icp_is_rigid(surface: np.ndarray) -> None:
    target = surface.reshape(-1, 3)
    transform = icp_point_to_point(1.02 * target, target, max_distance=0.2).transform
    np.testing.assert_allclose(transform[:3, :3] @ transform[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(transform[:3, :3]) == pytest.approx(1)


def test_icp_without_correspondences_stays_at_the_identity() -> None:
    far = np.arange(12.0).reshape(4, 3)
    result = icp_point_to_point(far, far + 1000, max_distance=0.1)
    np.testing.assert_array_equal(result.transform, np.eye(4))
    assert (result.fitness, result.inlier_rmse) == (0, 0)


def test_fitness_is_a_share_of_the_source() -> None:
    source, target = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0]]), np.array([[0.0, 0, 0], [10, 0, 0.5]])
    result = icp_point_to_point(source, target, max_distance=1, max_iterations=0)
    assert result.fitness == pytest.approx(2 / 3)
    assert result.inlier_rmse == pytest.approx(np.sqrt(0.5**2 / 2))


def test_icp_distance_is_strict() -> None:
    cloud, one_away = np.array([[0.0, 0, 0], [10, 0, 0], [0, 10, 0]]), np.array([[1.0, 0, 0], [11, 0, 0], [1, 10, 0]])
    assert icp_point_to_point(cloud, one_away, max_distance=1.0, max_iterations=0).fitness == 0
    assert icp_point_to_point(cloud, one_away, max_distance=1.001, max_iterations=0).fitness == 1


def test_icp_stops_after_the_given_iterations(surface: np.ndarray) -> None:
    target = surface.reshape(-1, 3)
    source = moved(target, 4, 1, 0.05)
    once = icp_point_to_point(source, target, 0.3, max_iterations=1)
    more = icp_point_to_point(source, target, 0.3)
    assert more.inlier_rmse < once.inlier_rmse


@pytest.mark.parametrize("flat", [False, True], ids=["solid", "flat"])
def test_one_step_of_icp_is_the_least_squares_motion(rng: np.random.Generator, flat: bool) -> None:
    """With well separated points the correspondences are known, and roma's solver is the oracle."""
    grid = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), axis=-1).reshape(-1, 3)
    target = np.unique(grid * [1, 1, 0], axis=0) if flat else grid
    source = moved(target + 0.02 * rng.normal(size=target.shape), 2, 1, 0.05)
    step = icp_point_to_point(source, target, max_distance=0.5, max_iterations=1).transform
    rotation, translation = roma.rigid_points_registration(torch.from_numpy(source), torch.from_numpy(target))
    np.testing.assert_allclose(step[:3, :3], rotation, atol=1e-12)
    np.testing.assert_allclose(step[:3, 3], translation, atol=1e-12)


def test_a_mirrored_cloud_is_turned_and_not_mirrored_back(rng: np.random.Generator) -> None:
    target = rng.normal(size=(50, 3)) * [3, 2, 0.1]
    transform = icp_point_to_point(target * [1, 1, -1], target, max_distance=1).transform
    assert np.linalg.det(transform[:3, :3]) == pytest.approx(1)
    assert np.abs(apply_transform(transform, target * [1, 1, -1]) - target).max() > 0.01


@pytest.mark.parametrize("target", [[[1.0, 2, 3]] * 2, [[1.0, 2, 3], [1.1, 2, 3]]], ids=["one place", "one line"])
def test_a_rotation_that_the_points_leave_open_is_none(rng: np.random.Generator, target: list) -> None:
    source = np.array([1.0, 2, 3]) + 0.1 * rng.normal(size=(9, 3))
    transform = icp_point_to_point(source, np.array(target), max_distance=1, max_iterations=1).transform
    np.testing.assert_array_equal(transform[:3, :3], np.eye(3))
    assert np.abs(transform[:3, 3]).max() > 1e-3


def test_a_shared_cloud_and_threads_change_nothing(
    surface: np.ndarray, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gt = surface.reshape(-1, 3)
    shared = Cloud(gt)
    predictions = [gt + 0.02 * rng.normal(size=gt.shape) for _ in range(2)]
    together = [evaluate_correspondences(pred, shared, 0.1).metrics for pred in predictions]
    monkeypatch.setattr(registration, "POINTS_PER_THREAD", 10)
    alone = [evaluate_points(pred, gt, np.ones(len(gt), dtype=bool), 0.1).metrics for pred in predictions]
    assert together == alone


def test_refused_icp(surface: np.ndarray) -> None:
    cloud = surface.reshape(-1, 3)
    with pytest.raises(ValueError, match="max_distance"):
        icp_point_to_point(cloud, cloud, 0)
    with pytest.raises(ValueError, match="target"):
        icp_point_to_point(cloud, cloud[:0], 1)
    with pytest.raises(ValueError, match="source"):
        icp_point_to_point(cloud * np.inf, cloud, 1)


# Normals


def test_normals_of_a_sphere_are_radial(rng: np.random.Generator) -> None:
    directions = rng.normal(size=(5000, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    cosine = np.abs(np.sum(estimate_normals(4 * directions + [1, 2, 3]) * directions, axis=-1))
    assert cosine.min() > 0.99


def test_chunks_do_not_matter(surface: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = surface.reshape(-1, 3)
    whole = estimate_normals(cloud)
    monkeypatch.setattr(registration, "POINTS_PER_CHUNK", 64)
    np.testing.assert_array_equal(estimate_normals(cloud), whole)


def test_normals_of_a_tiny_cloud() -> None:
    triangle = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(np.abs(estimate_normals(triangle)), [[0, 0, 1]] * 3, atol=1e-12)
    with pytest.raises(ValueError, match="points: needs at least 3"):
        estimate_normals(triangle[:2])


def test_normal_angles_by_hand() -> None:
    gt = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 2], [0, 0, 0]])
    pred = torch.tensor([[0.0, 0, 3], [0, 1, 1], [0, 0, -1], [9, 9, 9]])
    result = normal_metrics(pred, gt, torch.tensor([True, True, True, False]))
    assert (result.mean_deg, result.median_deg, result.valid_pixels) == (pytest.approx(75), pytest.approx(45), 3)


def test_refused_normals() -> None:
    gt, valid = np.ones((2, 3)), np.array([True, True])
    with pytest.raises(ValueError, match="no valid pixel"):
        normal_metrics(gt, gt, ~valid)
    with pytest.raises(ValueError, match="pred: a normal at a valid pixel is zero"):
        normal_metrics(gt * 0, gt, valid)
    with pytest.raises(ValueError, match="gt at valid pixels"):
        normal_metrics(gt, gt * np.nan, valid)
    with pytest.raises(ValueError, match="valid: expected shape"):
        normal_metrics(gt, gt, valid[:1])
