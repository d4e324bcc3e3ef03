"""The exact state of a room: everything a renderer draws and a question can ask about.

Frame: metres, right-handed, z up, origin at the centre of the floor. Yaw turns about z, counter-clockwise seen from
above; a composite's own frame stands on the floor with +y to its front and +x to its right-hand side seen from behind.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Shape = Literal["box", "cylinder", "sphere"]
Pattern = Literal["checker", "stripes", "noise", "planks", "dots", "gradient", "tiles"]
Vector = tuple[float, float, float]

SHAPES: tuple[Shape, ...] = ("box", "cylinder", "sphere")
PATTERNS: tuple[Pattern, ...] = ("checker", "stripes", "noise", "planks", "dots", "gradient", "tiles")
STRUCTURE = ("floor", "ceiling", "wall")
FIXTURES = ("door", "window", "picture")
FURNITURE = (
    "ball", "bed", "bin", "bookshelf", "box", "cabinet", "chair", "desk", "lamp", "nightstand", "plant", "refrigerator",
    "rug", "sofa", "stool", "table", "tv",
)  # fmt: skip
CATEGORIES = (*STRUCTURE, *FIXTURES, *FURNITURE)
"""Names of the values of a category map."""


@dataclass(frozen=True)
class Material:
    """A two-coloured procedural texture.

    Args:
        pattern: one of `PATTERNS`.
        colours: two RGB triples in [0, 1].
        period: of the pattern, metres.
        angle: by which the pattern is turned in its surface, radians.
        phase: shift of the pattern, in periods.
    """

    pattern: Pattern
    colours: tuple[Vector, Vector]
    period: float
    angle: float
    phase: float


@dataclass(frozen=True)
class Part:
    """One primitive of a composite, aligned with the composite's axes; cylinders stand upright.

    Args:
        shape: one of `SHAPES`.
        centre: in the composite's frame.
        size: full extents; a sphere or cylinder fills its box, so unequal extents make an ellipsoid.
        material: its texture.
    """

    shape: Shape
    centre: Vector
    size: Vector
    material: Material


@dataclass(frozen=True)
class OrientedBox:
    """A box turned about z: centre, full extents along its own axes, yaw in radians."""

    centre: Vector
    size: Vector
    yaw: float

    @property
    def volume(self) -> float:
        """Cubic metres; zero for the planes of the room."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Composite:
    """A named thing made of parts.

    Args:
        category: one of `CATEGORIES`.
        position: (x, y) of its frame's origin; z = 0 is the floor.
        yaw: of its frame.
        parts: its primitives.
    """

    category: str
    position: tuple[float, float]
    yaw: float
    parts: tuple[Part, ...]

    @cached_property
    def box(self) -> OrientedBox:
        """The tightest box around the parts in the composite's own axes."""
        low = [min(part.centre[axis] - part.size[axis] / 2 for part in self.parts) for axis in range(3)]
        high = [max(part.centre[axis] + part.size[axis] / 2 for part in self.parts) for axis in range(3)]
        x, y, z = ((a + b) / 2 for a, b in zip(low, high, strict=True))
        size = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
        return OrientedBox((*self.to_world(x, y), z), size, self.yaw)

    def to_world(self, x: float, y: float) -> tuple[float, float]:
        """World (x, y) of a place in the composite's frame."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return self.position[0] + cos * x - sin * y, self.position[1] + sin * x + cos * y


@dataclass(frozen=True)
class Notch:
    """The corner that an L-shaped room lacks: its extents, and which corner by the signs of x and y."""

    size: tuple[float, float]
    corner: tuple[int, int]


@dataclass(frozen=True)
class Room:
    """A rectangular or L-shaped room.

    Args:
        size: extents along x, y and z, metres.
        materials: of the faces -x, +x, -y, +y, floor, ceiling.
        notch: the missing corner of an L-shaped room; None for a rectangle. Its walls wear the material of face -x.
    """

    size: Vector
    materials: tuple[Material, ...]
    notch: Notch | None = None

    @property
    def polygon(self) -> tuple[tuple[float, float], ...]:
        """Corners of the floor, counter-clockwise."""
        x, y = self.size[0] / 2, self.size[1] / 2
        corners = [(-x, -y), (x, -y), (x, y), (-x, y)]
        if self.notch is None:
            return tuple(corners)
        index = ((-1, -1), (1, -1), (1, 1), (-1, 1)).index(self.notch.corner)
        sign_x, sign_y = self.notch.corner
        inner_x, inner_y = sign_x * (x - self.notch.size[0]), sign_y * (y - self.notch.size[1])
        cut = [(inner_x, sign_y * y), (inner_x, inner_y), (sign_x * x, inner_y)]
        corners[index : index + 1] = cut if sign_x != sign_y else cut[::-1]
        return tuple(corners)

    @property
    def area(self) -> float:
        """Of the floor, square metres."""
        return _area(self.polygon)

    @property
    def notch_box(self) -> OrientedBox | None:
        """The solid in the missing corner."""
        if self.notch is None:
            return None
        (width, depth), (sign_x, sign_y) = self.notch.size, self.notch.corner
        centre = (sign_x * (self.size[0] - width) / 2, sign_y * (self.size[1] - depth) / 2, self.size[2] / 2)
        return OrientedBox(centre, (width, depth, self.size[2]), 0.0)

    @property
    def face_boxes(self) -> tuple[OrientedBox, ...]:
        """Flat boxes of the faces -x, +x, -y, +y, floor, ceiling."""
        x, y, z = self.size
        return (
            OrientedBox((-x / 2, 0, z / 2), (0, y, z), 0.0),
            OrientedBox((x / 2, 0, z / 2), (0, y, z), 0.0),
            OrientedBox((0, -y / 2, z / 2), (x, 0, z), 0.0),
            OrientedBox((0, y / 2, z / 2), (x, 0, z), 0.0),
            OrientedBox((0, 0, 0), (x, y, 0), 0.0),
            OrientedBox((0, 0, z), (x, y, 0), 0.0),
        )


def _area(polygon: "list[tuple[float, float]] | tuple[tuple[float, float], ...]") -> float:
    """Signed area, positive counter-clockwise (shoelace formula)."""
    following = [*polygon[1:], polygon[0]]
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(polygon, following, strict=True)) / 2


@dataclass(frozen=True)
class Light:
    """Ambient light, a distant lamp and a near one; strengths multiply the surface's colour.

    Args:
        ambient: strength everywhere.
        direction: unit vector towards the distant lamp.
        distant: its strength.
        position: of the near lamp, metres.
        near: its strength at no distance; it falls off as 1 / (1 + (distance / 2 m)^2).
    """

    ambient: float
    direction: Vector
    distant: float
    position: Vector
    near: float


@dataclass(frozen=True)
class Instance:
    """What a value of the instance map stands for."""

    index: int
    category: str
    box: OrientedBox


@dataclass(frozen=True)
class Scene:
    """A room with everything in it.

    Args:
        name: as in samples and results.
        room: walls, floor and ceiling.
        fixtures: doors, windows and pictures on the walls.
        furniture: everything that stands on the floor.
        light: of the whole scene.
    """

    name: str
    room: Room
    fixtures: tuple[Composite, ...]
    furniture: tuple[Composite, ...]
    light: Light

    @property
    def composites(self) -> tuple[Composite, ...]:
        """Fixtures, then furniture."""
        return self.fixtures + self.furniture

    @cached_property
    def instances(self) -> tuple[Instance, ...]:
        """In the order of the instance map: six faces of the room, the missing corner's walls if any, composites."""
        names = ("wall", "wall", "wall", "wall", "floor", "ceiling")
        boxes = list(zip(names, self.room.face_boxes, strict=True))
        if notch := self.room.notch_box:
            boxes.append(("wall", notch))
        boxes += [(composite.category, composite.box) for composite in self.composites]
        return tuple(Instance(index, category, box) for index, (category, box) in enumerate(boxes))
