"""The law of scenes: which room, what stands in it and where, by rejection of overlapping footprints."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import g2vlm.data.rooms.materials as materials
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.furniture import FIXTURES, FREE_FURNITURE, WALL_FURNITURE, Parts
from g2vlm.data.rooms.scene import Composite, Light, Notch, OrientedBox, Room, Scene, Vector

Range = tuple[float, float]
Footprint = tuple[float, float, float, float, float]  # centre x, y; half extents along its axes; yaw

WALL_GAP = 0.06  # between furniture and walls, wider than anything on the walls is thick
CLEARANCE = 0.05  # between pieces of furniture
HEADROOM = 0.1  # metres between resized furniture and the ceiling
INWARD_YAW = (-math.pi / 2, math.pi / 2, 0.0, math.pi)  # of a composite with its back to the face -x, +x, -y, +y


@dataclass(frozen=True)
class SceneLaw:
    """The distribution of scenes.

    Args:
        width, depth, height: of the room, metres.
        furniture: least and greatest number of pieces.
        fixtures: least and greatest number of windows and pictures besides the door.
        l_shaped: probability of a missing corner.
        coverage: furniture stops when it covers this share of the floor, once there is the least number.
        longest: metres; the longest extent of every piece of furniture is drawn from it, all ratios equally likely, so
            that what a thing is does not tell how large it is. None gives real sizes.
        favourite: at most this share of the pieces, evenly drawn for each scene, are of one category.
    """

    width: Range
    depth: Range
    height: Range
    furniture: tuple[int, int]
    fixtures: tuple[int, int]
    l_shaped: float
    coverage: float = 0.38
    longest: Range | None = None
    favourite: float = 0.0


LAWS = {
    "tiny": SceneLaw((4.0, 6.0), (3.5, 5.5), (2.4, 2.9), furniture=(6, 12), fixtures=(1, 3), l_shaped=0.15),
    "standard": SceneLaw((4.8, 8.0), (4.5, 7.0), (2.4, 3.2), furniture=(10, 25), fixtures=(2, 5), l_shaped=0.25),
    "any_size": SceneLaw(
        (3.0, 8.0), (3.0, 8.0), (2.4, 3.2), (6, 12), (1, 3), l_shaped=0.15, longest=(0.35, 2.2), favourite=0.9
    ),
}


def build_scene(law: SceneLaw, seed: int) -> Scene:
    """The scene of a seed; the same on every machine."""
    draws = Draws(seed, 0)
    room = _room(law, draws)
    fixtures = _fixtures(law, room, draws)
    furniture = _furniture(law, room, fixtures, draws)
    return Scene(f"rooms-{seed:012d}", room, fixtures, furniture, _light(room, draws))


def _room(law: SceneLaw, draws: Draws) -> Room:
    size = (draws.uniform(*law.width), draws.uniform(*law.depth), draws.uniform(*law.height))
    base = materials.wall(draws)
    walls = [base if draws.chance(0.4) else materials.wall(draws) for _ in range(4)]
    notch = None
    if draws.chance(law.l_shaped):
        extents = (draws.uniform(0.2, 0.4) * size[0], draws.uniform(0.2, 0.4) * size[1])
        notch = Notch(extents, (draws.choice((-1, 1)), draws.choice((-1, 1))))
    return Room(size, (*walls, materials.floor(draws), materials.ceiling(draws)), notch)


def _light(room: Room, draws: Draws) -> Light:
    azimuth, height = draws.uniform(0, 2 * math.pi), draws.uniform(0.3, 0.9)
    flat = math.sqrt(1 - height * height)
    place = (0.6 * (draws.uniform() - 0.5) * room.size[0], 0.6 * (draws.uniform() - 0.5) * room.size[1])
    return Light(
        ambient=draws.uniform(0.42, 0.6),
        direction=(flat * math.cos(azimuth), flat * math.sin(azimuth), height),
        distant=draws.uniform(0.2, 0.4),
        position=(*place, room.size[2] - 0.3),
        near=draws.uniform(0.3, 0.6),
    )


# Fixtures.


def _fixtures(law: SceneLaw, room: Room, draws: Draws) -> tuple[Composite, ...]:
    placed: list[Composite] = []
    wanted = ["door"] + [draws.choice(("window", "picture")) for _ in range(draws.integer(*law.fixtures))]
    for category in wanted:
        parts = FIXTURES[category](draws)
        if composite := _on_wall(category, parts, room, 0.0, placed, draws):
            placed.append(composite)
    return tuple(placed)


def _on_wall(
    category: str, parts: Parts, room: Room, gap: float, others: Iterable[Composite], draws: Draws
) -> Composite | None:
    """A composite with its back `gap` from a wall, clear of the others; None when no place is found."""
    frame = Composite(category, (0.0, 0.0), 0.0, parts).box
    obstacles = [footprint(other.box) for other in others] + _notch_footprints(room)
    for _ in range(12):
        wall = draws.integer(0, 3)
        along = room.size[1 if wall < 2 else 0] / 2 - frame.size[0] / 2 - 0.1
        if along <= 0:
            continue
        offset = draws.uniform(-along, along)
        to_wall = room.size[wall // 2] / 2 - gap - (frame.size[1] / 2 - frame.centre[1])
        position = ((-to_wall, offset), (to_wall, offset), (offset, -to_wall), (offset, to_wall))[wall]
        composite = Composite(category, position, INWARD_YAW[wall], parts)
        if not _hits(footprint(composite.box), obstacles):
            return composite
    return None


# Furniture.


def _furniture(law: SceneLaw, room: Room, fixtures: tuple[Composite, ...], draws: Draws) -> tuple[Composite, ...]:
    least, _ = law.furniture
    wanted, placed = draws.integer(*law.furniture), []
    favourite, share = None, 0.0
    if law.favourite:
        favourite, share = draws.choice(tuple(FREE_FURNITURE)), law.favourite * draws.uniform()
    blocked = [_passage(fixture) for fixture in fixtures if fixture.category == "door"] + _notch_footprints(room)
    covered, limit = 0.0, law.coverage * room.area
    for _ in range(6 * wanted):
        if len(placed) == wanted or (covered > limit and len(placed) >= least):
            break
        if favourite is not None and draws.chance(share):
            composite = _free(favourite, law, room, blocked, draws)
        else:
            small = covered > limit or len(placed) > wanted // 2
            composite = _piece(law, room, placed, blocked, small, draws)
        if composite is not None:
            placed.append(composite)
            blocked.append(footprint(composite.box))
            covered += composite.box.size[0] * composite.box.size[1]
    return tuple(placed)


def _piece(
    law: SceneLaw, room: Room, placed: list[Composite], blocked: list[Footprint], small: bool, draws: Draws
) -> Composite | None:
    """One more piece of furniture, against a wall or free; None when it found no place."""
    if small or not draws.chance(0.6):
        return _free(draws.choice(tuple(FREE_FURNITURE)), law, room, blocked, draws)
    category = draws.choice(tuple(WALL_FURNITURE))
    parts = _sized(WALL_FURNITURE[category](draws), law, room, draws)
    composite = _on_wall(category, parts, room, WALL_GAP, placed, draws)
    return None if composite is None or _hits(footprint(composite.box), blocked) else composite


def _free(category: str, law: SceneLaw, room: Room, blocked: list[Footprint], draws: Draws) -> Composite | None:
    """A piece of a category that stands anywhere; None when it found no place."""
    parts = _sized(FREE_FURNITURE[category](draws), law, room, draws)
    for _ in range(8):
        position = ((draws.uniform() - 0.5) * room.size[0], (draws.uniform() - 0.5) * room.size[1])
        composite = Composite(category, position, draws.uniform(-math.pi, math.pi), parts)
        outline = footprint(composite.box)
        if _inside(outline, room) and not _hits(outline, blocked):
            return composite
    return None


def _sized(parts: Parts, law: SceneLaw, room: Room, draws: Draws) -> Parts:
    """Parts at the size that the law draws, below the ceiling; materials keep their scale."""
    if law.longest is None:
        return parts
    least, most = law.longest
    size = Composite("", (0.0, 0.0), 0.0, parts).box.size
    factor = least * (most / least) ** draws.uniform() / max(size)
    factor = min(factor, (room.size[2] - HEADROOM) / size[2])
    return tuple(replace(part, centre=_times(part.centre, factor), size=_times(part.size, factor)) for part in parts)


def _times(vector: Vector, factor: float) -> Vector:
    x, y, z = vector
    return factor * x, factor * y, factor * z


def _passage(door: Composite) -> Footprint:
    """The floor before a door that stays free."""
    (x, y), width = door.to_world(0, 0.4), door.box.size[0]
    return x, y, width / 2, 0.4, door.yaw


def _notch_footprints(room: Room) -> list[Footprint]:
    return [footprint(box)] if (box := room.notch_box) else []


def _inside(outline: Footprint, room: Room) -> bool:
    """Whether a footprint keeps its distance from the four outer walls."""
    x, y, half_x, half_y, yaw = outline
    cos, sin = abs(math.cos(yaw)), abs(math.sin(yaw))
    reach_x, reach_y = cos * half_x + sin * half_y, sin * half_x + cos * half_y
    inside_x = abs(x) + reach_x <= room.size[0] / 2 - WALL_GAP
    return inside_x and abs(y) + reach_y <= room.size[1] / 2 - WALL_GAP


def footprint(box: OrientedBox) -> Footprint:
    """The rectangle that a box covers on the floor."""
    return box.centre[0], box.centre[1], box.size[0] / 2, box.size[1] / 2, box.yaw


def _hits(outline: Footprint, others: Iterable[Footprint]) -> bool:
    return any(overlap(outline, other, CLEARANCE) for other in others)


def overlap(a: Footprint, b: Footprint, clearance: float = 0.0) -> bool:
    """Whether two rectangles come closer than a clearance along every axis of theirs (separating axes)."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    reach = math.hypot(a[2], a[3]) + math.hypot(b[2], b[3]) + clearance
    if dx * dx + dy * dy > reach * reach:
        return False
    cos, sin = abs(math.cos(a[4] - b[4])), abs(math.sin(a[4] - b[4]))
    return not (_apart(a, b, dx, dy, cos, sin, clearance) or _apart(b, a, dx, dy, cos, sin, clearance))


def _apart(a: Footprint, b: Footprint, dx: float, dy: float, cos: float, sin: float, clearance: float) -> bool:
    """Whether an axis of rectangle a separates the two."""
    c, s = math.cos(a[4]), math.sin(a[4])
    apart_x = abs(c * dx + s * dy) > a[2] + cos * b[2] + sin * b[3] + clearance
    return apart_x or abs(c * dy - s * dx) > a[3] + sin * b[2] + cos * b[3] + clearance
