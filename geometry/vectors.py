"""Vectors as three separate coordinates.

Arithmetic over a last dimension of three is several times slower on a CPU than over three contiguous tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Vectors = Sequence[Tensor]
"""x, y and z, each (...)."""


def coordinates(vectors: Tensor) -> Vectors:
    """Vectors (..., 3) as their three coordinates, each (...) and contiguous."""
    return vectors.movedim(-1, 0).contiguous().unbind(0)


def cross(a: Vectors, b: Vectors) -> Vectors:
    """a x b."""
    (ax, ay, az), (bx, by, bz) = a, b
    return ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx


def angle_between(a: Vectors, b: Vectors) -> Tensor:
    """Angle (...) in radians between vectors of any length: atan2(|a x b| + 1e-12, a.b).

    The gradient is finite everywhere, and zero where a vector is zero.
    """
    x, y, z = cross(a, b)
    square = x * x + y * y + z * z
    sine = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return torch.atan2(sine + 1e-12, a[0] * b[0] + a[1] * b[1] + a[2] * b[2])
