"""Jumbled views: what is told of a cell is what it shows after the cells have changed places."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from g2vlm.data.chat.descriptions import GRID, told
from g2vlm.data.chat.jumbled import JumbledRooms, Shown, choices, jumbled, pairs
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ChatSample, ImageAt
from g2vlm.data.rooms import RoomsSource, Scene
from g2vlm.data.rooms.draws import Draws
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
    chosen = [[(0, 4), (1, 0), (0, 8), (0, 1), (1, 2), (0, 3), (0, 5), (1, 6), (0, 0)], [(1, c) for c in range(9)]]
    mixed = jumbled(scene, chosen)
    assert mixed.depth is not None
    assert mixed.instances is not None
    for before, after in (
        (scene.images.permute(0, 2, 3, 1), mixed.images.permute(0, 2, 3, 1)),
        (scene.depth, mixed.depth),
        (scene.instances, mixed.instances),
    ):
        assert torch.equal(before[1], after[1])
        former = [tiles(view.numpy()) for view in before]
        for (view, cell), tile in zip(chosen[0], tiles(after[0].numpy()), strict=True):
            assert np.array_equal(tile, former[view][cell])


def test_every_view_has_one_of_each_name_before_a_second_of_any() -> None:
    names = [["wall"] * 6 + ["floor"] * 3, ["wall"] * 7 + ["lamp", "plant"]]
    chosen = choices(names, Draws(0))
    again = choices(names, Draws(1))
    assert chosen[0] != chosen[1] != again[1]
    for places in (*chosen, *again):
        assert len(set(places)) == 9
        assert {names[view][cell] for view, cell in places} == {"wall", "floor", "lamp", "plant"}
    many = [[f"thing {i}" for i in range(9)], [f"other {i}" for i in range(9)]]
    assert all(len(set(places)) == 9 for places in choices(many, Draws(0)))


Origin = tuple[int, int] | None


def origins(sample: ChatSample, view: int, scene: SceneSample) -> list[Origin]:
    """Which former (view, cell) each cell shows; None where the dot hides it, or where cells look alike."""
    former = {
        (k, c): tile
        for k, image in enumerate(scene.images)
        for c, tile in enumerate(tiles(image.permute(1, 2, 0).numpy()))
    }
    found = [
        [place for place, tile in former.items() if np.array_equal(tile, now)] for now in tiles(sample.images[view])
    ]
    return [places[0] if len(places) == 1 else None for places in found]


def test_what_is_told_of_a_cell_is_what_it_shows() -> None:
    source = build_chat_source("rooms_jumbled", None, (SIDE, SIDE), views=[2, 2])
    kinds: set[str] = set()
    for index in range(12):
        sample, scene = source.load(index, index), room_views(index)
        room = RoomsSource("any_size", "train", 0, "inquiring").scene(index)
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(source.shape(index, index))
        known = {
            (view, number - 1): (name, f"{depth:.1f}")
            for view in (0, 1)
            for number, name, depth in told(room, scene, view)
        }
        for view, asked, answer in turns_by_view(sample):
            kinds.add(" ".join(asked.split()[:4]))
            said = [words.split() for words in answer.split(", ")]
            shown = origins(sample, view, scene)
            seen = [known[origin] for origin in shown if origin]
            assert len(seen) >= 5
            if asked.startswith("What is marked"):
                ((what, cell, depth),) = said
                rows, columns = np.nonzero((sample.images[view] == (255, 0, 0)).all(axis=-1))
                row, column = round(rows.mean()), round(columns.mean())
                assert int(cell) == 1 + 3 * (row // 28) + column // 28
                assert (what, float(depth)) in under(room, scene, set(known) - set(shown), row % 28, column % 28, depth)
            elif asked.startswith("How far"):
                assert {name for name, _ in seen} <= {what for what, _ in said} <= {name for name, _ in known.values()}
                assert all(
                    float(depth) <= min(float(d) for name, d in seen if name == what)
                    for what, depth in said
                    if what in dict(seen)
                )
                assert len({what for what, _ in said}) == len(said)
            elif not asked.startswith("Which is"):
                assert sorted(number for words in said for number in words[:2] if number.isdigit()) == list("123456789")
                for first, second, depth in said:
                    number, name = (first, second) if asked.startswith("What") else (second, first)
                    origin = shown[int(number) - 1]
                    assert origin is None or (name, depth) == known[origin]
    asked_of_cells = {"What is where in", "Where is what in", "How far is what", "What is marked in"}
    assert (
        asked_of_cells
        < kinds
        <= asked_of_cells | {f"Which is {word}" for word in ("nearer in", "further left", "higher in")}
    )


def under(
    room: Scene, scene: SceneSample, cells: set[tuple[int, int]], row: int, column: int, depth: str
) -> set[tuple[str, float]]:
    """Names of what is at a place of the given cells, where its depth is as told within a tenth."""
    assert scene.depth is not None
    assert scene.instances is not None
    names = {thing.index: thing.category for thing in room.instances}
    found = set()
    for view, cell in cells:
        metres = tiles(scene.depth[view].numpy())[cell][row, column]
        if abs(metres - float(depth)) < 0.1 * metres:
            found.add((names[int(tiles(scene.instances[view].numpy())[cell][row, column])], float(depth)))
    return found


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
    source = JumbledRooms(views=[2, 3])

    def images(index: int, seed: int) -> Sequence[np.ndarray]:
        return source.load(index, seed).images

    assert all(np.array_equal(a, b) for a, b in zip(images(3, 5), images(3, 5), strict=True))
    assert not np.array_equal(images(3, 5)[0], images(3, 6)[0])
    assert source.load(3, 5).scene is None


def test_views_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(InputError, match=r"cannot jumble views of \(80, 84\)"):
        build_chat_source("rooms_jumbled", None, (80, 84))


def test_two_things_of_a_view_are_compared() -> None:
    """First the lamp is in the upper left, the sofa in the lower right and nearer. Walls are many, and not compared."""

    def asked(lamp: tuple[int, float], sofa: tuple[int, float]) -> dict[str, str]:
        walls = [(cell, "wall", 0.1) for cell in range(1, 10) if cell not in (lamp[0], sofa[0])]
        view = Shown("this frame", [(lamp[0], "lamp", lamp[1]), (sofa[0], "sofa", sofa[1]), *walls], None)
        turns = [turn for seed in range(8) for turn in pairs(view, Draws(seed))]
        names = {str(turn.parts[0]).split(", ")[1] for turn in turns}
        assert names == {"the lamp or the sofa?", "the sofa or the lamp?"}
        answers = {(str(turn.parts[0]).split(" in this frame")[0], turn.answer) for turn in turns}
        assert len(dict(answers)) == len(answers)
        return dict(answers)

    assert asked((1, 2.0), (9, 1.0)) == {
        "Which is nearer": "sofa",
        "Which is further left": "lamp",
        "Which is higher": "lamp",
    }
    assert asked((6, 1.0), (4, 1.1)) == {"Which is further left": "sofa"}
    assert asked((7, 1.0), (4, 1.2)) == {"Which is nearer": "lamp", "Which is higher": "sofa"}
    assert pairs(Shown("this frame", [(1, "lamp", 1.0), (2, "wall", 1.0), (3, "wall", 2.0)], None), Draws(0)) == []


def test_ways_to_ask_can_be_chosen() -> None:
    plain = build_chat_source("rooms_jumbled", None, (SIDE, SIDE), ways=["cells"])
    for index in range(4):
        turns = plain.load(index, index).shape.turns
        assert all(str(turn.parts[-1]).splitlines()[-1].startswith("What is where in") for turn in turns)
    with pytest.raises(InputError, match="did you mean things"):
        build_chat_source("rooms_jumbled", None, (SIDE, SIDE), ways=["thing"])
