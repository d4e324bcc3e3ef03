"""A scene as tables that the renderer reads: one column per primitive.

The first six primitives are the faces of the room, -x, +x, -y, +y, floor, ceiling; the others follow sorted by shape.
"""

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from g2vlm.data.rooms.scene import CATEGORIES, PATTERNS, SHAPES, Light, Material, Scene, Vector

NUM_FACES = 6
Number = TypeVar("Number")


class Row(NamedTuple, Generic[Number]):
    """The numbers of one primitive, or a tensor of each for many pixels. Their order is that of a table's rows."""

    centre_x: Number
    centre_y: Number
    centre_z: Number
    half_x: Number
    half_y: Number
    half_z: Number
    cos_yaw: Number
    sin_yaw: Number
    shape: Number
    pattern: Number
    red_a: Number
    green_a: Number
    blue_a: Number
    red_b: Number
    green_b: Number
    blue_b: Number
    frequency: Number
    cos_angle: Number
    sin_angle: Number
    phase: Number


@dataclass(frozen=True, eq=False)
class PackedScene:
    """A scene on a device.

    Args:
        rows: (len(Row._fields), P) float32, one column per primitive.
        instance: (P,) int32.
        category: (P,) int32.
        spans: first and last + 1 primitive of each shape in `SHAPES`.
        light: of the scene.
    """

    rows: Tensor
    instance: Tensor
    category: Tensor
    spans: tuple[tuple[int, int], ...]
    light: Light


def pack(scene: Scene, device: torch.device | str = "cpu") -> PackedScene:
    """The tables of a scene."""
    room = scene.room
    faces = [_row("box", box.centre, box.size, 0.0, m) for box, m in zip(room.face_boxes, room.materials, strict=True)]
    rows, instance = faces, list(range(NUM_FACES))
    spans = []
    for shape in SHAPES:
        first = len(rows)
        for index, row in _solids(scene):
            if row.shape == SHAPES.index(shape):
                rows.append(row)
                instance.append(index)
        spans.append((first, len(rows)))
    category = [CATEGORIES.index(scene.instances[index].category) for index in instance]
    return PackedScene(
        rows=torch.tensor(rows, dtype=torch.float32).T.contiguous().to(device),
        instance=torch.tensor(instance, dtype=torch.int32).to(device),
        category=torch.tensor(category, dtype=torch.int32).to(device),
        spans=tuple(spans),
        light=scene.light,
    )


def _solids(scene: Scene) -> list[tuple[int, Row[float]]]:
    """Instance and row of everything inside the six faces."""
    found = []
    if box := scene.room.notch_box:
        found.append((NUM_FACES, _row("box", box.centre, box.size, 0.0, scene.room.materials[0])))
    first = NUM_FACES + len(found)
    for index, composite in enumerate(scene.composites, start=first):
        for part in composite.parts:
            x, y = composite.to_world(part.centre[0], part.centre[1])
            found.append((index, _row(part.shape, (x, y, part.centre[2]), part.size, composite.yaw, part.material)))
    return found


def _row(shape: str, centre: Vector, size: Vector, yaw: float, material: Material) -> Row[float]:
    half_x, half_y, half_z = (extent / 2 for extent in size)
    return Row(
        *centre, half_x, half_y, half_z, math.cos(yaw), math.sin(yaw), float(SHAPES.index(shape)),
        float(PATTERNS.index(material.pattern)), *material.colours[0], *material.colours[1], 1 / material.period,
        math.cos(material.angle), math.sin(material.angle), material.phase,
    )  # fmt: skip
