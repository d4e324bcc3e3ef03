"""Rigid transforms as 4x4 matrices, batched over any leading dimensions.

A matrix named `a_to_b` maps coordinates in `a` to coordinates in `b`: `x_b = R x_a + t`.

Shape legend: ... any batch, S views, N or * any grid of points.
"""

import torch
from torch import Tensor


def small_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of small matrices (..., i, j) (..., j, k), spelled out so that neither autocast nor TF32 rounds it."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def length(vectors: Tensor) -> Tensor:
    """Euclidean norm over the last dimension: (..., d) -> (...), with gradient zero at the zero vector."""
    return torch.linalg.vector_norm(vectors, dim=-1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def expand_batch(matrix: Tensor, points: Tensor) -> Tensor:
    """Insert singleton dimensions so that a matrix (..., i, j) broadcasts over points (..., *, k).

    The leading dimensions of both are the batch; whatever lies between batch and coordinates is one grid per matrix.
    Raises ValueError when the matrix has more batch dimensions than the points.
    """
    grid = points.dim() - 1 - (matrix.dim() - 2)
    if grid < 0:
        raise ValueError(
            f"points: {tuple(points.shape)} has fewer batch dimensions than the matrix {tuple(matrix.shape)}; "
            "give points (..., *, k) for a matrix (..., i, j)"
        )
    return matrix.reshape(*matrix.shape[:-2], *(1,) * grid, *matrix.shape[-2:])


def rotate(rotation: Tensor, points: Tensor) -> Tensor:
    """Apply rotations (..., 3, 3) to points (..., *, 3): `R x`."""
    columns = expand_batch(rotation, points).unbind(-1)  # three of (..., 1, 3)
    x, y, z = points[..., 0:1], points[..., 1:2], points[..., 2:3]
    return x * columns[0] + y * columns[1] + z * columns[2]


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """The transform (..., 4, 4) with rotation (..., 3, 3) and translation (..., 3): `[R t; 0 1]`."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)  # (..., 3, 4)
    bottom = torch.eye(4, dtype=top.dtype, device=top.device)[3:]
    return torch.cat([top, bottom.expand(*top.shape[:-2], 1, 4)], dim=-2)


def invert_rigid(transform: Tensor) -> Tensor:
    """Inverse of a rigid transform (..., 4, 4): `[R' -R't; 0 1]`. The rotation must be orthonormal."""
    rotation = transform[..., :3, :3].mT
    return rigid(rotation, -rotate(rotation, transform[..., :3, 3]))


def apply_rigid(transform: Tensor, points: Tensor) -> Tensor:
    """Apply transforms (..., 4, 4) to points (..., *, 3): `R x + t`."""
    translation = expand_batch(transform[..., :3, 3:], points)[..., 0]
    return rotate(transform[..., :3, :3], points) + translation


def relative_cam(cam_to_world: Tensor) -> Tensor:
    """All relative poses of a set of views.

    `rel_cam[i, j] = inv(cam_to_world[i]) cam_to_world[j]` maps camera j to camera i (G2VLM eq. 4, subscript i <- j).

    Args:
        cam_to_world: (..., S, 4, 4).

    Returns:
        (..., S, S, 4, 4).
    """
    world_to_cam = invert_rigid(cam_to_world)
    return small_matmul(world_to_cam[..., :, None, :, :], cam_to_world[..., None, :, :, :])
