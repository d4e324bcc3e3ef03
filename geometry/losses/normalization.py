"""Targets and predictions of the geometry loss in one frame and unit, its pixel weights and its optimal scale.

Shape legend: ... any batch (usually B samples), S views, H W pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from geometry.alignment import align_points_scale, sample_valid
from geometry.losses.masked import mean_distance
from geometry.transforms import apply_rigid, invert_rigid, small_matmul
from geometry.types import GeometryPrediction, TensorFields, expect_bool, expect_shape, expect_trailing

ALIGNMENT_SAMPLES = 4096  # valid pixels per sample that the scale is fitted to


@dataclass(frozen=True, eq=False)
class GeometryTargets(TensorFields):
    """Ground truth of one batch of scenes, in any world frame and at any scale.

    Attributes:
        world_points: (..., S, H, W, 3); anything, NaN included, at invalid pixels.
        cam_to_world: (..., S, 4, 4), OpenCV axes.
        valid: (..., S, H, W) bool, True = use.
        normal_enabled: (...) bool, whether the sample's depth is good enough for normal terms.
        sky: (..., S, H, W) bool, pixels that should have no confidence.
        normals: (..., S, H, W, 3) exact unit normals in the camera frame, for the normal head; without them the
            normals of the true points are used.
    """

    world_points: Tensor
    cam_to_world: Tensor
    valid: Tensor
    normal_enabled: Tensor
    sky: Tensor | None = None
    normals: Tensor | None = None

    def __post_init__(self) -> None:
        expect_trailing("world_points", self.world_points, (None, None, None, 3))
        *batch, views, height, width, _ = self.world_points.shape
        expect_shape("cam_to_world", self.cam_to_world, *batch, views, 4, 4)
        expect_shape("valid", self.valid, *batch, views, height, width)
        expect_shape("normal_enabled", self.normal_enabled, *batch)
        expect_shape("sky", self.sky, *batch, views, height, width)
        expect_shape("normals", self.normals, *batch, views, height, width, 3)
        for field in ("valid", "normal_enabled", "sky"):
            expect_bool(field, getattr(self, field))


@dataclass(frozen=True, eq=False)
class NormalizedTargets(TensorFields):
    """Targets in the first view's camera frame, with mean point distance one.

    Attributes:
        local_points: (..., S, H, W, 3).
        global_points: (..., S, H, W, 3), the world points in the first view's frame.
        cam_to_world: (..., S, 4, 4), "world" being the first view's frame.
        divisor: (...) the mean distance that was divided out.
    """

    local_points: Tensor
    global_points: Tensor
    cam_to_world: Tensor
    divisor: Tensor


def normalize_targets(targets: GeometryTargets) -> NormalizedTargets:
    """Ground truth in the first view's camera frame, divided by the mean distance of the valid points to its origin.

    Non-finite points at invalid pixels become zero first; a non-finite valid point stays, so that the loss shows it.
    A sample without valid pixels has divisor 1.
    """
    usable = targets.valid[..., None] | targets.world_points.isfinite()
    world_to_first = invert_rigid(targets.cam_to_world[..., 0, :, :])  # (..., 4, 4)
    points = apply_rigid(world_to_first, torch.where(usable, targets.world_points, 0))
    cam_to_first = small_matmul(world_to_first[..., None, :, :], targets.cam_to_world)
    divisor = mean_distance(points, targets.valid)
    points = points / divisor[..., None, None, None, None]
    cam_to_first = scale_translations(cam_to_first, 1 / divisor)
    local_points = apply_rigid(invert_rigid(cam_to_first), points)
    return NormalizedTargets(local_points, points, cam_to_first, divisor)


def normalize_prediction(prediction: GeometryPrediction, valid: Tensor) -> GeometryPrediction:
    """Points and translations divided by the mean norm of the local points at valid pixels (..., S, H, W).

    Gradient flows through the divisor, so the result does not depend on the prediction's scale.
    """
    divisor = mean_distance(prediction.local_points, valid)
    per_point = divisor[..., None, None, None, None]
    global_points = prediction.global_points
    return replace(
        prediction,
        local_points=prediction.local_points / per_point,
        cam_to_world=scale_translations(prediction.cam_to_world, 1 / divisor),
        global_points=None if global_points is None else global_points / per_point,
    )


def scale_translations(poses: Tensor, scale: Tensor) -> Tensor:
    """Poses (..., S, 4, 4) with each sample's translations multiplied by its scale (...)."""
    moved = poses[..., :3, 3:] * scale[..., None, None, None]
    return torch.cat([torch.cat([poses[..., :3, :3], moved], dim=-1), poses[..., 3:, :]], dim=-2)


def depth_weights(depth: Tensor, valid: Tensor, floor: float) -> Tensor:
    """Weight of each pixel: 1 / (max(z, floor * mean valid z of its view) + 1e-6), and 0 where invalid.

    Args:
        depth, valid: (..., S, H, W).
        floor: fraction of the view's mean depth below which weights stop growing.

    Returns:
        (..., S, H, W).
    """
    depth = torch.where(valid, depth, 0)
    mean = depth.sum((-2, -1)) / valid.sum((-2, -1)).clamp_min(1)  # (..., S)
    weight = 1 / (torch.maximum(depth, floor * mean[..., None, None]) + 1e-6)
    return torch.where(valid, weight, 0)


@torch.no_grad()
def optimal_scale(
    points: Tensor, target: Tensor, weight: Tensor, valid: Tensor, samples: int = ALIGNMENT_SAMPLES
) -> Tensor:
    """One scale per sample that takes predicted to true local points: argmin_s sum w |s x_pred - x| (G2VLM s*).

    It is fitted to evenly spread valid pixels of all views together (`alignment.sample_valid`); a negative scale loses
    its sign. No gradient flows through it.

    Args:
        points, target: (..., S, H, W, 3).
        weight, valid: (..., S, H, W).
        samples: how many pixels to fit to.

    Returns:
        (...); 1 for a sample without valid pixels.
    """
    index, any_valid = sample_valid(valid.flatten(-3), samples)  # (..., n)

    def pick(points: Tensor) -> Tensor:
        return points.flatten(-4, -2).gather(-2, index[..., None].expand(*index.shape, 3))

    picked_weight = weight.flatten(-3).gather(-1, index)
    scale = align_points_scale(pick(points), pick(target), torch.where(any_valid[..., None], picked_weight, 0))
    return scale.abs()
