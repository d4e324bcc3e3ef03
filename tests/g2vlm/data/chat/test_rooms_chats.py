from collections.abc import Sequence

import numpy as np
import pytest

from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.rooms import MOST_TEXT
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
        text = layout().num_tokens(sample.shape) - (layout().num_tokens(shape) - MOST_TEXT)
        assert 0 < text <= MOST_TEXT
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
    source = build_chat_source("rooms_qa", None, (56, 56), questions=6)
    asked = []
    for index in range(6):
        sample = source.load(index, index)
        asked.append(1 + len(sample.later))
        texts = [str(part) for turn in (sample, *sample.later) for part in turn.parts if isinstance(part, str)]
        assert len(texts) == len(set(texts)) == asked[-1]
        assert all(turn.answer for turn in sample.later)
        assert layout().num_tokens(sample.shape) <= layout().num_tokens(source.shape(index, index))
        speaks, red = ["marked in red" in text for text in texts], num_red(sample.images)
        assert sum(speaks) <= 1
        assert (red == 1) == any(speaks)
    assert max(asked) > 3


def num_red(images: Sequence[np.ndarray]) -> int:
    """Images with a pixel of the marks' colour."""
    return sum(bool((image == (255, 0, 0)).all(-1).any()) for image in images)


def test_a_blind_model_sees_grey() -> None:
    shown, blank = (build_chat_source("rooms_qa", None, (56, 56), questions=4, blank=blank) for blank in (False, True))
    for index in range(3):
        seen, blind = shown.load(index, index), blank.load(index, index)
        assert (seen.parts, seen.answer, seen.later) == (blind.parts, blind.answer, blind.later)
        assert blind.scene is not None
        assert {*np.unique(blind.images), *blind.scene.images.unique().tolist()} == {128}
        assert seen.shape == blind.shape


def test_rooms_without_the_geometry_encoder() -> None:
    source = build_chat_source("rooms_qa", None, (56, 56), geometry=False)
    sample = source.load(0, 0)
    assert sample.scene is None
    assert sample.shape.num_views == source.shape(0, 0).num_views == 0
    assert len(sample.images) == len(source.shape(0, 0).image_sizes)
