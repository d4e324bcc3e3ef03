"""Properties of the pose and trajectory metrics, and inputs they must refuse."""

from dataclasses import astuple

import numpy as np
import pytest
import roma
import torch

from geometry.metrics.poses import (
    RELATIVE_POSES,
    PairErrors,
    accuracy_auc,
    mean_pose_metrics,
    pair_errors,
    pool_pairs,
    pose_metrics,
    rotation_errors_deg,
    trajectory_metrics,
    translation_errors_deg,
    view_pairs,
)

NUM_VIEWS = 8


@pytest.fixture
def poses() -> np.ndarray:
    """Random rigid transforms (8, 4, 4)."""
    generator = np.random.default_rng(11)
    transforms = np.tile(np.eye(4), (NUM_VIEWS, 1, 1))
    transforms[:, :3, :3] = roma.rotvec_to_rotmat(torch.from_numpy(generator.normal(size=(NUM_VIEWS, 3)))).numpy()
    transforms[:, :3, 3] = generator.normal(size=(NUM_VIEWS, 3))
    return transforms


def rotation_about_x(degrees: float) -> np.ndarray:
    return roma.rotvec_to_rotmat(torch.tensor([np.radians(degrees), 0, 0], dtype=torch.float64)).numpy()


def moved_world(cam_to_world: np.ndarray, scale: float) -> np.ndarray:
    """The same cameras after a similarity of the world."""
    similar = cam_to_world.copy()
    similar[:, :3, :3] = rotation_about_x(50) @ cam_to_world[:, :3, :3]
    similar[:, :3, 3] = scale * cam_to_world[:, :3, 3] @ rotation_about_x(50).T + [1, -2, 3]
    return similar


def errors(*degrees: float) -> PairErrors:
    values = np.array(degrees)
    return PairErrors(values, values / 2, np.zeros(len(values), dtype=bool))


# Pairs


@pytest.mark.parametrize("convention", RELATIVE_POSES)
def test_perfect_poses(poses: np.ndarray, convention: str) -> None:
    metrics = pose_metrics(pair_errors(poses, poses, RELATIVE_POSES[convention]))
    assert set(metrics.rra.values()) == set(metrics.rta.values()) == set(metrics.auc.values()) == {100}
    assert metrics.num_pairs == NUM_VIEWS * (NUM_VIEWS - 1) / 2


@pytest.mark.parametrize("convention", RELATIVE_POSES)
def test_world_frame_and_scale_do_not_matter(poses: np.ndarray, convention: str) -> None:
    similar = np.linalg.inv(moved_world(np.linalg.inv(poses), scale=7))
    result = pair_errors(similar, poses, RELATIVE_POSES[convention])
    assert max(result.rotation_deg.max(), result.translation_deg.max()) < 1e-5


def test_order_of_views_does_not_change_rotation_accuracy(poses: np.ndarray) -> None:
    noisy = poses.copy()
    noisy[::2, :3, :3] = rotation_about_x(9) @ noisy[::2, :3, :3]
    order = np.random.default_rng(0).permutation(NUM_VIEWS)
    plain, shuffled = pair_errors(noisy, poses), pair_errors(noisy[order], poses[order])
    np.testing.assert_allclose(np.sort(plain.rotation_deg), np.sort(shuffled.rotation_deg), atol=1e-9)


def test_conventions_agree_on_rotations_only(poses: np.ndarray) -> None:
    noisy = poses.copy()
    noisy[0, :3, :3] = rotation_about_x(20) @ noisy[0, :3, :3]
    pi3, vggt = (pair_errors(noisy, poses, RELATIVE_POSES[name]) for name in ("pi3", "vggt"))
    np.testing.assert_allclose(pi3.rotation_deg, vggt.rotation_deg, atol=1e-9)
    assert np.abs(pi3.translation_deg - vggt.translation_deg).max() > 1


@pytest.mark.parametrize("degrees", [0.5, 20, 90, 179, 180])
def test_rotation_error_is_the_angle(degrees: float) -> None:
    given = rotation_errors_deg(rotation_about_x(degrees)[None], np.eye(3)[None])
    np.testing.assert_allclose(given, degrees, atol=1e-6)


def test_translation_error_ignores_length_and_sign() -> None:
    x, y = np.array([[1.0, 0, 0]]), np.array([[0.0, 3, 0]])
    assert translation_errors_deg(x, -5 * x)[0] < 1e-5
    assert translation_errors_deg(x, y)[0] == pytest.approx(90)
    assert translation_errors_deg(x, x + y / 3)[0] == pytest.approx(45)


def test_pairs_without_baseline_count_and_are_reported(poses: np.ndarray) -> None:
    cam_to_world = np.linalg.inv(poses)
    cam_to_world[1, :3, 3] = cam_to_world[0, :3, 3]
    result = pair_errors(poses, np.linalg.inv(cam_to_world))
    np.testing.assert_array_equal(np.flatnonzero(result.zero_baseline), [0])
    metrics = pose_metrics(result)
    assert metrics.num_zero_baseline == 1
    assert metrics.num_pairs == len(view_pairs(NUM_VIEWS))


def test_auc_is_the_histogram_rule() -> None:
    assert accuracy_auc(np.array([0.5]), 30) == pytest.approx(100)
    assert accuracy_auc(np.array([29.5]), 30) == pytest.approx(100 / 30)
    assert accuracy_auc(np.array([30.0]), 30) == pytest.approx(100 / 30)  # the last bin is closed
    assert accuracy_auc(np.array([1.0]), 2) == pytest.approx(50)  # bins are open on the right
    assert accuracy_auc(np.array([30.1]), 30) == 0


def test_accuracy_is_strict() -> None:
    metrics = pose_metrics(errors(5.0, 4.9, 40.0), thresholds=[5, 30], auc_limits=[30])
    assert metrics.rra[5] == pytest.approx(100 / 3)
    assert metrics.rra[30] == pytest.approx(200 / 3)
    assert metrics.rta[30] == 100


def test_pooling_differs_from_averaging() -> None:
    first, second = errors(1.0, 1.0, 1.0), errors(40.0)
    pooled = pose_metrics(pool_pairs([first, second]))
    averaged = mean_pose_metrics([pose_metrics(first), pose_metrics(second)])
    assert pooled.rra[15] == 75
    assert averaged.rra[15] == 50
    assert averaged.num_pairs == pooled.num_pairs == 4


def test_refused_poses(poses: np.ndarray) -> None:
    with pytest.raises(ValueError, match="gt: needs at least 2 views"):
        pair_errors(poses[:1], poses[:1])
    with pytest.raises(ValueError, match="pred: 7 views"):
        pair_errors(poses[:7], poses)
    with pytest.raises(ValueError, match="gt: expected shape"):
        pair_errors(poses, poses[:, :3])
    with pytest.raises(ValueError, match=r"pred: .* NaN"):
        pair_errors(poses * np.nan, poses)
    for combine in (pool_pairs, mean_pose_metrics):
        with pytest.raises(ValueError, match="at least one"):
            combine([])


# Trajectories


def test_trajectory_up_to_a_similarity_is_perfect(poses: np.ndarray) -> None:
    result = trajectory_metrics(torch.from_numpy(moved_world(poses, scale=0.3)), poses)
    np.testing.assert_allclose(astuple(result), 0, atol=1e-9)


def test_similarity_of_the_prediction_does_not_matter(poses: np.ndarray) -> None:
    noisy = poses.copy()
    noisy[:, :3, 3] += 0.1 * np.random.default_rng(2).normal(size=(NUM_VIEWS, 3))
    plain, other = trajectory_metrics(noisy, poses), trajectory_metrics(moved_world(noisy, scale=5), poses)
    np.testing.assert_allclose(astuple(other), astuple(plain), rtol=1e-9, atol=1e-12)
    assert plain.ate > 0.01


def test_errors_carry_the_unit_of_the_truth(poses: np.ndarray) -> None:
    noisy = poses.copy()
    noisy[:, :3, 3] += 0.1 * np.random.default_rng(2).normal(size=(NUM_VIEWS, 3))
    doubled = poses.copy()
    doubled[:, :3, 3] *= 2
    once, twice = trajectory_metrics(noisy, poses), trajectory_metrics(noisy, doubled)
    assert twice.ate == pytest.approx(2 * once.ate)
    assert twice.rpe_rotation_deg == pytest.approx(once.rpe_rotation_deg, abs=1e-9)


def test_one_turned_camera_shows_in_two_steps(poses: np.ndarray) -> None:
    turned = poses.copy()
    turned[3, :3, :3] = turned[3, :3, :3] @ rotation_about_x(10)
    result = trajectory_metrics(turned, poses)
    assert result.ate == pytest.approx(0, abs=1e-9)
    assert result.rpe_rotation_deg == pytest.approx(np.sqrt(2 * 10**2 / (NUM_VIEWS - 1)))


def test_refused_trajectories(poses: np.ndarray) -> None:
    with pytest.raises(ValueError, match="gt: needs at least 3 views"):
        trajectory_metrics(poses[:2], poses[:2])
    with pytest.raises(ValueError, match="pred: 7 views"):
        trajectory_metrics(poses[:7], poses)
    with pytest.raises(ValueError, match="coincide"):
        trajectory_metrics(np.tile(np.eye(4), (NUM_VIEWS, 1, 1)), poses)
    with pytest.raises(ValueError, match=r"gt: .* NaN"):
        trajectory_metrics(poses, poses * np.nan)
