"""Camera laws: where a person would hold a camera, and what they would point it at.

Everything is drawn and tested on the scene's boxes with plain numbers; images come later.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.scene import OrientedBox, Scene

Array = NDArray[np.float64]

HEIGHTS = (0.9, 1.8)  # of cameras above the floor, metres
FIELD_OF_VIEW = (math.radians(50), math.radians(85))  # across the longer side of the image
BODY = 0.25  # metres between a camera and furniture
WALL = 0.35  # metres between a camera and a wall
STARE = 0.7  # least metres to what the middle of the image shows
OPEN = 1.2  # least median metres over the image
ARC = (math.radians(80), math.radians(130))  # of four or more wide views; fewer share a smaller one
NEAR_ARC = (math.radians(10), math.radians(60))
PAN_ARC = (math.radians(12), math.radians(92))
TURN_ARC = (math.radians(220), math.radians(330))
TRIES = 40  # per view before the excerpt starts anew
PROBES = np.array([(x, y, 1.0) for y in (-0.4, 0.0, 0.4) for x in (-0.5, 0.0, 0.5)])  # rays of the view test
MIDDLE = 4  # of the probes


@dataclass(frozen=True, eq=False)
class Cameras:
    """Cameras of an excerpt.

    Args:
        cam_to_world: (S, 4, 4) float64, OpenCV axes.
        field_of_view: across the longer side of the image, radians; the same for all.
    """

    cam_to_world: Array
    field_of_view: float

    def poses(self) -> Tensor:
        """cam_to_world (S, 4, 4) float32."""
        return torch.from_numpy(self.cam_to_world).to(torch.float32)

    def intrinsics(self, size: tuple[int, int]) -> Tensor:
        """(S, 3, 3) float32 for images (H, W): square pixels, the principal point in the middle."""
        height, width = size
        focal = max(size) / (2 * math.tan(self.field_of_view / 2))
        K = [[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]]
        return torch.tensor(K, dtype=torch.float32).expand(len(self.cam_to_world), 3, 3).contiguous()


# Obstacles.


class Obstacles:
    """The solid boxes of a scene and the room around them."""

    def __init__(self, scene: Scene) -> None:
        boxes = [composite.box for composite in scene.furniture]
        if notch := scene.room.notch_box:
            boxes.append(notch)
        self.room = np.array(scene.room.size)
        self._centre = np.array([box.centre for box in boxes]).reshape(-1, 3)  # (B, 3)
        self._half = np.array([box.size for box in boxes]).reshape(-1, 3) / 2
        self._to_box = np.array([_to_box(box) for box in boxes]).reshape(-1, 3, 3)

    def free(self, point: Array) -> bool:
        """Whether a camera at a point (3,) keeps its distance from walls and furniture."""
        low = np.array([-self.room[0] / 2, -self.room[1] / 2, 0.0]) + WALL
        high = np.array([self.room[0] / 2, self.room[1] / 2, self.room[2]]) - WALL
        if (point < low).any() or (point > high).any():
            return False
        local = np.abs(np.einsum("bij,bj->bi", self._to_box, point - self._centre))
        return not bool((local < self._half + BODY).all(1).any())

    def distances(self, origin: Array, rays: Array) -> Array:
        """How far rays (N, 3) from a point (3,) go before a box or a wall, in lengths of the ray: (N,)."""
        rays = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
        low = np.array([-self.room[0] / 2, -self.room[1] / 2, 0.0])
        leaves = np.maximum((low - origin) / rays, (low + self.room - origin) / rays).min(-1)
        if not len(self._centre):
            return leaves
        start = np.einsum("bij,bj->bi", self._to_box, origin - self._centre)[:, None]  # (B, 1, 3)
        direction = np.einsum("bij,nj->bni", self._to_box, rays)  # (B, N, 3)
        direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
        half = self._half[:, None]
        first, second = (-half - start) / direction, (half - start) / direction
        near, far = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
        return np.minimum(leaves, np.where((near < far) & (near > 0), near, np.inf).min(0))


def _to_box(box: OrientedBox) -> list[list[float]]:
    cos, sin = math.cos(box.yaw), math.sin(box.yaw)
    return [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]]


# Poses.


def look(centre: Array, yaw: float, pitch: float, roll: float) -> Array:
    """cam_to_world (4, 4) of a camera that looks along a yaw (from +x), pitched up and rolled; radians."""
    forward = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)])
    level = np.array([math.sin(yaw), -math.cos(yaw), 0.0])  # to the right
    down = np.cross(forward, level)
    right = math.cos(roll) * level + math.sin(roll) * down
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    return pose


def _towards(centre: Array, target: Array, draws: Draws) -> Array:
    """A camera looking at a place, held by hand."""
    x, y, z = target - centre
    pitch = math.atan2(z, math.hypot(x, y)) + draws.uniform(-0.06, 0.06)
    return look(centre, math.atan2(y, x) + draws.uniform(-0.1, 0.1), pitch, draws.uniform(-0.08, 0.08))


def sees(pose: Array, field_of_view: float, obstacles: Obstacles) -> bool:
    """Whether a camera shows something of the room, not a wall or a cupboard right before it."""
    rays = PROBES * (2 * math.tan(field_of_view / 2), 2 * math.tan(field_of_view / 2), 1.0)
    distances = obstacles.distances(pose[:3, 3], rays @ pose[:3, :3].T)
    return bool(distances[MIDDLE] > STARE and np.median(distances) > OPEN)


# Laws.


def wide(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """A wide baseline: cameras around the room on an arc, all looking at about one place."""
    few = min(1.0, (num_views + 1) / 5)
    return _arc(scene, num_views, draws, (few * ARC[0], few * ARC[1]))


def near(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """Like `wide` on a shorter arc, so that neighbouring views have much in common."""
    return _arc(scene, num_views, draws, NEAR_ARC)


def _arc(scene: Scene, num_views: int, draws: Draws, spreads: tuple[float, float]) -> Cameras:
    """Cameras on an arc of a length drawn from a range, or shorter in a full room."""
    obstacles, field_of_view = Obstacles(scene), draws.uniform(*FIELD_OF_VIEW)
    for spread in _relaxing(draws, *spreads):
        target = _place(obstacles.room, 0.3, draws, (0.4, 1.1))
        start = draws.uniform(0, 2 * math.pi)
        poses = []
        for stratum in draws.shuffled(range(num_views)):
            pose = _around(target, start + spread * stratum / num_views, spread / num_views, obstacles, draws)
            if pose is None:
                break
            poses.append(pose)
        if len(poses) == num_views and all(sees(pose, field_of_view, obstacles) for pose in poses):
            return Cameras(np.stack(poses), field_of_view)
    raise AssertionError("unreachable: the draws go on")


def _around(target: Array, azimuth: float, width: float, obstacles: Obstacles, draws: Draws) -> Array | None:
    """A camera within an arc about a target; None when no free place was found."""
    for _ in range(TRIES):
        angle = azimuth + draws.uniform(0.1, 0.9) * width
        direction = np.array([math.cos(angle), math.sin(angle), 0.0])
        reach = (np.sign(direction[:2]) * obstacles.room[:2] / 2 - target[:2]) / _nonzero(direction[:2])
        distance = draws.uniform(0.45, 1.0) * max(float(reach.min()) - WALL, 0.0)
        centre = target + distance * direction
        centre[2] = draws.uniform(*HEIGHTS)
        if distance > 1.0 and obstacles.free(centre):
            return _towards(centre, target, draws)
    return None


def smooth(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """A walk with small steps and turns; views are in the order of the walk."""
    return _walk(scene, num_views, draws, (0.12, 0.45))


def stroll(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """Like `smooth` with long steps, forwards, backwards or sideways."""
    return _walk(scene, num_views, draws, (0.6, 1.6))


def _walk(scene: Scene, num_views: int, draws: Draws, strides: tuple[float, float]) -> Cameras:
    """A walk with steps of a length drawn from a range, or shorter in a full room."""
    obstacles, field_of_view = Obstacles(scene), draws.uniform(*FIELD_OF_VIEW)
    for stride in _relaxing(draws, *strides):
        centre = _place(obstacles.room, 0.8, draws, HEIGHTS)
        gaze, pitch = draws.uniform(0, 2 * math.pi), draws.uniform(-0.3, 0.05)
        turn, heading = draws.uniform(-0.16, 0.16), draws.uniform(0, 2 * math.pi)
        poses = []
        for _ in range(num_views):
            pose = look(centre, gaze, pitch, draws.uniform(-0.05, 0.05))
            if not (obstacles.free(centre) and sees(pose, field_of_view, obstacles)):
                break
            poses.append(pose)
            centre, heading = _step(centre, heading, stride, obstacles, draws)
            gaze += turn + draws.uniform(-0.05, 0.05)
            pitch = min(max(pitch + draws.uniform(-0.04, 0.04), -0.45), 0.15)
        if len(poses) == num_views:
            return Cameras(np.stack(poses), field_of_view)
    raise AssertionError("unreachable: the draws go on")


def pan(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """Looking around from about one place."""
    return _turning(scene, num_views, draws, PAN_ARC)


def turn(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """Like `pan`, until most of the room has been seen."""
    return _turning(scene, num_views, draws, TURN_ARC)


def _turning(scene: Scene, num_views: int, draws: Draws, spreads: tuple[float, float]) -> Cameras:
    """Views from about one place over an angle drawn from a range, or a smaller one in a full room."""
    obstacles, field_of_view = Obstacles(scene), draws.uniform(*FIELD_OF_VIEW)
    for spread in _relaxing(draws, *spreads):
        stand, gaze = _place(obstacles.room, 0.7, draws, HEIGHTS), draws.uniform(0, 2 * math.pi)
        pitch = draws.uniform(-0.3, 0.05)
        poses = []
        for stratum in draws.shuffled(range(num_views)):
            centre = stand + np.array([draws.uniform(-0.1, 0.1) for _ in range(3)])
            centre[2] = min(max(centre[2], HEIGHTS[0]), HEIGHTS[1])
            yaw = gaze + spread * (stratum + draws.uniform()) / num_views
            pose = look(centre, yaw, pitch + draws.uniform(-0.1, 0.1), draws.uniform(-0.08, 0.08))
            if not (obstacles.free(centre) and sees(pose, field_of_view, obstacles)):
                break
            poses.append(pose)
        if len(poses) == num_views:
            return Cameras(np.stack(poses), field_of_view)
    raise AssertionError("unreachable: the draws go on")


def _step(centre: Array, heading: float, stride: float, obstacles: Obstacles, draws: Draws) -> tuple[Array, float]:
    """The next place of a walk, turning aside where the way is blocked; the same place when every way is."""
    for attempt in range(12):
        angle = heading + draws.uniform(-0.3, 0.3) * (1 + attempt)
        length = stride * draws.uniform(0.5, 1.0)
        moved = centre + np.array([length * math.cos(angle), length * math.sin(angle), draws.uniform(-0.04, 0.04)])
        moved[2] = min(max(moved[2], HEIGHTS[0]), HEIGHTS[1])
        if obstacles.free(moved):
            return moved, angle
    return centre, heading


def _relaxing(draws: Draws, least: float, most: float) -> Iterator[float]:
    """Draws from a range that shrinks slowly, so that a full room ends up with an easier excerpt."""
    attempt = 0
    while True:
        yield draws.uniform(least, most) * max(0.97**attempt, 0.02)
        attempt += 1


def _place(room: Array, share: float, draws: Draws, heights: tuple[float, float]) -> Array:
    """A point in the middle `share` of the floor's extents."""
    x, y = (share * (draws.uniform() - 0.5) * extent for extent in room[:2])
    return np.array([x, y, draws.uniform(*heights)])


def _nonzero(values: Array) -> Array:
    return np.where(np.abs(values) < 1e-9, 1e-9, values)


def mixed(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """Wide baselines three times out of four, walks otherwise."""
    return (wide if draws.chance(0.75) else smooth)(scene, num_views, draws)


def varied(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """From easy to hard: looking around from one place and wide baselines, a third each, short arcs and walks."""
    share = draws.uniform()
    law = wide if share < 0.35 else near if share < 0.55 else pan if share < 0.9 else smooth
    return law(scene, num_views, draws)


def inquiring(scene: Scene, num_views: int, draws: Draws) -> Cameras:
    """What questions about a room need: wide baselines, turns that show things one after the other, and strolls."""
    share = draws.uniform()
    law = wide if share < 0.4 else turn if share < 0.7 else stroll
    return law(scene, num_views, draws)


CameraLaw = Callable[[Scene, int, Draws], Cameras]
LAWS = (wide, smooth, near, pan, turn, stroll, mixed, varied, inquiring)
CAMERA_LAWS: dict[str, CameraLaw] = {law.__name__: law for law in LAWS}
