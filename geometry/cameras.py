"""Pinhole cameras with OpenCV axes (x right, y down, z forward).

Pixel rule: the centre of pixel (0, 0) is at coordinate (0, 0) (integer grid), so the centre of the image is at
((W-1)/2, (H-1)/2). Only `half_pixel_to_integer_grid` and its inverse know the other rule.

Shape legend: ... any batch, H W pixels, * any grid of points; K is (..., 3, 3) in pixels of the current image size.
"""

import torch
from torch import Tensor

from geometry.transforms import expand_batch

_IRLS_STEPS = 10


def pixel_grid(
    height: int, width: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """Coordinates (u, v) of every pixel centre: (H, W, 2) with `grid[y, x] = (x, y)`."""
    v = torch.arange(height, dtype=dtype or torch.get_default_dtype(), device=device)
    u = torch.arange(width, dtype=dtype or torch.get_default_dtype(), device=device)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def ray_directions(K: Tensor, height: int, width: int) -> Tensor:
    """Rays of every pixel in the camera frame, scaled to z = 1: `K^-1 (u, v, 1)`.

    Args:
        K: intrinsics (..., 3, 3), upper triangular.
        height, width: image size in pixels.

    Returns:
        (..., H, W, 3).
    """
    grid = pixel_grid(height, width, dtype=K.dtype, device=K.device)
    return pixel_rays(grid.expand(*K.shape[:-2], height, width, 2), K)


def pixel_rays(pixels: Tensor, K: Tensor) -> Tensor:
    """Rays (..., *, 3) through pixels (..., *, 2) in the camera frame, scaled to z = 1: `K^-1 (u, v, 1)`."""
    k = expand_batch(K, pixels)
    y = (pixels[..., 1] - k[..., 1, 2]) / k[..., 1, 1]
    x = (pixels[..., 0] - k[..., 0, 2] - k[..., 0, 1] * y) / k[..., 0, 0]
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def unproject(depth: Tensor, K: Tensor) -> Tensor:
    """Local points of a depth map: `z K^-1 (u, v, 1)`.

    Args:
        depth: z along the optical axis (..., H, W).
        K: intrinsics (..., 3, 3).

    Returns:
        (..., H, W, 3) in the camera frame, in the unit of the depth.
    """
    height, width = depth.shape[-2:]
    return depth[..., None] * ray_directions(K, height, width)


def project(points: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates and depth of points in the camera frame: `(u, v, 1) ~ K x / z`.

    Args:
        points: (..., *, 3) in the camera frame.
        K: intrinsics (..., 3, 3); its batch is the leading part of the points' shape.

    Returns:
        uv (..., *, 2) in pixels and z (..., *). Where z <= 0 the point is behind the camera and uv has no meaning (it
        stays finite).
    """
    k = expand_batch(K, points)
    z = points[..., 2]
    tiny = torch.finfo(z.dtype).eps
    safe = torch.where(z.abs() < tiny, tiny, z)
    x, y = points[..., 0] / safe, points[..., 1] / safe
    u = k[..., 0, 0] * x + k[..., 0, 1] * y + k[..., 0, 2]
    v = k[..., 1, 1] * y + k[..., 1, 2]
    return torch.stack([u, v], dim=-1), z


def intrinsics_from_points(local_points: Tensor, valid: Tensor | None = None) -> Tensor:
    """Focal lengths that best explain a map of local points, with the principal point at the image centre.

    With c = ((W-1)/2, (H-1)/2), fx minimises sum rho(fx x/z - (u - cx)) over valid pixels, fy the same with y/z and v.
    rho is Huber's function with threshold one pixel; iteratively reweighted least squares solves it:
    f = sum(w a b) / sum(w a^2) with a = x/z, b = u - cx, w = 1 / max(|f a - b|, 1).

    Args:
        local_points: (..., H, W, 3) in the camera frame.
        valid: (..., H, W) bool, True = use; default every pixel. Only pixels with z > 0 are used.

    Returns:
        K (..., 3, 3) without skew. A view without usable pixels gets NaN focal lengths.
    """
    height, width = local_points.shape[-3:-1]
    grid = pixel_grid(height, width, dtype=local_points.dtype, device=local_points.device)
    centre = torch.stack([grid[..., 0].mean(), grid[..., 1].mean()])  # (2,)
    z = local_points[..., 2:]
    usable = z > 0 if valid is None else (z > 0) & valid[..., None]  # (..., H, W, 1)
    slope = torch.where(usable, local_points[..., :2] / torch.where(usable, z, 1), 0)  # (..., H, W, 2)
    offset = (grid - centre).expand_as(slope)

    focal = _weighted_ratio(slope, offset, usable.to(slope.dtype))  # (..., 2)
    for _ in range(_IRLS_STEPS):
        residual = focal[..., None, None, :] * slope - offset
        focal = _weighted_ratio(slope, offset, usable / residual.abs().clamp_min(1))
    return pinhole(focal, centre)


def _weighted_ratio(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Least-squares factor from a to b over the pixels: (..., H, W, 2) -> (..., 2)."""
    return (weight * a * b).sum((-3, -2)) / (weight * a * a).sum((-3, -2))


def pinhole(focal: Tensor, centre: Tensor) -> Tensor:
    """K (..., 3, 3) without skew from (fx, fy) (..., 2) and (cx, cy) (..., 2) or (2,)."""
    left = torch.diag_embed(focal)  # (..., 2, 2)
    top = torch.cat([left, centre.expand_as(focal)[..., None]], dim=-1)
    bottom = torch.eye(3, dtype=top.dtype, device=top.device)[2:]
    return torch.cat([top, bottom.expand(*top.shape[:-2], 1, 3)], dim=-2)


def half_pixel_to_integer_grid(K: Tensor) -> Tensor:
    """K for pixel centres at (0.5, 0.5), ... -> K for pixel centres at (0, 0), ...: the principal point minus 0.5."""
    return _shift(K, -0.5, -0.5)


def integer_grid_to_half_pixel(K: Tensor) -> Tensor:
    """Inverse of `half_pixel_to_integer_grid`: the principal point plus 0.5."""
    return _shift(K, 0.5, 0.5)


def resize_intrinsics(K: Tensor, old_size: tuple[float, float], new_size: tuple[float, float]) -> Tensor:
    """Intrinsics after the image is resampled from `old_size` to `new_size`, both (H, W); a crop may be fractional.

    Resampling keeps the image borders, which are half a pixel outside the outer centres: add 0.5, scale, subtract 0.5.
    """
    scale_y, scale_x = new_size[0] / old_size[0], new_size[1] / old_size[1]
    top, middle, bottom = integer_grid_to_half_pixel(K).unbind(-2)
    return half_pixel_to_integer_grid(torch.stack([top * scale_x, middle * scale_y, bottom], dim=-2))


def crop_intrinsics(K: Tensor, top: float, left: float) -> Tensor:
    """Intrinsics after `top` rows and `left` columns are cut off: the principal point moves by (-left, -top)."""
    return _shift(K, -left, -top)


def _shift(K: Tensor, right: float, down: float) -> Tensor:
    """Move the principal point: `[1 0 right; 0 1 down; 0 0 1] K`."""
    top, middle, bottom = K.unbind(-2)
    return torch.stack([top + right * bottom, middle + down * bottom, bottom], dim=-2)
