"""Descriptions of rendered rooms: what is where in a view, and how the camera moved. Dense lessons beside questions.

A question about a room teaches a word or two; a description teaches dozens, each about another place of the views.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.chat.rooms import OPENING, Showing
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.boxes import point_distance
from g2vlm.data.qa.camera_tasks import POINT_TRIES, Point, flat_point, mark_at
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject, Sighting
from g2vlm.data.qa.question import frame_name, opening
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.rules import STILLS
from g2vlm.data.rooms import RoomsSource, Scene
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.types import SceneSample
from g2vlm.prompts import place_images

GRID = 3
"""Rows and columns of a view's cells: their numbers have one digit, and an image of 84 pixels has as many tokens."""

FOLLOWED = 4
"""Most objects that are looked for in all views."""

MOST_TEXT, MOST_APART = 330, 220
"""Tokens that packs reserve for what is said about a view; where views are shown apart, there is less of it."""


class RoomDescriptions:
    """Rooms described view by view in random order.

    Args:
        split, seed, law, cameras: as of `RoomsQA`.
        views, view_size, geometry, blank: as of `Showing`.
        apart: each view stands before what is said about it; else all stand before the first description, and are
            spoken of by their number.
    """

    name = "rooms_descriptions"

    def __init__(
        self,
        split: Any = "train",
        seed: int = 0,
        law: str = "any_size",
        cameras: str = "inquiring",
        views: Sequence[int] = (2, 4),
        view_size: Sequence[int] = (84, 84),
        geometry: bool = True,
        blank: bool = False,
        apart: bool = False,
    ):
        self.rooms, self.apart = RoomsSource(law, split, seed, cameras), apart
        self.showing = Showing((views[0], views[1]), (view_size[0], view_size[1]), geometry, blank)

    def __len__(self) -> int:
        return len(self.rooms)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text."""
        most = MOST_APART if self.apart else MOST_TEXT
        return self.showing.shape(seed, OPENING + self.showing.request(seed).num_views * most)

    def load(self, index: int, seed: int) -> ChatSample:
        """A room and what can be said about its views."""
        scene, room = self.rooms.load(index, self.showing.request(seed)), self.rooms.scene(index)
        draws, describe = stream("descriptions", seed, index), apart if self.apart else together
        facts = room_facts(room, scene)
        points = {k: point for k, frame in enumerate(facts.frames) if (point := some_point(frame, draws))}
        marks = [mark_at(k, facts.frames[k], point) for k, point in points.items()]
        depths = {k: f"{point.depth:.1f}" for k, point in points.items()}
        turns = describe(room, scene, facts, depths, draws)
        return self.showing.sample(scene, turns, self.name, self.name, marks)


def apart(room: Scene, scene: SceneSample, facts: SceneFacts, depths: Mapping[int, str], draws: Draws) -> list[Turn]:
    """Every view with what is where in it, its objects, and the depth of its marked point."""
    turns = []
    for k in draws.shuffled(range(scene.num_views)):
        turns.append(Turn((ImageAt(k), "What is where in this frame?"), cells(room, scene, k, draws)))
        if k in depths:
            turns.append(Turn(("How deep is the point marked in red?",), depths[k]))
        turns.append(Turn(("Which objects, and where?",), objects(facts, facts.frames[k], draws)))
    return turns


def together(room: Scene, scene: SceneSample, facts: SceneFacts, depths: Mapping[int, str], draws: Draws) -> list[Turn]:
    """All views; then, in random order, cells, objects and marked point of each, and the camera's way to the next."""
    names, turns = [frame_name(k, scene.num_views) for k in range(scene.num_views)], []
    for k, (name, frame) in enumerate(zip(names, facts.frames, strict=True)):
        turns.append(Turn((f"What is where in {name}?",), cells(room, scene, k, draws)))
        turns.append(Turn((f"Which objects are in {name}, and where?",), objects(facts, frame, draws)))
        if k in depths:
            turns.append(Turn((f"How deep is the point marked in red in {name}?",), depths[k]))
    sought = draws.shuffled(facts.unique(STILLS))[:FOLLOWED]
    turns += [Turn((f"In which frames is the {t.category}, and where?",), followed(facts, t)) for t in sought]
    for (start, end), (first, second) in zip(pairwise(facts.frames), pairwise(names), strict=True):
        turns.append(Turn((f"How did the camera move between {first} and {second}?",), moved(start, end)))
    return after_images(scene.num_views, draws.shuffled(turns))


def after_images(count: int, turns: Sequence[Turn]) -> list[Turn]:
    """Turns about views that all stand before the first of them."""
    first, *later = turns
    words = opening(count, str(first.parts[0]))
    return [Turn(tuple(place_images(words, [ImageAt(k) for k in range(count)])), first.answer), *later]


def cells(room: Scene, scene: SceneSample, view: int, draws: Draws) -> str:
    """Every cell of a view, in random order: its number, name and depth."""
    return listed(told(room, scene, view), draws)


def listed(cells: Sequence[tuple[int, str, float]], draws: Draws) -> str:
    """Number, name and depth of cells, in random order."""
    return ", ".join(f"{number} {name} {depth:.1f}" for number, name, depth in draws.shuffled(cells))


def told(room: Scene, scene: SceneSample, view: int) -> list[tuple[int, str, float]]:
    """Number, name and depth in metres of what fills most of each cell of a view; they count from 1, row by row."""
    assert scene.instances is not None
    assert scene.depth is not None
    names = {thing.index: thing.category for thing in room.instances}
    instances, depths = (_cells(values[view].numpy()) for values in (scene.instances, scene.depth))
    filled = [filling(owner, depth) for owner, depth in zip(instances, depths, strict=True)]
    return [(number, names[most], median) for number, (most, median) in enumerate(filled, 1)]


def filling(owners: NDArray[Any], depths: NDArray[Any]) -> tuple[int, float]:
    """The instance that fills most of a part of a view, and its median depth there."""
    values, counts = np.unique(owners, return_counts=True)
    most = int(values[counts.argmax()])
    return most, float(np.median(depths[owners == most]))


def _cells(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for row in np.array_split(values, GRID):
        yield from np.array_split(row, GRID, axis=1)


def objects(facts: SceneFacts, frame: Frame, draws: Draws) -> str:
    """What is seen well in a frame, in random order: name, cell of its middle, distance from the camera.

    Cells are as in `cells`; distances are in metres.
    """
    seen = [s for s in frame.sightings if s.share >= STILLS.min_share and s.instance in facts.by_instance]
    things = [(facts.by_instance[sighting.instance], sighting) for sighting in draws.shuffled(seen)]
    told = [f"{thing.category} {place(frame, thing, s)}" for thing, s in things if thing.category not in facts.unclear]
    return ", ".join(told) or "none"


def followed(facts: SceneFacts, thing: SceneObject) -> str:
    """Every frame in which an object is seen well, in their order: number of the frame (from 1), cell, distance."""
    seen = [(k, frame, sighting) for k, frame in enumerate(facts.frames, 1) for sighting in frame.sightings]
    shown = [(k, frame, s) for k, frame, s in seen if s.instance == thing.instance and s.share >= STILLS.min_share]
    return ", ".join(f"{k} {place(frame, thing, sighting)}" for k, frame, sighting in shown)


def place(frame: Frame, thing: SceneObject, sighting: Sighting) -> str:
    """Cell and distance of an object in a frame."""
    return f"{cell_at(sighting.box, frame.size)} {float(point_distance(frame.centre[None], thing.box)[0]):.1f}"


def some_point(frame: Frame, draws: Draws) -> Point | None:
    """A point whose depth can be asked for; None where few or none are."""
    return next((point for _ in range(POINT_TRIES) if (point := flat_point(frame, draws))), None)


def cell_at(box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """The number of the cell that the middle of a sighting's box is in."""
    height, width = size
    column, row = (box[0] + box[2] + 1) / 2 / width, (box[1] + box[3] + 1) / 2 / height
    return 1 + GRID * int(GRID * row) + int(GRID * column)


def moved(start: Frame, end: Frame) -> str:
    """The camera's movement in its first frame, in metres: to the right or left, forward or backward."""
    x, _, z = start.to_camera(end.centre[None])[0]
    return f"{abs(x):.1f} {'Right' if x > 0 else 'Left'}, {abs(z):.1f} {'Forward' if z > 0 else 'Backward'}"
