"""Where an object is for someone who stands by one object and faces another (VSI-Bench, relative direction).

Seen from above; angles are counter-clockwise from the way one faces, in degrees.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations

from g2vlm.data.qa.boxes import Array
from g2vlm.data.qa.drafts import Draft, Generator
from g2vlm.data.qa.facts import SceneFacts
from g2vlm.data.qa.rules import Rules
from g2vlm.data.rooms.draws import Draws

NEAREST, FARTHEST = 0.3, 5.0  # metres between any two of the three boxes
STRAYING_CORNERS = 2  # of the eight of the object asked for; they come in pairs above each other


@dataclass(frozen=True)
class Sectors:
    """A division of the circle.

    Args:
        names: of the sectors, in the order in which a question lists them.
        starts: angle at which each sector begins, ascending from 0, with its name; the last one ends at 360.
        unanswered: sectors that are not asked about.
        ending: of the question, after "is the C to ".
    """

    names: tuple[str, ...]
    starts: tuple[tuple[float, str], ...]
    unanswered: tuple[str, ...]
    ending: str

    def sector(self, angle: float) -> str:
        """The sector of an angle in [0, 360)."""
        return next(name for start, name in reversed(self.starts) if angle >= start)

    def margin(self, angle: float) -> float:
        """Degrees from an angle to the nearest border."""
        return min(abs((angle - start + 180) % 360 - 180) for start, _ in self.starts)


HARD = Sectors(
    ("front-left", "front-right", "back-left", "back-right"),
    ((0.0, "front-left"), (90.0, "back-left"), (180.0, "back-right"), (270.0, "front-right")),
    (),
    "my front-left, front-right, back-left, or back-right?\nThe directions refer to the quadrants of a Cartesian plane "
    "(if I am standing at the origin and facing along the positive y-axis).",
)
MEDIUM = Sectors(
    ("left", "right", "back"),
    ((0.0, "left"), (135.0, "back"), (225.0, "right")),
    (),
    "my left, right, or back?\n"
    "An object is to my back if I would have to turn at least 135 degrees in order to face it.",
)
EASY = Sectors(("left", "right"), MEDIUM.starts, ("back",), "the left or the right of the {facing}?")


def direction(sectors: Sectors, stand: Array, facing: Array, query: Array, corners: Array, margin: float) -> str | None:
    """The sector of an object, or None where it is ambiguous.

    Args:
        sectors: the division.
        stand, facing, query: (2,) centres of the three boxes on the floor.
        corners: (8, 2) of the box asked for.
        margin: least degrees from a border.
    """
    angle = _angle(stand, facing, query)
    name = sectors.sector(angle)
    straying = sum(sectors.sector(_angle(stand, facing, corner)) != name for corner in corners)
    unclear = sectors.margin(angle) < margin or straying > STRAYING_CORNERS
    return None if unclear or name in sectors.unanswered else name


def _angle(stand: Array, facing: Array, point: Array) -> float:
    (ax, ay), (bx, by) = facing - stand, point - stand
    return math.degrees(math.atan2(ax * by - ay * bx, ax * bx + ay * by)) % 360.0


def object_rel_direction(sectors: Sectors, facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """All three roles of three objects that are neither too near nor too far from each other."""
    boxes = {thing.category: thing.box for thing in facts.unique(rules)}
    corners = {name: box.corners[:, :2] for name, box in boxes.items()}
    for stand, facing, query in draws.shuffled(list(permutations(boxes, 3))):
        distances = [facts.category_distance[pair] for pair in combinations((stand, facing, query), 2)]
        if min(distances) < NEAREST or max(distances) > FARTHEST:
            continue
        start, ahead, place = (boxes[name].centre[:2] for name in (stand, facing, query))
        answer = direction(sectors, start, ahead, place, corners[query], rules.angle_margin)
        if answer is None:
            continue
        ending = sectors.ending.format(facing=facing)
        question = f"If I am standing by the {stand} and facing the {facing}, is the {query} to {ending}"
        wrong = tuple(name for name in sectors.names if name != answer)
        yield Draft(question, answer, wrong, (stand, facing, query))


DIRECTION_TASKS: dict[str, Generator] = {
    "object_rel_direction_easy": partial(object_rel_direction, EASY),
    "object_rel_direction_medium": partial(object_rel_direction, MEDIUM),
    "object_rel_direction_hard": partial(object_rel_direction, HARD),
}
