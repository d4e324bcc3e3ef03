"""Descriptions of rendered rooms: what is where in a view, and how the camera moved. Dense lessons beside questions.

A question about a room teaches a word or two; a description teaches dozens, each about another place of the views.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.chat.rooms import OPENING, Showing
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.boxes import point_distance
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.facts import Frame, SceneFacts
from g2vlm.data.qa.question import PRE_PROMPT, frame_name, placed_frames
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.rules import STILLS
from g2vlm.data.rooms import RoomsSource, Scene
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.types import SceneSample
from g2vlm.prompts import place_images

GRID = 3
"""Rows and columns of the cells that a description names."""
MOST_TEXT, MOST_APART = 180, 120
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
        turns = describe(room, scene, room_facts(room, scene), draws)
        return self.showing.sample(scene, turns, self.name, self.name)


def apart(room: Scene, scene: SceneSample, facts: SceneFacts, draws: Draws) -> list[Turn]:
    """Every view with what its cells show, and its objects."""
    turns = []
    for k in draws.shuffled(range(scene.num_views)):
        turns.append(Turn((ImageAt(k), "What is in this frame?"), cells(room, scene, k)))
        turns.append(Turn(("Which objects, from left to right?",), objects(facts, facts.frames[k])))
    return turns


def together(room: Scene, scene: SceneSample, facts: SceneFacts, draws: Draws) -> list[Turn]:
    """All views; then, of each in random order, cells and objects, and the camera's way to the next."""
    names, turns = [frame_name(k, scene.num_views) for k in range(scene.num_views)], []
    for k, (name, frame) in enumerate(zip(names, facts.frames, strict=True)):
        turns.append(Turn((f"What is in {name}?",), cells(room, scene, k)))
        turns.append(Turn((f"Which objects are in {name}, from left to right?",), objects(facts, frame)))
    for (start, end), (first, second) in zip(pairwise(facts.frames), pairwise(names), strict=True):
        turns.append(Turn((f"How did the camera move between {first} and {second}?",), moved(start, end)))
    first, *later = draws.shuffled(turns)
    images = [ImageAt(k) for k in range(scene.num_views)]
    words = f"{PRE_PROMPT}{placed_frames(scene.num_views)}{first.parts[0]}"
    return [Turn(tuple(place_images(words, images)), first.answer), *later]


def cells(room: Scene, scene: SceneSample, view: int) -> str:
    """Depth in metres and name of what fills most of each cell of a view, row by row."""
    assert scene.instances is not None
    assert scene.depth is not None
    names = {thing.index: thing.category for thing in room.instances}
    instances, depths = (_cells(values[view].numpy()) for values in (scene.instances, scene.depth))
    found = []
    for owner, depth in zip(instances, depths, strict=True):
        values, counts = np.unique(owner, return_counts=True)
        most = int(values[counts.argmax()])
        found.append(f"{np.median(depth[owner == most]):.1f} {names[most]}")
    return ", ".join(found)


def _cells(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for row in np.array_split(values, GRID):
        yield from np.array_split(row, GRID, axis=1)


def objects(facts: SceneFacts, frame: Frame) -> str:
    """What is seen well in a frame, from left to right, each with its distance from the camera in metres."""
    seen = [s for s in frame.sightings if s.share >= STILLS.min_share and s.instance in facts.by_instance]
    things = [facts.by_instance[s.instance] for s in sorted(seen, key=lambda s: s.box[0] + s.box[2])]
    named = [thing for thing in things if thing.category not in facts.unclear]
    distances = [float(point_distance(frame.centre[None], thing.box)[0]) for thing in named]
    return ", ".join(f"{d:.1f} {thing.category}" for d, thing in zip(distances, named, strict=True)) or "none"


def moved(start: Frame, end: Frame) -> str:
    """The camera's movement in its first frame, in metres: to the right or left, forward or backward."""
    x, _, z = start.to_camera(end.centre[None])[0]
    return f"{abs(x):.1f} {'Right' if x > 0 else 'Left'}, {abs(z):.1f} {'Forward' if z > 0 else 'Backward'}"
