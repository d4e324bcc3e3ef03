"""Views put together from nine cells of a room's views: lessons in finding the cell that a number or a name speaks of.

In a room the place tells much of what is there: floors are below. A model that describes whole views leans on that, and
is slow to learn which token a number means. Here the number alone leads there. Most of what is seen is wall and floor;
here as many different things as the room has are in every view, so that most names mean one cell.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from g2vlm.data.chat.descriptions import GRID, after_images, cell_at, listed, some_point, told
from g2vlm.data.chat.rooms import OPENING, Showing
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.camera_tasks import Point, mark_at
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.question import frame_name
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.registry import unknown
from g2vlm.data.rooms import RoomsSource, Scene
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError

WAYS_OF_A_VIEW, MOST_TEXT = 2, 260
"""Ways in which a view is asked about, and tokens that packs reserve for what is said about it."""

CLEARLY = 1.15
"""Of two things, the nearer one is asked for only if the other is so many times as deep."""


@dataclass(frozen=True)
class Shown:
    """What is known of a jumbled view.

    Args:
        name: how a question names it.
        cells: number, name and depth of each.
        dot: name, cell and depth of what is under it; None without a dot.
    """

    name: str
    cells: Sequence[tuple[int, str, float]]
    dot: tuple[str, int, float] | None


def cells(view: Shown, draws: Draws) -> list[Turn]:
    """Number, name and depth of every cell."""
    return [Turn((f"What is where in {view.name}?",), listed(view.cells, draws))]


def things(view: Shown, draws: Draws) -> list[Turn]:
    """Name, number and depth of every cell."""
    found = [f"{what} {cell} {depth:.1f}" for cell, what, depth in draws.shuffled(view.cells)]
    return [Turn((f"Where is what in {view.name}?",), ", ".join(found))]


def distances(view: Shown, draws: Draws) -> list[Turn]:
    """Every name once, with the smallest depth of its cells."""
    least: dict[str, float] = {}
    for _, what, depth in draws.shuffled(view.cells):
        least[what] = min(depth, least.get(what, depth))
    found = [f"{what} {depth:.1f}" for what, depth in least.items()]
    return [Turn((f"How far is what in {view.name}?",), ", ".join(found))]


def dot(view: Shown, draws: Draws) -> list[Turn]:
    """Name, cell and depth of what is marked."""
    if view.dot is None:
        return []
    what, cell, depth = view.dot
    return [Turn((f"What is marked in red in {view.name}, and where?",), f"{what} {cell} {depth:.1f}")]


def pairs(view: Shown, draws: Draws) -> list[Turn]:
    """Which of two things with one cell each is nearer, further left, higher; not asked where it is neither."""
    counts = Counter(what for _, what, _ in view.cells)
    single = [(cell, what, depth) for cell, what, depth in draws.shuffled(view.cells) if counts[what] == 1]
    if len(single) < 2:
        return []
    (cell, one, depth), (other_cell, other, other_depth) = single[:2]
    (row, column), (other_row, other_column) = divmod(cell - 1, GRID), divmod(other_cell - 1, GRID)
    turns = []
    for word, mine, others, margin in (
        ("nearer", depth, other_depth, CLEARLY),
        ("further left", column + 1, other_column + 1, 1.0),
        ("higher", row + 1, other_row + 1, 1.0),
    ):
        if max(mine, others) > margin * min(mine, others):
            asked = f"Which is {word} in {view.name}, the {one} or the {other}?"
            turns.append(Turn((asked,), one if mine < others else other))
    return draws.shuffled(turns)


WAYS: Mapping[str, Callable[[Shown, Draws], list[Turn]]] = {
    "cells": cells,
    "things": things,
    "distances": distances,
    "dot": dot,
    "pairs": pairs,
}
"""How a view is asked about.

To learn what stands where is to learn two things at once, to find a thing and to tell its place, and neither helps
without the other. So there are things to find that need no place: how far something is, and what is marked.
"""


class JumbledRooms:
    """What is where in jumbled views, asked for in several ways; a red dot is where a question speaks of it.

    The views stand before the first question, or, as often, each before what is said about it. The geometry encoder
    gets none: they are no views of a scene.

    Args:
        split, seed, law, cameras: as of `RoomsQA`.
        views, view_size: as of `Showing`.
        ways: keys of `WAYS`; two of them are drawn for a view.

    Raises:
        InputError: the views cannot be cut into three rows and three columns, or an unknown way.
    """

    name = "rooms_jumbled"

    def __init__(
        self,
        split: Any = "train",
        seed: int = 0,
        law: str = "any_size",
        cameras: str = "inquiring",
        views: Sequence[int] = (3, 4),
        view_size: Sequence[int] = (84, 84),
        ways: Sequence[str] = tuple(WAYS),
    ):
        if any(length % GRID for length in view_size):
            raise InputError(f"cannot jumble views of {tuple(view_size)}", f"sides must divide by {GRID}", "view_size")
        for way in ways:
            if way not in WAYS:
                raise unknown("way to ask about a view", way, list(WAYS))
        self.rooms, self.ways = RoomsSource(law, split, seed, cameras), tuple(ways)
        self.showing = Showing((views[0], views[1]), (view_size[0], view_size[1]), geometry=False, blank=False)

    def __len__(self) -> int:
        return len(self.rooms)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text."""
        return self.showing.shape(seed, OPENING + self.showing.request(seed).num_views * MOST_TEXT)

    def load(self, index: int, seed: int) -> ChatSample:
        """Views put together from those of a room, and what is in their cells."""
        scene, room = self.rooms.load(index, self.showing.request(seed)), self.rooms.scene(index)
        draws = stream("jumbled", seed, index)
        names = [[name for _, name, _ in told(room, scene, k)] for k in range(scene.num_views)]
        mixed = jumbled(scene, choices(names, draws))
        assert mixed.depth is not None
        frames = [replace(f, depth=d.numpy()) for f, d in zip(room_facts(room, scene).frames, mixed.depth, strict=True)]
        alone, count = draws.chance(0.5), scene.num_views
        said, marks = [], []
        for k, frame in enumerate(frames):
            ways = draws.shuffled(self.ways)[:WAYS_OF_A_VIEW]
            point = some_point(frame, draws) if "dot" in ways else None
            marks += [mark_at(k, frame, point)] if point else []
            under = marked(room, mixed, k, point) if point else None
            view = Shown("this frame" if alone else frame_name(k, count), told(room, mixed, k), under)
            said.append([turn for way in ways for turn in WAYS[way](view, draws)] or cells(view, draws))
        turns = apart(said) if alone else after_images(count, draws.shuffled([turn for view in said for turn in view]))
        return replace(self.showing.sample(mixed, turns, self.name, self.name, marks), clip=None)


def apart(said: Sequence[Sequence[Turn]]) -> list[Turn]:
    """Each view, then what is said about it."""
    turns = []
    for k, (first, *later) in enumerate(said):
        turns += [replace(first, parts=(ImageAt(k), *first.parts)), *later]
    return turns


def marked(room: Scene, scene: SceneSample, view: int, point: Point) -> tuple[str, int, float]:
    """Name, cell and depth of what is under a dot."""
    assert scene.instances is not None
    what = next(t.category for t in room.instances if t.index == scene.instances[view, point.row, point.column])
    pixel = (point.column, point.row, point.column, point.row)
    return what, cell_at(pixel, scene.size), point.depth


def choices(names: Sequence[Sequence[str]], draws: Draws) -> list[list[tuple[int, int]]]:
    """Nine cells (view, cell) of all views for every view, in random order: one of each name before a second of any.

    Args:
        names: of what fills the cells, view by view.
        draws: random numbers.
    """
    every, chosen = [(view, cell) for view, cells in enumerate(names) for cell in range(len(cells))], []
    for _ in names:
        order = draws.shuffled(every)
        first = {names[view][cell]: (view, cell) for view, cell in order}
        distinct = list(first.values())
        others = [place for place in order if place not in distinct]
        chosen.append(draws.shuffled([*distinct, *others][: GRID**2]))
    return chosen


def jumbled(scene: SceneSample, choices: Sequence[Sequence[tuple[int, int]]]) -> SceneSample:
    """Cell c of view v is the former cell `choices[v][c]` (view, cell), all from 0."""
    assert scene.instances is not None
    assert scene.depth is not None
    images, instances, depth = (_moved(values, choices) for values in (scene.images, scene.instances, scene.depth))
    return replace(scene, images=images, instances=instances, depth=depth)


def _moved(views: Tensor, choices: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """(V, ..., H, W)."""
    moved = views.clone()
    for target, chosen in zip(moved, choices, strict=True):
        for to, (view, place) in enumerate(chosen):
            target[_cell(to, views.shape)] = views[view][_cell(place, views.shape)]
    return moved


def _cell(number: int, shape: Sequence[int]) -> tuple[Any, ...]:
    row, column = divmod(number, GRID)
    height, width = shape[-2] // GRID, shape[-1] // GRID
    return ..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
