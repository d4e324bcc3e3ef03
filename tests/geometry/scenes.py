"""Random cameras and scenes for the property tests."""

from dataclasses import replace

import roma
import torch
from torch import Tensor

from geometry import (
    GeometryPrediction,
    GeometryTargets,
    apply_rigid,
    normals_from_points,
    rigid,
    unproject,
)

BATCHES = [(), (2,), (2, 3)]


def random_poses(*shape: int, angle: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rigid transforms (*shape, 4, 4) with rotation vectors of about `angle` radians."""
    rotation = roma.rotvec_to_rotmat(angle * torch.randn(*shape, 3, dtype=dtype) / 3**0.5)
    return rigid(rotation, torch.randn(*shape, 3, dtype=dtype))


def intrinsics(height: int, width: int, focal: float = 1.2, dtype: torch.dtype = torch.float64) -> Tensor:
    """K (3, 3) with the principal point at the image centre and `focal` in units of the width."""
    f = focal * width
    return torch.tensor([[f, 0, (width - 1) / 2], [0, f, (height - 1) / 2], [0, 0, 1]], dtype=dtype)


def random_targets(
    *batch: int,
    views: int = 3,
    size: tuple[int, int] = (5, 6),
    invalid: float = 0.2,
    dtype: torch.dtype = torch.float64,
) -> GeometryTargets:
    """Smooth surfaces seen by nearby cameras, expressed in an arbitrary world; some pixels invalid."""
    height, width = size
    depth = 2 + 0.02 * torch.rand(*batch, views, height, width, dtype=dtype)
    local = unproject(depth, intrinsics(height, width, dtype=dtype))
    cam_to_world = random_poses(*batch, 1, dtype=dtype) @ random_poses(*batch, views, angle=0.3, dtype=dtype)
    valid = torch.rand(*batch, views, height, width) > invalid
    enabled = torch.ones(batch, dtype=torch.bool)
    return GeometryTargets(apply_rigid(cam_to_world, local), cam_to_world, valid, enabled)


def perfect_prediction(targets: GeometryTargets) -> GeometryPrediction:
    """The prediction that equals the targets."""
    world_to_cam = torch.linalg.inv(targets.cam_to_world)
    local = apply_rigid(world_to_cam, targets.world_points)
    global_points = apply_rigid(world_to_cam[..., 0, :, :], targets.world_points)
    normals, _ = normals_from_points(local, torch.ones_like(targets.valid))
    return GeometryPrediction(local, targets.cam_to_world, normals, global_points, torch.zeros_like(local[..., 0]))


def noisy_prediction(targets: GeometryTargets, noise: float = 0.1, scale: float = 0.6) -> GeometryPrediction:
    """A wrong prediction in its own world and scale, with gradients on every field."""
    perfect = perfect_prediction(targets)
    shape, dtype = targets.valid.shape, perfect.local_points.dtype
    error = random_poses(*shape[:-2], angle=noise, dtype=dtype)
    error[..., :3, 3] *= noise
    cam_to_world = random_poses(*shape[:-3], 1, dtype=dtype) @ perfect.cam_to_world @ error
    cam_to_world[..., :3, 3] *= scale

    def jitter(x: Tensor) -> Tensor:
        return scale * (x + noise * torch.randn_like(x))

    assert perfect.global_points is not None
    prediction = GeometryPrediction(
        jitter(perfect.local_points),
        cam_to_world,
        torch.nn.functional.normalize(perfect.normals + noise * torch.randn_like(perfect.normals), dim=-1),
        jitter(perfect.global_points),
        torch.randn(shape, dtype=dtype),
    )
    return with_gradients(prediction)


def with_gradients(prediction: GeometryPrediction) -> GeometryPrediction:
    """Copy whose fields are fresh leaves that require gradients."""
    return replace(prediction, **{name: t.detach().clone().requires_grad_() for name, t in leaves(prediction).items()})


def leaves(prediction: GeometryPrediction) -> dict[str, Tensor]:
    """The tensors of a prediction by name."""
    return {name: value for name, value in vars(prediction).items() if isinstance(value, Tensor)}
