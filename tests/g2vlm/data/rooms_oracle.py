"""The renderer's oracle: every ray against every surface in float64, straight from the scene's state."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.rooms import OrientedBox, Scene
from g2vlm.data.rooms.scene import Part

Array = NDArray[np.float64]


@dataclass
class Nearest:
    """Per ray: distance in lengths of the ray, outward normal of any sign, instance, and which surface it was."""

    depth: Array  # (N,)
    normal: Array  # (N, 3)
    instance: NDArray[np.int64]  # (N,)
    surface: NDArray[np.int64]  # (N,)

    def update(self, depth: Array, normal: Array, instance: int, surface: int) -> None:
        nearer = depth < self.depth
        self.depth[nearer], self.normal[nearer] = depth[nearer], np.broadcast_to(normal, (len(depth), 3))[nearer]
        self.instance[nearer], self.surface[nearer] = instance, surface


@np.errstate(divide="ignore", invalid="ignore")
def trace(scene: Scene, origin: Array, rays: Array) -> Nearest:
    """The nearest surface along rays (N, 3) from a point (3,)."""
    count = len(rays)
    nearest = Nearest(np.full(count, np.inf), np.zeros((count, 3)), np.full(count, -1), np.full(count, -1))
    instance, surface = room_surfaces(scene, origin, rays, nearest)
    for composite in scene.composites:
        cos, sin = np.cos(composite.yaw), np.sin(composite.yaw)
        to_world = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        start = (origin - [*composite.position, 0]) @ to_world
        for part in composite.parts:
            for depth, normal in hits(part, start, rays @ to_world):
                nearest.update(depth, normal @ to_world.T, instance, surface)
                surface += 1
        instance += 1
    return nearest


def room_surfaces(scene: Scene, origin: Array, rays: Array, nearest: Nearest) -> tuple[int, int]:
    """Floor, ceiling and the walls over the edges of the polygon; returns the next free instance and surface."""
    width, depth, height = scene.room.size
    for z, instance in ((0.0, 4), (height, 5)):
        nearest.update(ahead((z - origin[2]) / rays[:, 2]), np.array([0, 0, 1.0]), instance, instance)
    corners = np.array(scene.room.polygon)
    outer = {(0, -1): 0, (0, 1): 1, (1, -1): 2, (1, 1): 3}
    for number, (a, b) in enumerate(zip(corners, np.roll(corners, -1, axis=0), strict=True)):
        axis = int(abs(b[0] - a[0]) > 1e-9)  # the wall is at a fixed x (0) or y (1)
        distance = ahead((a[axis] - origin[axis]) / rays[:, axis])
        along = origin[1 - axis] + distance * rays[:, 1 - axis]
        low, high = sorted((a[1 - axis], b[1 - axis]))
        distance[(along < low) | (along > high)] = np.inf
        is_outer = abs(abs(a[axis]) - (width, depth)[axis] / 2) < 1e-9
        instance = outer[axis, int(np.sign(a[axis]))] if is_outer else 6
        nearest.update(distance, np.eye(3)[axis], instance, 100 + number)
    return 6 + (scene.room.notch is not None), 200


def ahead(depth: Array) -> Array:
    return np.where(depth > 1e-9, depth, np.inf)


def hits(part: Part, origin: Array, rays: Array) -> list[tuple[Array, Array]]:
    """Depth (N,) and normal of every surface of a part, infinite where a ray misses it."""
    half = np.array(part.size) / 2
    start = origin - np.array(part.centre)
    if part.shape == "box":
        return [plane(start, rays, half, axis, sign, None) for axis in range(3) for sign in (-1, 1)]
    curved = 3 if part.shape == "sphere" else 2
    o, d = start[:curved] / half[:curved], rays[:, :curved] / half[:curved]
    a, b, c = (d * d).sum(1), (o * d).sum(1), (o * o).sum() - 1
    depth = ahead((-b - np.sqrt(b * b - a * c)) / a)  # not a number where a ray misses, and so not ahead
    point = start + np.where(np.isfinite(depth), depth, 0)[:, None] * rays
    normal = np.zeros_like(point)
    normal[:, :curved] = point[:, :curved] / half[:curved] ** 2
    if part.shape == "sphere":
        return [(depth, normal)]
    depth = np.where(np.abs(point[:, 2]) <= half[2], depth, np.inf)
    return [(depth, normal)] + [plane(start, rays, half, 2, sign, curved) for sign in (-1, 1)]


def plane(start: Array, rays: Array, half: Array, axis: int, sign: int, round_axes: int | None) -> tuple[Array, Array]:
    """One flat face: a rectangle, or an ellipse for the caps of a cylinder."""
    depth = ahead((sign * half[axis] - start[axis]) / rays[:, axis])
    point = start + np.where(np.isfinite(depth), depth, 0)[:, None] * rays
    relative = np.delete(point / half, axis, 1)
    inside = (relative**2).sum(1) <= 1 if round_axes else (np.abs(relative) <= 1).all(1)
    return np.where(inside, depth, np.inf), np.eye(3)[axis]


def inside_box(points: Array, box: OrientedBox, slack: float) -> NDArray[np.bool_]:
    """Whether points (N, 3) lie in a box."""
    cos, sin = np.cos(box.yaw), np.sin(box.yaw)
    local = (points - np.array(box.centre)) @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return (np.abs(local) <= np.array(box.size) / 2 + slack).all(1)
