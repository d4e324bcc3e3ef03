"""Ray maps: the line of sight of every pixel, in world coordinates.

A ray map holds `[origin(3), direction(3)]` per pixel: the camera centre, and `R K^-1 (u, v, 1)` with R camera to world.
Directions are not normalised, so that `origin + depth * direction` lies on the surface for z-depth (SpatialSV eq. 8).

Depth-Anything-3 writes the direction first, and its cameras live on an image plane of size 2 x 2 whose h x w cells are
sampled at their centres, x = 1/w, 3/w, ..., 2 - 1/w. Channel order and intrinsics are converted here and nowhere else.

Shape legend: ... any batch, H W pixels, V the batch flattened, N the pixels flattened.
"""

# torch.linalg is only partly typed.
# pyright: reportUnknownMemberType=false

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.cameras import (
    half_pixel_to_integer_grid,
    integer_grid_to_half_pixel,
    pinhole,
    pixel_grid,
    ray_directions,
    resize_intrinsics,
)
from geometry.transforms import expand_batch, length, rigid, rotate


def make_ray_map(cam_to_world: Tensor, K: Tensor, height: int, width: int) -> Tensor:
    """Rays of every pixel of a camera in the world frame.

    Args:
        cam_to_world: (..., 4, 4).
        K: intrinsics (..., 3, 3) for an image of this size.
        height, width: of the map, in pixels.

    Returns:
        (..., H, W, 6), origin then direction.
    """
    direction = rotate(cam_to_world[..., :3, :3], ray_directions(K, height, width))
    origin = expand_batch(cam_to_world[..., :3, 3:], direction)[..., 0].expand_as(direction)
    return torch.cat([origin, direction], dim=-1)


def points_from_rays(ray_map: Tensor, depth: Tensor) -> Tensor:
    """World points (..., H, W, 3) of a ray map (..., H, W, 6) and its z-depth (..., H, W)."""
    return ray_map[..., :3] + depth[..., None] * ray_map[..., 3:]


def ray_map_from_direction_first(rays: Tensor) -> Tensor:
    """Depth-Anything-3's channels `[direction, origin]` (..., 6) as ours, `[origin, direction]`."""
    return rays.roll(3, dims=-1)


def ray_map_to_direction_first(ray_map: Tensor) -> Tensor:
    """Our channels `[origin, direction]` (..., 6) as Depth-Anything-3's, `[direction, origin]`."""
    return ray_map.roll(3, dims=-1)


def intrinsics_from_plane(K: Tensor, height: int, width: int) -> Tensor:
    """Intrinsics (..., 3, 3) on the 2 x 2 image plane as intrinsics for a map of `height` x `width` pixels."""
    return resize_intrinsics(half_pixel_to_integer_grid(K), (2, 2), (height, width))


def intrinsics_to_plane(K: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `intrinsics_from_plane`."""
    return integer_grid_to_half_pixel(resize_intrinsics(K, (height, width), (2, 2)))


@dataclass(frozen=True)
class RayFit:
    """How `camera_from_rays` resists wrong rays (RANSAC).

    Args:
        hypotheses: homographies tried, each from a few rays; none means a fit to all rays.
        rays: of a hypothesis, drawn with replacement by their confidence; four different ones decide a homography.
        max_angle: between a ray and the homography's for the ray to support it, radians.
        seed: of the draws.
    """

    hypotheses: int = 64
    rays: int = 8
    max_angle: float = 0.1
    seed: int = 0


@torch.no_grad()
def camera_from_rays(
    ray_map: Tensor, confidence: Tensor | None = None, fit: RayFit | None = None
) -> tuple[Tensor, Tensor]:
    """The camera that a ray map comes from, exact for the rays of a pinhole camera without skew.

    The centre is the confidence-weighted mean origin. Directions are `H (u, v, 1)` up to length with H = R K^-1: the
    homography is fitted linearly to the rays that support the best of several hypotheses, and split into a rotation and
    an upper triangular matrix. Rays count by their confidence throughout; rays that are not finite count nothing.

    Args:
        ray_map: (..., H, W, 6), origin then direction of any length.
        confidence: (..., H, W), zero or more; None means all rays alike.
        fit: how hypotheses are drawn and judged; None means `RayFit()`.

    Returns:
        cam_to_world (..., 4, 4) and K (..., 3, 3) in pixels of the map, without gradient, in float32, or float64 for
        float64 input. They are NaN for a view in which no ray counts.
    """
    batch, (height, width) = ray_map.shape[:-3], ray_map.shape[-3:-1]
    rays = ray_map.reshape(-1, height * width, 6).double()  # (V, N, 6)
    weight = torch.ones_like(rays[..., 0]) if confidence is None else confidence.reshape(rays.shape[:2]).double()
    weight = torch.where(rays.isfinite().all(-1), weight, 0)  # (V, N)
    rays = torch.where(weight[..., None] > 0, rays, 0)
    seen = weight.sum(-1) > 0  # (V,)

    centre = (weight[..., None] * rays[..., :3]).sum(1) / weight.sum(-1, keepdim=True)  # NaN where nothing is seen
    plane = _plane_positions(height, width).to(rays)  # (N, 3)
    direction = F.normalize(rays[..., 3:], dim=-1)
    homography = _robust_homography(direction, plane, weight, fit or RayFit())
    rotation, on_plane = _split_homography(homography)
    pose = rigid(rotation, centre).where(seen[:, None, None], torch.nan)
    K = intrinsics_from_plane(on_plane, height, width).where(seen[:, None, None], torch.nan)
    dtype = torch.promote_types(ray_map.dtype, torch.float32)
    return pose.to(dtype).reshape(*batch, 4, 4), K.to(dtype).reshape(*batch, 3, 3)


def _plane_positions(height: int, width: int) -> Tensor:
    """(x, y, 1) of every pixel relative to the centre of the 2 x 2 plane: x, y in [-1, 1], (N, 3) in float64."""
    grid = pixel_grid(height, width, dtype=torch.float64).view(-1, 2)
    position = (2 * grid + 1) / torch.tensor([width, height]) - 1
    return torch.cat([position, torch.ones_like(position[:, :1])], dim=-1)


def _robust_homography(direction: Tensor, plane: Tensor, weight: Tensor, fit: RayFit) -> Tensor:
    """H (V, 3, 3) fitted to the rays that support the best hypothesis.

    Args:
        direction: (V, N, 3) of unit length, or zero.
        plane: (N, 3).
        weight: (V, N).
        fit: how hypotheses are drawn and judged. One hypothesis more is the fit to all rays.
    """
    support = _supporters(_fit_homography(direction, plane, weight), direction, plane, weight, fit.max_angle)
    for drawn in _draws(weight, fit):
        chosen = direction.gather(1, drawn[..., None].expand(-1, -1, 3))  # (V, rays, 3)
        guess = _fit_homography(chosen, plane[drawn], torch.ones_like(chosen[..., 0]))
        other = _supporters(guess, direction, plane, weight, fit.max_angle)
        better = other.sum(-1, keepdim=True) > support.sum(-1, keepdim=True)  # (V, 1)
        support = torch.where(better, other, support)
    return _fit_homography(direction, plane, support)


def _draws(weight: Tensor, fit: RayFit) -> Tensor:
    """Indices (hypotheses, V, rays) of rays drawn by weight (V, N), the same for a view whatever the others are."""
    chance = torch.rand(fit.hypotheses, fit.rays, generator=torch.Generator().manual_seed(fit.seed)).to(weight)
    below = weight.cumsum(-1)  # (V, N)
    mark = (chance.flatten() * below[:, -1:]).contiguous()  # (V, hypotheses * rays)
    drawn = torch.searchsorted(below, mark, right=True).clamp_max(weight.shape[-1] - 1)
    return drawn.view(len(weight), *chance.shape).transpose(0, 1)


def _supporters(homography: Tensor, direction: Tensor, plane: Tensor, weight: Tensor, max_angle: float) -> Tensor:
    """The weights (V, N), zero where a ray is further than `max_angle` from the homography's."""
    expected = F.normalize(plane @ homography.mT, dim=-1)  # (V, N, 3)
    error = length(direction - expected)  # the chord of the angle
    return torch.where(error < 2 * math.sin(max_angle / 2), weight, 0)


def _fit_homography(direction: Tensor, plane: Tensor, weight: Tensor) -> Tensor:
    """H (V, 3, 3), of unit norm and positive determinant, that minimises sum w |d x H p|^2.

    For a unit d this is the quadratic form of `sum w (I - d d') (x) (p p')` in the entries of H (direct linear
    transform); its eigenvector of the least eigenvalue is the minimum.

    Args:
        direction: unit d, (V, M, 3).
        plane: p, (M, 3) or (V, M, 3).
        weight: (V, M).
    """
    across = torch.eye(3).to(direction) - direction[..., :, None] * direction[..., None, :]  # (V, M, 3, 3)
    along = (plane[..., :, None] * plane[..., None, :]).expand_as(across)  # (V, M, 3, 3)
    form = torch.einsum("vmij,vmkl->vikjl", weight[..., None, None] * across, along).reshape(-1, 9, 9)
    _, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(form))
    homography = vectors[..., 0].reshape(-1, 3, 3)
    return torch.where(torch.det(homography)[:, None, None] < 0, -homography, homography)


def _split_homography(homography: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation (V, 3, 3) and intrinsics (V, 3, 3) on the 2 x 2 plane of H (V, 3, 3) with positive determinant.

    H = R U with U upper triangular and positive on its diagonal is proportional to R K^-1. A skew that noise brings
    about is dropped.
    """
    rotation, triangle = cast(tuple[Tensor, Tensor], torch.linalg.qr(homography))
    diagonal = torch.diagonal(triangle, dim1=-2, dim2=-1)  # (V, 3)
    rotation = torch.where(diagonal[:, None, :] < 0, -rotation, rotation)
    focal = diagonal[:, 2:].abs() / diagonal[:, :2].abs()
    centre = 1 - triangle[:, :2, 2] / diagonal[:, :2]
    return rotation, pinhole(focal, centre)
