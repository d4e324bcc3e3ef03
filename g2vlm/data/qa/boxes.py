"""Exact distances between points and oriented boxes.

Shapes: N boxes or pairs of boxes. Units are those of the boxes.
"""

from collections.abc import Sequence
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


def box_distances(first: Sequence[Box], second: Sequence[Box]) -> Array:
    """Smallest distances (N,) between the solid boxes of N pairs; 0 where they meet.

    Disjoint boxes are closest at a corner of one of them, or between two edges (their common perpendicular).
    """
    if not first:
        return np.zeros(0)
    a, b = _Stack.of(first), _Stack.of(second)
    gaps = [_corner_distances(a, b), _corner_distances(b, a), _edge_distances(a.corners[:, EDGES], b.corners[:, EDGES])]
    return np.where(_disjoint(a, b), np.minimum.reduce(gaps), 0.0)


@dataclass(frozen=True, eq=False)
class _Stack:
    """N boxes as arrays; `axes` holds each box's axes as rows."""

    centre: Array  # (N, 3)
    half: Array  # (N, 3)
    axes: Array  # (N, 3, 3)
    corners: Array  # (N, 8, 3)

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> "_Stack":
        centre, half = np.stack([box.centre for box in boxes]), np.stack([box.size for box in boxes]) / 2
        axes = np.stack([box.rotation.T for box in boxes])
        return cls(centre, half, axes, np.stack([box.corners for box in boxes]))


def _corner_distances(a: _Stack, b: _Stack) -> Array:
    """(N,) from the nearest corner of each a to its b."""
    local = np.abs((a.corners - b.centre[:, None]) @ b.axes.transpose(0, 2, 1))
    return np.linalg.norm(np.maximum(local - b.half[:, None], 0), axis=-1).min(1)


def _disjoint(a: _Stack, b: _Stack) -> NDArray[np.bool_]:
    """(N,) whether a plane lies between two boxes.

    Face normals and cross products of edges are all that can be its normal.
    """
    crossed = np.cross(a.axes[:, :, None], b.axes[:, None]).reshape(-1, 9, 3)
    axes = np.concatenate([a.axes, b.axes, crossed], axis=1)  # (N, 15, 3)
    reach = sum(np.abs(axes @ box.axes.transpose(0, 2, 1)) @ box.half[..., None] for box in (a, b))
    offset = axes @ (b.centre - a.centre)[..., None]
    return np.any(np.abs(offset) > reach, axis=(1, 2))


def _edge_distances(first: Array, second: Array) -> Array:
    """(N,) shortest common perpendicular of segments (N, 12, 2, 3) that meets both inside; infinite without one."""
    p, u = first[:, :, None, 0], (first[:, :, 1] - first[:, :, 0])[:, :, None]  # (N, 12, 1, 3)
    q, v = second[:, None, :, 0], (second[:, :, 1] - second[:, :, 0])[:, None]
    w = p - q  # (N, 12, 12, 3)
    a, b, c, d, e = (_dot(*pair) for pair in ((u, u), (u, v), (v, v), (u, w), (v, w)))
    square = a * c - b * b
    crossing = square > PARALLEL * a * c
    square = np.where(crossing, square, 1.0)
    s, t = (b * e - c * d) / square, (a * e - b * d) / square
    inside = crossing & (s > 0) & (s < 1) & (t > 0) & (t < 1)
    gap = np.linalg.norm(w + s[..., None] * u - t[..., None] * v, axis=-1)
    return np.where(inside, gap, np.inf).min((1, 2))


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("...i,...i->...", a, b)
