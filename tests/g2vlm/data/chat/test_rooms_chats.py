from dataclasses import replace

import numpy as np
import pytest

from g2vlm.data.chat.descriptions import RoomDescriptions, cell_at, cells, followed, moved, objects
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.rooms import MOST_TEXT, OPENING, RoomsChats
from g2vlm.data.chat.types import ChatSample, ImageAt
from g2vlm.data.qa.boxes import Box
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject, Sighting
from g2vlm.data.qa.showing import GREY
from g2vlm.data.rooms.draws import Draws
from g2vlm.errors import InputError
from tests.train.chats import layout


def test_rooms_give_views_with_depth_and_a_question() -> None:
    source = build_chat_source("rooms_qa", None, (56, 56), views=[2, 3])
    counts = set()
    for index in range(2):
        sample, shape = source.load(index, index), source.shape(index, index)
        assert sample.scene is not None
        assert sample.scene.depth is not None
        assert sample.scene.size == (56, 56)
        assert len(sample.images) == sample.scene.num_views == shape.num_views
        assert sample.answer
        assert sample.task
        assert shape.image_sizes == sample.shape.image_sizes
        text = layout().num_tokens(sample.shape) - (layout().num_tokens(shape) - OPENING - MOST_TEXT)
        assert 0 < text <= OPENING + MOST_TEXT
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(shape)
        again = source.load(index, index)
        assert (again.parts, again.answer) == (sample.parts, sample.answer)
        assert all(np.array_equal(a, b) for a, b in zip(again.images, sample.images, strict=True))
        counts.add(shape.num_views)
    assert counts <= {2, 3}
    with pytest.raises(InputError, match="did you mean split"):
        build_chat_source("rooms_qa", None, (56, 56), splt="train")


def test_questions_about_a_room_are_one_conversation() -> None:
    """In random order, of different tasks; the mark of the one that speaks of it is in the images."""
    source = build_chat_source("rooms_qa", None, (84, 84), questions=6)
    asked = []
    for index in range(6):
        sample = source.load(index, index)
        assert sample.scene is not None
        turns = (sample.parts[-1:], *(turn.parts for turn in sample.later))
        texts = [str(part) for parts in turns for part in parts]
        asked.append(len(texts))
        assert len(set(texts)) == len(texts)
        assert all(turn.answer for turn in sample.later)
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(source.shape(index, index))
        plain = sample.scene.images.permute(0, 2, 3, 1).numpy()
        marked = [bool((view != copy).any()) for view, copy in zip(plain, sample.images, strict=True)]
        assert sum(marked) == sum("marked in red" in text for text in texts) <= 1
    assert max(asked) > 3


def test_every_view_has_a_number() -> None:
    sample = build_chat_source("rooms_qa", None, (56, 56), views=[2, 2]).load(0, 0)
    assert [part if isinstance(part, ImageAt) else part.splitlines()[-1] for part in sample.parts[:4]] == [
        "frame 1 of 2: ", ImageAt(0), "frame 2 of 2: ", ImageAt(1)
    ]  # fmt: skip


def test_rooms_without_the_geometry_encoder() -> None:
    source = build_chat_source("rooms_qa", None, (56, 56), geometry=False)
    sample = source.load(0, 0)
    assert sample.scene is None
    assert sample.shape.num_views == source.shape(0, 0).num_views == 0
    assert len(sample.images) == len(source.shape(0, 0).image_sizes)


def marked_sample(blank: bool = False) -> ChatSample:
    """The first training room that is asked about a marked point."""
    source = RoomsChats(views=(2, 2), view_size=(84, 84), blank=blank)
    samples = (source.load(index, 0) for index in range(60))
    return next(sample for sample in samples if sample.task == "point_depth")


def test_a_marked_point_is_a_small_dot_on_the_semantic_copy_alone() -> None:
    sample = marked_sample()
    assert sample.scene is not None
    plain = sample.scene.images.permute(0, 2, 3, 1).numpy()
    changed = [(view != copy).any(-1) for view, copy in zip(plain, sample.images, strict=True)]
    assert sorted(int(pixels.any()) for pixels in changed) == [0, 1]
    assert 8 <= sum(int(pixels.sum()) for pixels in changed) <= 70, "as large as on the held-out questions' views"


def test_a_blind_model_sees_grey_and_reads_the_same_question() -> None:
    seen, blind = marked_sample(), marked_sample(blank=True)
    assert (blind.parts, blind.answer, blind.shape) == (seen.parts, seen.answer, seen.shape)
    assert blind.scene is not None
    assert bool((blind.scene.images == GREY).all())
    assert all(bool((image == GREY).all()) for image in blind.images)


def test_descriptions_of_rooms() -> None:
    """Nine cells of each view, its objects, its marked point; apart, each view stands before what is said about it."""
    together, apart = (
        build_chat_source("rooms_descriptions", None, (56, 56), views=[2, 3], apart=apart) for apart in (False, True)
    )
    followed_objects = 0
    for index in range(6):
        sample = together.load(index, index)
        count = len(sample.images)
        said = {str(turn.parts[-1]).splitlines()[-1]: turn.answer for turn in (sample.shape.turns)}
        named = [f"frame {k + 1} of {count}" for k in range(count)]
        marked = [name for name in named if f"How deep is the point marked in red in {name}?" in said]
        for name in named:
            assert len(said[f"What is where in {name}?"].split(", ")) == 9
        sought = [answer for asked, answer in said.items() if asked.startswith("In which frames is the ")]
        assert all(1 <= len(answer.split(", ")) <= count for answer in sought)
        followed_objects += len(sought)
        assert len(said) == 3 * count - 1 + len(marked) + len(sought)
        assert sample.parts[:2] == (f"These are frames of a video.\nframe 1 of {count}: ", ImageAt(0))
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(together.shape(index, index))
        alone = apart.load(index, index)
        order: list[int] = []
        for turn in alone.shape.turns:
            order += [part.index for part in turn.parts if isinstance(part, ImageAt)]
            name, asked = named[order[-1]], turn.parts[-1]
            if asked == "What is where in this frame?":
                assert len(turn.answer.split(", ")) == 9
            elif asked == "Which objects, and where?":
                listed = said[f"Which objects are in {name}, and where?"]
                assert sorted(turn.answer.split(", ")) == sorted(listed.split(", "))
            else:
                assert turn.answer == said[f"How deep is the point marked in red in {name}?"]
        assert sorted(order) == list(range(count))
        assert layout().num_tokens(alone.shape) <= layout().num_tokens(apart.shape(index, index))
    assert followed_objects > 4


def test_a_point_is_marked_in_every_view_that_tells_its_depth() -> None:
    source = RoomDescriptions(views=(3, 3), view_size=(84, 84), apart=True)
    marked_views = 0
    for index in range(6):
        sample = source.load(index, index)
        assert sample.scene is not None
        assert sample.scene.depth is not None
        view, depths = 0, {}
        for turn in sample.shape.turns:
            view = next((part.index for part in turn.parts if isinstance(part, ImageAt)), view)
            if turn.parts[-1] == "How deep is the point marked in red?":
                depths[view] = float(turn.answer)
        plain = sample.scene.images.permute(0, 2, 3, 1).numpy()
        for k in range(3):
            red = (sample.images[k] == (255, 0, 0)).all(-1) & (plain[k] != sample.images[k]).any(-1)
            assert red.any() == (k in depths)
            if k in depths:
                rows, columns = np.nonzero(red)
                depth = sample.scene.depth[k][round(rows.mean()), round(columns.mean())]
                assert abs(float(depth) - depths[k]) <= 0.05 + 0.05 * depths[k]
                marked_views += 1
    assert marked_views > 9


def test_cells_are_told_with_their_numbers_in_any_order() -> None:
    source = RoomDescriptions(view_size=(84, 84))
    scene, room = source.rooms.load(0, source.showing.request(0)), source.rooms.scene(0)
    assert scene.depth is not None
    assert scene.instances is not None
    orders = set()
    for view in range(scene.num_views):
        told = cells(room, scene, view, Draws(view)).split(", ")
        orders.add(tuple(int(text[0]) for text in told))
        for text in told:
            row, column = divmod(int(text[0]) - 1, 3)
            part = slice(28 * row, 28 * row + 28), slice(28 * column, 28 * column + 28)
            owners = scene.instances[view][part].flatten().tolist()
            most = max(sorted(set(owners)), key=owners.count)
            named = next(thing.category for thing in room.instances if thing.index == most)
            depth = scene.depth[view][part][scene.instances[view][part] == most]
            assert text[1:] == f" {named} {np.median(depth.numpy()):.1f}"
    assert all(sorted(order) == list(range(1, 10)) for order in orders)
    assert len(orders) == scene.num_views


def test_objects_are_told_with_cells_and_movements_in_the_first_camera() -> None:
    """One camera looks along +y from the origin, the other is 1 m to its right and 2 m behind it, looking back."""
    first, second = np.eye(4), np.eye(4)
    first[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # columns: right +x, down -z, forward +y
    second[:3, :3], second[:3, 3] = first[:3, :3] @ np.diag([-1, 1, -1]), (1, -2, 0)
    box = Box(np.array([0.0, 3.0, 0.0]), np.array([1.0, 1.0, 1.0]), np.eye(3))
    things = tuple(SceneObject(i, name, box) for i, name in enumerate(("bed", "lamp", "sofa")))
    seen = (Sighting(0, (62, 70, 83, 83), 0.1), Sighting(1, (0, 0, 20, 9), 0.2), Sighting(2, (5, 0, 6, 9), 0.001))
    frames = [Frame(float(i), pose, np.eye(3), (84, 84), seen) for i, pose in enumerate((first, second))]
    facts = SceneFacts("room", things, tuple(frames), 20.0)
    told = {objects(facts, frames[0], Draws(seed)) for seed in range(20)}
    assert told == {"bed 9 2.5, lamp 1 2.5", "lamp 1 2.5, bed 9 2.5"}
    assert objects(facts, replace(frames[0], sightings=seen[2:]), Draws(0)) == "none"
    assert [cell_at(box, (84, 84)) for box in ((0, 0, 83, 83), (83, 0, 83, 0), (0, 83, 0, 83))] == [5, 3, 7]
    unseen = replace(frames[0], sightings=seen[1:])
    in_turn = replace(facts, frames=(unseen, frames[0], frames[1]))
    assert [followed(in_turn, thing) for thing in things] == ["2 9 2.5, 3 9 4.5", "1 1 2.5, 2 1 2.5, 3 1 4.5", ""]
    assert moved(frames[0], frames[1]) == "1.0 Right, 2.0 Backward"
    assert moved(frames[1], frames[0]) == "1.0 Right, 2.0 Backward"


def test_questions_about_a_room_come_in_any_order() -> None:
    """Rare tasks are chosen first; their place in the conversation must not tell them."""
    source = build_chat_source("rooms_qa", None, (28, 28), questions=8)
    moved_away = 0
    for index in range(8):
        chosen = source.rooms.load(index, source.showing.request(index), 8).questions
        told = [str(turn.parts[-1]).removeprefix("\n") for turn in source.load(index, index).shape.turns]
        assert sorted(told) == sorted(question.words for question in chosen)
        moved_away += told[0] != chosen[0].words
    assert moved_away


def test_questions_with_options_can_be_asked_openly() -> None:
    """In the same words but for the options, and answered with the right one's."""
    asked, openly = (build_chat_source("rooms_qa", None, (28, 28), questions=8, openly=p) for p in (0.0, 1.0))
    opened = 0
    for index in range(4):
        chosen = asked.rooms.load(index, asked.showing.request(index), 8).questions
        turns = openly.load(index, index).shape.turns
        said = {str(turn.parts[-1]).removeprefix("\n"): turn.answer for turn in turns}
        for question in chosen:
            assert said[question.open_words] == question.answer_text
            assert "Options" not in question.open_words
            opened += bool(question.options)
            assert not question.options or question.words not in said
    assert opened > 4
    half = build_chat_source("rooms_qa", None, (28, 28), questions=8, openly=0.5)
    texts = [str(turn.parts[-1]) for index in range(6) for turn in half.load(index, index).shape.turns]
    assert 0 < sum("Options" in text for text in texts) < len(texts)
