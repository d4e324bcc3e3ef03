"""Maps of 3-D points: world points, surface normals, depth edges.

Shape legend: ... any batch, H W pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.transforms import apply_rigid, length


def world_points_from_local(local_points: Tensor, cam_to_world: Tensor) -> Tensor:
    """Local points (..., H, W, 3) moved to the world by `cam_to_world` (..., 4, 4)."""
    return apply_rigid(cam_to_world, local_points)


def normals_from_points(points: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Unit surface normals of a point map, towards the camera when the points are in the camera frame.

    The normal is the direction of the sum of the pixel's corner normals (`neighbour_normals`). A corner counts when its
    three points are valid and not collinear. At the border fewer corners exist.

    Args:
        points: (..., H, W, 3). Whatever stands at invalid pixels is ignored.
        valid: (..., H, W) bool; None means all.

    Returns:
        normals (..., H, W, 3), zero where undefined, and their validity (..., H, W).
    """
    if valid is None:
        valid = torch.ones_like(points[..., 0], dtype=torch.bool)
    total = torch.zeros_like(points)
    for corner, _ in _corners(points, valid):
        total = total + corner
    return _unit(total)


def neighbour_normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The four corner normals of every pixel, unit length, towards the camera when the points are in its frame.

    At each pixel the edges to its up, left, down and right neighbours span four corners, in this order: up x left,
    left x down, down x right, right x up. A corner is valid when the pixel and both neighbours are valid; outside the
    map nothing is.

    Args:
        points: (..., H, W, 3). Whatever stands at invalid pixels is ignored.
        valid: (..., H, W) bool.

    Returns:
        normals (4, ..., H, W, 3), zero where the corner is invalid or its points are collinear, and the corners'
        validity (4, ..., H, W).
    """
    normals, usable = zip(*_corners(points, valid), strict=True)
    return torch.stack(normals), torch.stack(usable)


def _corners(points: Tensor, valid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit normal (..., H, W, 3), zero where there is none, and validity (..., H, W) of each of the four corners."""
    points = torch.where(valid[..., None], points, 0)
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))  # (..., H+2, W+2, 3)
    padded_valid = F.pad(valid, (1, 1, 1, 1))
    middle, before, after = slice(1, -1), slice(None, -2), slice(2, None)
    neighbours = [(before, middle), (middle, before), (after, middle), (middle, after)]  # up, left, down, right
    edges = [padded[..., rows, columns, :] - points for rows, columns in neighbours]
    usable = [padded_valid[..., rows, columns] & valid for rows, columns in neighbours]
    for i, j in [(0, 1), (1, 2), (2, 3), (3, 0)]:
        corner, _ = _unit(torch.cross(edges[i], edges[j], dim=-1))
        both = usable[i] & usable[j]
        yield torch.where(both[..., None], corner, 0), both


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (..., 3) and where they exist (...); zero vectors stay zero, with zero gradient."""
    norm = length(vectors)
    exists = norm > 0
    return vectors / torch.where(exists, norm, 1)[..., None], exists


def depth_edges(depth: Tensor, rtol: float) -> Tensor:
    """Pixels at a depth step: (maximum - minimum of the 3x3 window) / depth > rtol.

    Every pixel of the window counts, invalid ones included (released code); where a comparison meets NaN the result is
    False.

    Args:
        depth: (..., H, W).
        rtol: relative threshold, e.g. 0.03.

    Returns:
        (..., H, W) bool, True = edge.
    """
    flat = depth.reshape(-1, 1, *depth.shape[-2:])
    spread = F.max_pool2d(flat, 3, stride=1, padding=1) + F.max_pool2d(-flat, 3, stride=1, padding=1)
    return spread.reshape(depth.shape) / depth > rtol
