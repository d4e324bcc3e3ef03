"""Exact images of a room, by ray casting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from g2vlm.data.rooms.casting import TILE, cast, make_rig
from g2vlm.data.rooms.packing import PackedScene, Row
from g2vlm.data.rooms.shading import colour, find_surface


@dataclass(frozen=True, eq=False)
class Rendering:
    """Views of a room: V views, H W pixels. Every pixel is valid, for the room is closed.

    Args:
        images: (V, 3, H, W) uint8.
        depth: (V, H, W) float32, z along the optical axis in metres.
        normals: (V, H, W, 3) unit normals in the camera frame, towards the camera.
        world_normals: (V, H, W, 3) the same in the world frame.
        instances: (V, H, W) int32 index into `Scene.instances`.
        categories: (V, H, W) int32 index into `CATEGORIES`.
    """

    images: Tensor
    depth: Tensor
    normals: Tensor
    world_normals: Tensor
    instances: Tensor
    categories: Tensor

    @property
    def valid(self) -> Tensor:
        """(V, H, W) bool, all true."""
        return torch.ones_like(self.depth, dtype=torch.bool)


def render(scene: PackedScene, cam_to_world: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Rendering:
    """Views of a scene, on the scene's device; each view's bits are the same whatever else is rendered with it.

    Args:
        scene: from `pack`.
        cam_to_world: (V, 4, 4) float32, cameras inside the room and outside its furniture.
        intrinsics: (V, 3, 3) float32 without skew.
        size: (H, W), multiples of 7.

    Raises:
        ValueError: the size is not a multiple of 7.
    """
    if size[0] % TILE or size[1] % TILE:
        raise ValueError(f"size: given {size}, both must be multiples of {TILE}")
    device = scene.rows.device
    rig = make_rig(cam_to_world.to(device), intrinsics.to(device), size)
    rays = rig.rays
    hits = cast(scene, rig, rays)
    depth, winner = hits.depth.flatten(), hits.winner.flatten()
    row = Row(*scene.rows.index_select(1, winner))
    per_view = [rig.centre[:, k] for k in range(3)] + [1 / rig.focal[:, 0]]
    *centre, pixel = [_per_pixel(values, hits.depth) for values in per_view]
    surface = find_surface(row, depth, [ray.flatten() for ray in rays], centre)
    rgb = colour(row, surface, depth * pixel, scene.light)

    def image(values: Tensor) -> Tensor:
        """(N,) in tiles -> (V, H, W)."""
        return values.view(hits.depth.shape).transpose(2, 3).reshape(-1, *size)

    world_normals = [image(n) for n in surface.normal]
    return Rendering(
        images=torch.stack([image(channel) for channel in rgb], 1),
        depth=image(depth),
        normals=_to_camera(world_normals, rig.rotation),
        world_normals=torch.stack(world_normals, -1),
        instances=image(scene.instance.index_select(0, winner)),
        categories=image(scene.category.index_select(0, winner)),
    )


def _per_pixel(values: Tensor, like: Tensor) -> Tensor:
    """One number per view (V,) for each of its pixels (N,)."""
    return values[:, None, None, None, None].expand_as(like).flatten()


def _to_camera(world: list[Tensor], rotation: Tensor) -> Tensor:
    """R' n for the normals of every view: three (V, H, W) -> (V, H, W, 3)."""
    r = rotation[:, :, :, None, None]
    return torch.stack([r[:, 0, k] * world[0] + r[:, 1, k] * world[1] + r[:, 2, k] * world[2] for k in range(3)], -1)
