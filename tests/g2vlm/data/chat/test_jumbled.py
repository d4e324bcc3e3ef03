"""Jumbled views: what is told of a cell is what it shows after the cells have changed places."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from g2vlm.data.chat.descriptions import GRID, told
from g2vlm.data.chat.jumbled import JumbledRooms, carried, jumbled
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ChatSample, ImageAt
from g2vlm.data.qa.camera_tasks import Point
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from tests.train.chats import layout

SIDE = 84


def room_views(index: int, count: int = 2) -> SceneSample:
    return RoomsSource("any_size", "train", 0, "inquiring").load(index, ViewRequest(count, (SIDE, SIDE), index))


def tiles(image: np.ndarray) -> list[np.ndarray]:
    """The nine cells of (H, W, ...), row by row."""
    return [cell for row in np.split(image, GRID) for cell in np.split(row, GRID, axis=1)]


def test_cells_change_places_with_everything_in_them() -> None:
    scene = room_views(0)
    assert scene.depth is not None
    assert scene.instances is not None
    orders = [[4, 0, 8, 1, 2, 3, 5, 6, 7], list(range(9))]
    mixed = jumbled(scene, orders)
    assert mixed.depth is not None
    assert mixed.instances is not None
    for before, after in (
        (scene.images.permute(0, 2, 3, 1), mixed.images.permute(0, 2, 3, 1)),
        (scene.depth, mixed.depth),
        (scene.instances, mixed.instances),
    ):
        assert torch.equal(before[1], after[1])
        former = tiles(before[0].numpy())
        for cell, tile in enumerate(tiles(after[0].numpy())):
            assert np.array_equal(tile, former[orders[0][cell]])
    for row, column in ((0, 0), (30, 83), (83, 30), (55, 56)):
        point = carried(Point(row, column, 1.0), orders[0], (SIDE, SIDE))
        assert point is not None
        assert mixed.depth[0, point.row, point.column] == scene.depth[0, row, column]


def former_places(sample: ChatSample, view: int, scene: SceneSample) -> list[int | None]:
    """Which former cell each cell shows; None where the dot hides it, or where cells look alike."""
    former = tiles(scene.images[view].permute(1, 2, 0).numpy())
    found = [[i for i, tile in enumerate(former) if np.array_equal(tile, now)] for now in tiles(sample.images[view])]
    return [places[0] if len(places) == 1 else None for places in found]


def test_what_is_told_of_a_cell_is_what_it_shows() -> None:
    source = build_chat_source("rooms_jumbled", None, (SIDE, SIDE), views=[2, 2])
    kinds: set[str] = set()
    for index in range(6):
        sample, scene = source.load(index, index), room_views(index)
        room = RoomsSource("any_size", "train", 0, "inquiring").scene(index)
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(source.shape(index, index))
        names = {thing.index: thing.category for thing in room.instances}
        for view, asked, answer in turns_by_view(sample):
            kinds.add(" ".join(asked.split()[:4]))
            origins = former_places(sample, view, scene)
            assert sum(origin is not None for origin in origins) >= 5
            before = {number: (name, f"{depth:.1f}") for number, name, depth in told(room, scene, view)}
            said = [words.split() for words in answer.split(", ")]
            if asked.startswith("What is marked"):
                ((what, cell, depth),) = said
                rows, columns = np.nonzero((sample.images[view] == (255, 0, 0)).all(axis=-1))
                row, column = round(rows.mean()), round(columns.mean())
                assert int(cell) == 1 + 3 * (row // 28) + column // 28
                hidden = set(range(9)) - {origin for origin in origins if origin is not None}
                assert scene.instances is not None
                owners = tiles(scene.instances[view].numpy())
                assert what in {names[owner] for origin in hidden for owner in owners[origin].flat}
                assert scene.depth is not None
                under = [float(tiles(scene.depth[view].numpy())[origin][row % 28, column % 28]) for origin in hidden]
                assert min(abs(metres - float(depth)) / metres for metres in under) < 0.1
            elif asked.startswith("How far"):
                assert {what: min(d for name, d in before.values() if name == what) for what, _ in said} == dict(said)
                assert {what for what, _ in said} == {name for name, _ in before.values()}
            else:
                assert sorted(number for words in said for number in words[:2] if number.isdigit()) == list("123456789")
                for first, second, depth in said:
                    number, name = (first, second) if asked.startswith("What") else (second, first)
                    origin = origins[int(number) - 1]
                    assert origin is None or (name, depth) == before[origin + 1]
    assert kinds == {"What is where in", "Where is what in", "How far is what", "What is marked in"}


def turns_by_view(sample: ChatSample) -> list[tuple[int, str, str]]:
    """View, question and answer of every turn, whether the views stand apart or together."""
    shown, found = -1, []
    for turn in sample.shape.turns:
        images = [part.index for part in turn.parts if isinstance(part, ImageAt)]
        shown = images[-1] if images else shown
        asked = str(turn.parts[-1]).splitlines()[-1]
        named = [k for k in range(len(sample.images)) if f"frame {k + 1} of" in asked]
        found.append((named[0] if named else shown, asked, turn.answer))
    return found


def test_the_same_seed_gives_the_same_lesson_and_another_another() -> None:
    source = JumbledRooms(views=[1, 2])

    def images(index: int, seed: int) -> Sequence[np.ndarray]:
        return source.load(index, seed).images

    assert all(np.array_equal(a, b) for a, b in zip(images(3, 5), images(3, 5), strict=True))
    assert not np.array_equal(images(3, 5)[0], images(3, 6)[0])
    assert source.load(3, 5).scene is None


def test_views_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(InputError, match=r"cannot jumble views of \(80, 84\)"):
        build_chat_source("rooms_jumbled", None, (80, 84))
