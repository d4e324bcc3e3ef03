"""Cameras as nine numbers: translation, quaternion, field of view.

The encoding of VGGT and Depth-Anything-3: `[t_x, t_y, t_z, q_x, q_y, q_z, q_w, fov_h, fov_w]`, angles in radians. The
same nine numbers stand for a world-to-camera pose in VGGT and in this project, and for a camera-to-world pose in
Depth-Anything-3; there is one function for each reading. The field of view knows nothing of the principal point, which
is (W/2, H/2) after decoding whatever it was before.

Shape legend: ... any batch.
"""

# roma has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from math import inf
from typing import cast

import roma
import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.cameras import pinhole
from geometry.rotations import at_least_float32
from geometry.transforms import rigid


def encode_pose(world_to_cam: Tensor, K: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Nine numbers of a camera: `fov_h = 2 atan((H/2) / f_y)`, `fov_w = 2 atan((W/2) / f_x)`, and q_w >= 0.

    Args:
        world_to_cam: (..., 4, 4) or (..., 3, 4).
        K: intrinsics (..., 3, 3) in pixels; its principal point and skew are lost.
        image_size: (H, W) that K is for.

    Returns:
        (..., 9) in float32, or float64 for float64 input.
    """
    world_to_cam = at_least_float32(world_to_cam)
    quaternion = cast(Tensor, roma.rotmat_to_unitquat(world_to_cam[..., :3, :3]))
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    focal = at_least_float32(torch.stack([K[..., 1, 1], K[..., 0, 0]], dim=-1))  # (f_y, f_x)
    fov = 2 * torch.atan(_half(image_size, like=focal) / focal)
    return torch.cat([world_to_cam[..., :3, 3], quaternion, fov], dim=-1)


def decode_pose(encoding: Tensor, image_size: tuple[int, int], *, least_tan: float = -inf) -> tuple[Tensor, Tensor]:
    """The camera of nine numbers: `f_y = (H/2) / tan(fov_h / 2)`, and the rotation of q / |q|.

    Args:
        encoding: (..., 9) of a world-to-camera pose; the quaternion may have any length but zero.
        image_size: (H, W) of the image that K shall be for.
        least_tan: lower bound of tan(fov / 2), so that a field of view of zero does not give an infinite focal length
            (Depth-Anything-3: 1e-6; default: none).

    Returns:
        world_to_cam (..., 4, 4) and K (..., 3, 3) with the principal point (W/2, H/2), in float32, or float64 for
        float64 input.
    """
    if encoding.shape[-1] != 9:
        raise ValueError(f"encoding: the last dimension must be 9, given shape {tuple(encoding.shape)}")
    encoding = at_least_float32(encoding)
    translation, quaternion, fov = encoding[..., :3], encoding[..., 3:7], encoding[..., 7:]
    rotation = roma.unitquat_to_rotmat(F.normalize(quaternion, dim=-1))
    half = _half(image_size, like=fov)
    focal = half / torch.tan(fov / 2).clamp_min(least_tan)
    return rigid(rotation, translation), pinhole(focal.flip(-1), half.flip(-1))


def decode_pose_cam_to_world(
    encoding: Tensor, image_size: tuple[int, int], *, least_tan: float = -inf
) -> tuple[Tensor, Tensor]:
    """The camera of nine numbers that encode a camera-to-world pose, as Depth-Anything-3 writes them.

    Args:
        encoding: (..., 9) with translation and quaternion of camera to world.
        image_size: as in `decode_pose`.
        least_tan: as in `decode_pose`.

    Returns:
        cam_to_world (..., 4, 4) and K (..., 3, 3).
    """
    return decode_pose(encoding, image_size, least_tan=least_tan)


def _half(image_size: tuple[int, int], like: Tensor) -> Tensor:
    """(H/2, W/2) as a tensor (2,)."""
    return torch.tensor(image_size, dtype=like.dtype, device=like.device) / 2
