"""Camera pose metrics: relative-pose accuracy (RRA, RTA, AUC) and trajectory error (ATE, RPE).

Everything runs in float64: translations of some benchmarks are so small that float32 moves the result.

Shapes: N views, P = N (N-1) / 2 unordered pairs i < j. Poses are 4x4, OpenCV axes; each function says which direction.
"""

# roma has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import roma
import torch

from geometry.arrays import ArrayLike, BoolArray, FloatArray, IntArray, finite_array
from geometry.registration import apply_similarity, fit_similarity
from geometry.transforms import invert_rigid

SMALLEST_SQUARE = 1e-15  # the peers' floor on squared sines, and on the norm of a translation


# Relative poses of a pair: (w2c_i (P, 4, 4), w2c_j (P, 4, 4)) -> (P, 4, 4). Rotation errors agree, translation errors
# do not: the direction between two cameras is expressed in one of them.


def first_to_second(first: FloatArray, second: FloatArray) -> FloatArray:
    """Camera i -> camera j: w2c_j inv(w2c_i); pi3 and G2VLM."""
    return second @ _invert_rigid(first)


def second_to_first(first: FloatArray, second: FloatArray) -> FloatArray:
    """Camera j -> camera i: w2c_i inv(w2c_j); VGGT."""
    return first @ _invert_rigid(second)


RelativePose: TypeAlias = Callable[[FloatArray, FloatArray], FloatArray]
RELATIVE_POSES: dict[str, RelativePose] = {"pi3": first_to_second, "vggt": second_to_first}


@dataclass(frozen=True)
class PairErrors:
    """Errors of pairs of views.

    Attributes:
        rotation_deg: (P,) angle between predicted and true relative rotation, 0..180.
        translation_deg: (P,) angle between the translation lines (sign-free), 0..90.
        zero_baseline: (P,) True where both true cameras are at one place; the translation error of such a pair is
            round-off noise, yet it counts, as in the peers' code.
    """

    rotation_deg: FloatArray
    translation_deg: FloatArray
    zero_baseline: BoolArray


@dataclass(frozen=True)
class PoseMetrics:
    """Relative-pose accuracies in percent, keyed by the threshold in degrees.

    Attributes:
        rra: share of pairs with a rotation error below the threshold.
        rta: the same for translation directions.
        auc: area under the accuracy curve of the larger of the two errors, up to the threshold.
        num_pairs: pairs behind the numbers.
        num_zero_baseline: pairs without a true baseline among them.
    """

    rra: dict[int, float]
    rta: dict[int, float]
    auc: dict[int, float]
    num_pairs: int
    num_zero_baseline: int


@dataclass(frozen=True)
class TrajectoryMetrics:
    """Root mean squares after Sim(3) alignment: positions and steps in the unit of the truth, rotations in degrees."""

    ate: float
    rpe_translation: float
    rpe_rotation_deg: float


def view_pairs(num_views: int) -> IntArray:
    """All pairs i < j of views, (P, 2), ordered by i, then j."""
    return np.stack(np.triu_indices(num_views, k=1), axis=-1)


def pair_errors(pred: ArrayLike, gt: ArrayLike, relative: RelativePose = first_to_second) -> PairErrors:
    """Errors of the relative poses of all pairs of one sequence.

    Args:
        pred: (N, 4, 4) predicted `world_to_cam`, N >= 2.
        gt: (N, 4, 4) true `world_to_cam`.
        relative: one of `RELATIVE_POSES`.

    Raises:
        ValueError: shapes differ, there is a single view, or a value is not finite.
    """
    true_pose = _poses(gt, "gt", least=2)
    predicted = _poses(pred, "pred", least=2)
    if len(predicted) != len(true_pose):
        raise ValueError(f"pred: {len(predicted)} views, gt has {len(true_pose)}")
    i, j = view_pairs(len(true_pose)).T
    rel_pred, rel_gt = relative(predicted[i], predicted[j]), relative(true_pose[i], true_pose[j])  # (P, 4, 4)
    reach = np.linalg.norm(true_pose[:, :3, 3], axis=-1)  # (N,)
    round_off = 16 * np.finfo(np.float64).eps * (reach[i] + reach[j])
    return PairErrors(
        rotation_deg=rotation_errors_deg(rel_pred[:, :3, :3], rel_gt[:, :3, :3]),
        translation_deg=translation_errors_deg(rel_pred[:, :3, 3], rel_gt[:, :3, 3]),
        zero_baseline=np.linalg.norm(rel_gt[:, :3, 3], axis=-1) <= round_off,
    )


def rotation_errors_deg(pred: FloatArray, gt: FloatArray) -> FloatArray:
    """Angles (P,) between rotations (P, 3, 3): arccos(1 - 2 e) with e = 1 - (q . q')^2 >= 1e-15, q unit quaternions."""
    cosine = np.sum(_quaternions(pred) * _quaternions(gt), axis=-1)  # of half the angle
    squared_sine = np.maximum(1 - cosine**2, SMALLEST_SQUARE)
    return np.degrees(np.arccos(1 - 2 * squared_sine))


def translation_errors_deg(pred: FloatArray, gt: FloatArray) -> FloatArray:
    """Angles (P,), 0..90, between the lines of translations (P, 3): arccos sqrt(1 - e), e = 1 - (t . t')^2 >= 1e-15."""
    cosine = np.sum(_unit(pred) * _unit(gt), axis=-1)
    squared_sine = np.maximum(1 - cosine**2, SMALLEST_SQUARE)
    return np.degrees(np.arccos(np.sqrt(1 - squared_sine)))


def pool_pairs(sequences: Sequence[PairErrors]) -> PairErrors:
    """The pairs of all sequences together, as pi3 and G2VLM score a dataset, and VGGT a category.

    Raises:
        ValueError: there is no sequence.
    """
    if not sequences:
        raise ValueError("sequences: needs at least one")
    return PairErrors(
        np.concatenate([errors.rotation_deg for errors in sequences]),
        np.concatenate([errors.translation_deg for errors in sequences]),
        np.concatenate([errors.zero_baseline for errors in sequences]),
    )


def pose_metrics(
    errors: PairErrors, thresholds: Sequence[int] = (5, 15, 30), auc_limits: Sequence[int] = (3, 5, 15, 30)
) -> PoseMetrics:
    """RRA and RTA (strictly below each of `thresholds`) and AUC (up to each of `auc_limits`), degrees -> percent."""
    larger = np.maximum(errors.rotation_deg, errors.translation_deg)
    return PoseMetrics(
        rra={k: 100 * float(np.mean(errors.rotation_deg < k)) for k in thresholds},
        rta={k: 100 * float(np.mean(errors.translation_deg < k)) for k in thresholds},
        auc={k: accuracy_auc(larger, k) for k in auc_limits},
        num_pairs=len(larger),
        num_zero_baseline=int(np.count_nonzero(errors.zero_baseline)),
    )


def accuracy_auc(errors_deg: FloatArray, limit: int) -> float:
    """Mean over the integers b = 1..limit of the share of errors (P,) below b, in percent.

    The numpy-histogram rule of the peers (bins 0, 1, ..., limit, the last closed on the right), not a trapezoid.
    """
    counts, _ = np.histogram(errors_deg, bins=np.arange(limit + 1))
    return 100 * float(np.mean(np.cumsum(counts / len(errors_deg))))


def mean_pose_metrics(groups: Sequence[PoseMetrics]) -> PoseMetrics:
    """Plain mean of every accuracy over groups (VGGT's mean over categories); pair counts add up.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("groups: needs at least one")
    return PoseMetrics(
        rra=_mean_by_key([group.rra for group in groups]),
        rta=_mean_by_key([group.rta for group in groups]),
        auc=_mean_by_key([group.auc for group in groups]),
        num_pairs=sum(group.num_pairs for group in groups),
        num_zero_baseline=sum(group.num_zero_baseline for group in groups),
    )


def trajectory_metrics(pred: ArrayLike, gt: ArrayLike) -> TrajectoryMetrics:
    """ATE and RPE (step of one view) after aligning the predicted positions to the true ones by a Sim(3) (Umeyama).

    With aligned poses P'_i = [R R_i, s R p_i + t] and E_i = inv(inv(G_i) G_{i+1}) inv(P'_i) P'_{i+1}: ATE is the rms of
    |p'_i - g_i|, RPE the rms of the translation, and of the angle, of E_i. Equals evo's `ape` and `rpe` with align and
    correct_scale.

    Args:
        pred: (N, 4, 4) predicted `cam_to_world`, N >= 3.
        gt: (N, 4, 4) true `cam_to_world`, in the same order.

    Raises:
        ValueError: shapes differ, fewer than three views, a value is not finite, or all predicted positions coincide.
    """
    true_pose = _poses(gt, "gt", least=3)
    predicted = _poses(pred, "pred", least=3)
    if len(predicted) != len(true_pose):
        raise ValueError(f"pred: {len(predicted)} views, gt has {len(true_pose)}")
    aligned = _align_positions(predicted, true_pose)
    step_error = _invert_rigid(_steps(true_pose)) @ _steps(aligned)  # (N-1, 4, 4)
    return TrajectoryMetrics(
        ate=_rms(np.linalg.norm(aligned[:, :3, 3] - true_pose[:, :3, 3], axis=-1)),
        rpe_translation=_rms(np.linalg.norm(step_error[:, :3, 3], axis=-1)),
        rpe_rotation_deg=_rms(np.degrees(_rotation_angles(step_error[:, :3, :3]))),
    )


def _align_positions(pred: FloatArray, gt: FloatArray) -> FloatArray:
    """cam_to_world (N, 4, 4) moved by the Sim(3) between the camera positions; rotations stay rotations."""
    similarity = fit_similarity(pred[:, :3, 3], gt[:, :3, 3])
    aligned = pred.copy()
    aligned[:, :3, :3] = similarity.rotation.numpy() @ pred[:, :3, :3]
    aligned[:, :3, 3] = apply_similarity(similarity, pred[:, :3, 3])
    return aligned


def _steps(cam_to_world: FloatArray) -> FloatArray:
    """Pose of each next camera in the one before, (N-1, 4, 4)."""
    return _invert_rigid(cam_to_world[:-1]) @ cam_to_world[1:]


def _rotation_angles(rotations: FloatArray) -> FloatArray:
    """Radians (P,), accurate near 0 and pi."""
    return np.linalg.norm(roma.rotmat_to_rotvec(torch.from_numpy(rotations)).numpy(), axis=-1)


def _quaternions(rotations: FloatArray) -> FloatArray:
    return roma.rotmat_to_unitquat(torch.from_numpy(rotations)).numpy()  # (P, 4), x y z w


def _invert_rigid(transforms: FloatArray) -> FloatArray:
    return invert_rigid(torch.from_numpy(transforms)).numpy()


def _unit(vectors: FloatArray) -> FloatArray:
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + SMALLEST_SQUARE)


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _mean_by_key(rows: Sequence[dict[int, float]]) -> dict[int, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _poses(value: ArrayLike, name: str, least: int) -> FloatArray:
    poses = finite_array(value, name, ("N", 4, 4))
    if len(poses) < least:
        raise ValueError(f"{name}: needs at least {least} views, given {len(poses)}")
    return poses
