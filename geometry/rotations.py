"""Rotations: the camera head's nine numbers, and the angle between two rotations."""

# roma has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from typing import cast

import roma
import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors and integers as float32; float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotation_from_9d(x: Tensor) -> Tensor:
    """The rotation nearest to nine numbers, after each row of their 3x3 matrix is L2-normalised.

    With M the row-normalised matrix (row-major) and M = U S V', R = U diag(1, 1, det(UV')) V' minimises |R - M|_F over
    rotations (released code, camera head; Levinson et al. 2020, "An analysis of SVD for deep rotation estimation").

    The gradient is finite everywhere: it divides by sums of signed singular values, and roma damps that division where
    the nearest rotation is ambiguous (det(M) < 0 with equal smallest singular values, or rank below two).

    Args:
        x: (..., 9), any floating dtype.

    Returns:
        (..., 3, 3) in float32, or float64 for float64 input.
    """
    if x.shape[-1] != 9:
        raise ValueError(f"x: the last dimension must be 9, given shape {tuple(x.shape)}")
    rows = F.normalize(at_least_float32(x).reshape(*x.shape[:-1], 3, 3), dim=-1)
    return cast(Tensor, roma.special_procrustes(rows, method="svd"))


def geodesic_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle in radians, in [0, pi], of the rotation that takes `a` to `b`.

    2 asin(|a - b|_F / (2 sqrt 2)): exact near zero, where the arccos of the trace loses half its digits. The gradient
    is infinite at exactly pi; training uses `losses.camera_losses`, which clamps.

    Args:
        a, b: rotations (..., 3, 3).

    Returns:
        (...) angles.
    """
    return roma.rotmat_geodesic_distance(at_least_float32(a), at_least_float32(b))
