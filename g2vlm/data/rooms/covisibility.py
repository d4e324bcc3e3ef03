"""How much of one view another one shows."""

import torch
from torch import Tensor

from geometry import apply_rigid, project, relative_cam, unproject


def covisibility(depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor, tolerance: float = 0.05) -> Tensor:
    """Shares of pixels seen by both views of every pair.

    A pixel of view i counts for view j when its point falls into j's image and lies within `tolerance` of the depth
    there (nearest pixel), as a share of that depth.

    Args:
        depth: (S, H, W), valid everywhere.
        intrinsics: (S, 3, 3).
        cam_to_world: (S, 4, 4).
        tolerance: relative difference of depths.

    Returns:
        (S, S) in [0, 1]; [i, j] is the share of view i that view j sees.
    """
    height, width = depth.shape[1:]
    points = unproject(depth, intrinsics)  # (S, H, W, 3)
    j_from_i = relative_cam(cam_to_world).transpose(0, 1)  # [i, j]: camera i -> camera j
    moved = apply_rigid(j_from_i, points[:, None].expand(-1, len(depth), -1, -1, -1))  # (S, S, H, W, 3)
    pixel, z = project(moved, intrinsics[None].expand(len(depth), -1, -1, -1))
    column, row = torch.round(pixel).unbind(-1)
    inside = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    there = depth.flatten(1)[None].expand(len(depth), -1, -1).gather(2, index.to(torch.int64).flatten(2)).view_as(z)
    seen = inside & ((z - there).abs() < tolerance * there)
    return seen.to(depth.dtype).mean((-2, -1))
