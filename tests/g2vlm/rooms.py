"""An exact scene for tests: a furnished box room, ray-cast in numpy, seen by cameras that look around in it."""

from pathlib import Path

import numpy as np

from g2vlm.images import SourceImage
from g2vlm.scene import Scene

# Axis-aligned boxes (low corner, high corner, colour) in metres, y down; the floor is at y = 1.3.
ROOM = ((-3.0, -1.4, -2.6), (3.0, 1.3, 2.6))
FURNITURE = [
    ((-0.9, 0.55, 0.6), (0.9, 0.62, 1.6), (150, 96, 56)),  # table top
    ((-0.8, 0.62, 0.7), (-0.7, 1.3, 0.8), (110, 70, 40)),  # legs
    ((0.7, 0.62, 0.7), (0.8, 1.3, 0.8), (110, 70, 40)),
    ((-0.8, 0.62, 1.4), (-0.7, 1.3, 1.5), (110, 70, 40)),
    ((0.7, 0.62, 1.4), (0.8, 1.3, 1.5), (110, 70, 40)),
    ((-0.4, 0.25, 0.9), (-0.1, 0.55, 1.2), (196, 58, 52)),  # a red box on the table
    ((1.9, -0.6, 1.6), (2.9, 1.3, 2.5), (60, 110, 150)),  # cupboard
    ((-2.9, 0.7, -0.6), (-1.9, 1.3, 1.6), (70, 130, 90)),  # sofa
    ((-2.9, 0.2, -0.6), (-2.6, 0.7, 1.6), (60, 115, 80)),
]


def box_room(
    num_views: int = 4, size: tuple[int, int] = (42, 56), original: tuple[int, int] = (480, 640), **changes
) -> Scene:
    """A `Scene` with exact points, normals, poses and intrinsics; `changes` replace arguments of `from_prediction`."""
    height, width = size
    focal = 0.8 * width
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    poses = np.stack([camera(view, num_views) for view in range(num_views)])
    views = [look(pose, K, size) for pose in poses]
    local, normals, colours = (np.stack(parts) for parts in zip(*views, strict=True))
    arguments = {
        "local_points": local,
        "cam_to_world": poses,
        "normals": normals,
        "intrinsics": np.tile(K, (num_views, 1, 1)),
        "images": colours.transpose(0, 3, 1, 2) / 255,
        "sources": [SourceImage(np.zeros((*original, 3), np.uint8), Path(f"room/{i}.png")) for i in range(num_views)],
        "units": "metre",
        "model": "exact",
    }
    return Scene.from_prediction(**{**arguments, **changes})


def camera(view: int, num_views: int) -> np.ndarray:
    """Camera-to-world (4, 4): on an arc through the front of the room, looking at the table, slightly down."""
    angle = np.radians(np.linspace(-55, 55, num_views)[view] if num_views > 1 else 20)
    centre = np.array([2.2 * np.sin(angle), -0.3, 0.8 - 2.6 * np.cos(angle)])
    forward = np.array([0.0, 0.5, 1.0]) - centre
    forward /= np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    return pose


def look(pose: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Local points (H, W, 3), normals in the camera frame (H, W, 3) and colours (H, W, 3) of one view."""
    v, u = np.mgrid[: size[0], : size[1]]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T  # z = 1, so that distance along them is depth
    world_rays = rays @ pose[:3, :3].T
    depth, normal = exits(pose[:3, 3], world_rays, *ROOM)
    points = pose[:3, 3] + depth[..., None] * world_rays
    colours = wallpaper(points, normal)
    for low, high, colour in FURNITURE:
        near, face = enters(pose[:3, 3], world_rays, low, high)
        hit = near < depth
        depth, normal = np.where(hit, near, depth), np.where(hit[..., None], face, normal)
        colours = np.where(hit[..., None], np.array(colour), colours)
    light = 0.62 + 0.38 * np.abs(normal @ np.array([0.35, 0.85, 0.4]))
    return depth[..., None] * rays, normal @ pose[:3, :3], (colours * light[..., None]).clip(0, 255).astype(np.uint8)


def slabs(origin: np.ndarray, rays: np.ndarray, low: tuple, high: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which rays enter and leave the three slabs of a box, (H, W, 3) each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (np.array(low) - origin) / rays, (np.array(high) - origin) / rays
    return np.minimum(first, second), np.maximum(first, second)


def exits(origin: np.ndarray, rays: np.ndarray, low: tuple, high: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Where rays from inside a box leave it, and the inward normal there."""
    far = slabs(origin, rays, low, high)[1]
    return far.min(-1), -np.sign(rays) * np.eye(3)[far.argmin(-1)]


def enters(origin: np.ndarray, rays: np.ndarray, low: tuple, high: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Where rays from outside a box enter it (infinite when they miss) and the outward normal there."""
    near, far = slabs(origin, rays, low, high)
    hit = (near.max(-1) < far.min(-1)) & (near.max(-1) > 0)
    return np.where(hit, near.max(-1), np.inf), -np.sign(rays) * np.eye(3)[near.argmax(-1)]


def wallpaper(points: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3): a chequered floor, striped walls, a plain ceiling."""
    x, y, z = np.moveaxis(points, -1, 0)
    checks = ((np.floor(x / 0.5) + np.floor(z / 0.5)) % 2)[..., None]
    stripes = (np.floor((x + z) / 0.3) % 2)[..., None]
    floor = np.array([214, 196, 168]) * (0.75 + 0.25 * checks)
    wall = np.where(np.abs(normal[..., :1]) > 0.5, (222, 208, 190), (198, 210, 222)) * (0.9 + 0.1 * stripes)
    wall = np.where((y > 1.1)[..., None], (240, 240, 236), wall)
    up, down = normal[..., 1:2] < -0.5, normal[..., 1:2] > 0.5
    return np.where(up, floor, np.where(down, (238, 238, 240), wall))
