"""Normal and colour of what each pixel sees. Shapes: N pixels; vectors are three tensors (N,)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from g2vlm.data.rooms.packing import Row
from g2vlm.data.rooms.scene import SHAPES, Light
from g2vlm.data.rooms.textures import grain, mix

Vector3 = list[Tensor]
STEEPEST = 0.15  # cosine below which a pixel's size on a surface no longer grows


@dataclass(frozen=True, eq=False)
class Surface:
    """The surface under each pixel.

    Args:
        point: in the world.
        normal: in the world, towards the camera.
        local: the point in the primitive's frame, metres from its centre.
        local_normal: the normal there.
        facing: (N,) cosine between normal and ray.
    """

    point: Vector3
    normal: Vector3
    local: Vector3
    local_normal: Vector3
    facing: Tensor


def find_surface(row: Row[Tensor], depth: Tensor, rays: Vector3, centre: Vector3) -> Surface:
    """Where rays meet their primitives.

    Args:
        row: the numbers (N,) of each pixel's primitive.
        depth: (N,) z-depth.
        rays: directions in the world, scaled to z = 1 in the camera.
        centre: of each pixel's camera in the world.
    """
    point = [c + depth * ray for c, ray in zip(centre, rays, strict=True)]
    away = [p - c for p, c in zip(point, (row.centre_x, row.centre_y, row.centre_z), strict=True)]
    local, direction = _to_local(row, away), _to_local(row, rays)
    normal = _local_normal(row, local)
    length = _dot(normal, normal).sqrt()
    cosine = _dot(normal, direction)
    turned = torch.where(cosine > 0, -1 / length, 1 / length)
    normal = [n * turned for n in normal]
    facing = cosine.abs() / (length * _dot(direction, direction).sqrt())
    return Surface(point, _to_world(row, normal), local, normal, facing)


def _local_normal(row: Row[Tensor], local: Vector3) -> Vector3:
    """A normal, of any length and sign, in the primitive's frame."""
    half = (row.half_x, row.half_y, row.half_z)
    gap = [(h - x.abs()).abs() for h, x in zip(half, local, strict=True)]  # to the planes of the box's faces
    is_x = (gap[0] <= gap[1]) & (gap[0] <= gap[2])
    is_y = ~is_x & (gap[1] <= gap[2])
    normal = [axis.to(torch.float32) for axis in (is_x, is_y, ~(is_x | is_y))]
    (curved,) = torch.nonzero(row.shape > 0, as_tuple=True)
    if curved.shape[0]:
        part = _curved_normal(row.shape[curved], [h[curved] for h in half], [x[curved] for x in local])
        for axis in range(3):
            normal[axis][curved] = part[axis]
    return normal


def _curved_normal(shape: Tensor, half: Vector3, local: Vector3) -> Vector3:
    """Normals of cylinders and spheres: the gradient of the sum of (x / half)^2 over the curved axes."""
    gradient = [x / (h * h) for x, h in zip(local, half, strict=True)]
    is_sphere = shape == SHAPES.index("sphere")
    radius = ((local[0] / half[0]) * (local[0] / half[0]) + (local[1] / half[1]) * (local[1] / half[1])).sqrt()
    to_side, to_cap = (1 - radius).abs() * half[0], (half[2] - local[2].abs()).abs()
    is_cap = ~is_sphere & (to_cap < to_side)
    flat = torch.where(is_cap, 0.0, 1.0)
    upright = torch.where(is_cap, 1.0, torch.where(is_sphere, gradient[2], 0.0))
    return [gradient[0] * flat, gradient[1] * flat, upright]


def _to_local(row: Row[Tensor], world: Vector3) -> Vector3:
    cos, sin = row.cos_yaw, row.sin_yaw
    return [cos * world[0] + sin * world[1], cos * world[1] - sin * world[0], world[2]]


def _to_world(row: Row[Tensor], local: Vector3) -> Vector3:
    cos, sin = row.cos_yaw, row.sin_yaw
    return [cos * local[0] - sin * local[1], sin * local[0] + cos * local[1], local[2]]


def _dot(a: Vector3, b: Vector3) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def colour(row: Row[Tensor], surface: Surface, pixel: Tensor, light: Light) -> Tensor:
    """uint8 colours (3, N).

    Args:
        row: the numbers (N,) of each pixel's primitive.
        surface: under each pixel.
        pixel: (N,) metres of a pixel on a surface that faces the camera.
        light: of the scene.
    """
    footprint = pixel / surface.facing.clamp_min(STEEPEST)
    u, v = _surface_coordinates(surface)
    x = (row.cos_angle * u + row.sin_angle * v) * row.frequency + row.phase
    y = (row.cos_angle * v - row.sin_angle * u) * row.frequency + row.phase
    factor = mix(row.pattern, x, y, footprint * row.frequency)
    shade = grain(u, v, footprint) * brightness(surface, light) * 255
    pairs = ((row.red_a, row.red_b), (row.green_a, row.green_b), (row.blue_a, row.blue_b))
    return torch.stack([((a + factor * (b - a)) * shade).clamp(0, 255) for a, b in pairs]).to(torch.uint8)


def _surface_coordinates(surface: Surface) -> tuple[Tensor, Tensor]:
    """Two coordinates in metres along the surface: the local point without the axis that the normal is nearest to."""
    size = [n.abs() for n in surface.local_normal]
    is_x = (size[0] > size[1]) & (size[0] > size[2])
    is_z = (size[2] >= size[0]) & (size[2] > size[1])
    return (
        torch.where(is_x, surface.local[1], surface.local[0]),
        torch.where(is_z, surface.local[1], surface.local[2]),
    )


def brightness(surface: Surface, light: Light) -> Tensor:
    """Ambient, distant and near light on matt surfaces (N,), without shadows."""
    point, normal = surface.point, surface.normal
    distant = normal[0] * light.direction[0] + normal[1] * light.direction[1] + normal[2] * light.direction[2]
    beam = [p - x for p, x in zip(light.position, point, strict=True)]
    square = _dot(beam, beam)
    near = _dot(normal, beam) / (square + 1e-4).sqrt() / (1 + square / 4)
    # A surface turned away is darker than the ambient light, so that all six sides of a box differ.
    return light.ambient + light.distant * (0.4 + 0.6 * distant).clamp_min(0) + light.near * near.clamp_min(0)
