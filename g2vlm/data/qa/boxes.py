"""Exact distances between points and oriented boxes.

Shapes: N boxes or pairs of boxes. Units are those of the boxes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIGNS = np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])  # (8, 3) of the corners
EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if (SIGNS[a] != SIGNS[b]).sum() == 1])  # (12, 2)
PARALLEL = 1e-12  # squared sine below which two edges have no common perpendicular


@dataclass(frozen=True, eq=False)
class Box:
    """A box of any orientation.

    Args:
        centre: (3,).
        size: (3,) full extents along its own axes.
        rotation: (3, 3) box -> world; its columns are the box's axes.
    """

    centre: Array
    size: Array
    rotation: Array

    @cached_property
    def corners(self) -> Array:
        """(8, 3) in the world."""
        return self.centre + (SIGNS * self.size) @ self.rotation.T

    @property
    def longest(self) -> float:
        """The longest of the three extents."""
        return float(self.size.max())


def point_distance(points: Array, box: Box) -> Array:
    """Distance (N,) from points (N, 3) to a solid box; 0 inside."""
    outside = np.abs((points - box.centre) @ box.rotation) - box.size / 2
    return np.linalg.norm(np.maximum(outside, 0), axis=-1)


def box_distance(a: Box, b: Box) -> float:
    """Smallest distance between two solid boxes; 0 where they meet.

    Disjoint boxes are closest at a corner of one of them, or between two edges (their common perpendicular).
    """
    if not _disjoint(a, b):
        return 0.0
    corners = min(float(point_distance(a.corners, b).min()), float(point_distance(b.corners, a).min()))
    return min(corners, _edge_distance(a.corners[EDGES], b.corners[EDGES]))


def _disjoint(a: Box, b: Box) -> bool:
    """Whether a plane lies between two boxes: face normals and cross products of edges are all that can be normal."""
    crossed = np.cross(a.rotation.T[:, None], b.rotation.T[None]).reshape(-1, 3)
    axes = np.concatenate([a.rotation.T, b.rotation.T, crossed])  # (15, 3)
    reach = np.abs(axes @ a.rotation) @ a.size / 2 + np.abs(axes @ b.rotation) @ b.size / 2
    return bool((np.abs(axes @ (b.centre - a.centre)) > reach).any())


def _edge_distance(first: Array, second: Array) -> float:
    """Smallest length of the common perpendiculars of segments (N, 2, 3) and (M, 2, 3) that meet both inside."""
    p, u = first[:, None, 0], first[:, None, 1] - first[:, None, 0]
    q, v = second[None, :, 0], second[None, :, 1] - second[None, :, 0]
    w = p - q  # (N, M, 3)
    a, b, c = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    d, e = (u * w).sum(-1), (v * w).sum(-1)
    square = a * c - b * b
    crossing = square > PARALLEL * a * c
    square = np.where(crossing, square, 1.0)
    s, t = (b * e - c * d) / square, (a * e - b * d) / square
    inside = crossing & (s > 0) & (s < 1) & (t > 0) & (t < 1)
    if not inside.any():
        return np.inf
    gap = w + s[..., None] * u - t[..., None] * v
    return float(np.linalg.norm(gap[inside], axis=-1).min())
