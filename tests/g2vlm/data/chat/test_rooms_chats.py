import numpy as np
import pytest

from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.rooms import MOST_TEXT, RoomsChats
from g2vlm.data.chat.types import ChatSample
from g2vlm.data.qa.showing import GREY
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
    assert 8 <= sum(int(pixels.sum()) for pixels in changed) <= 40, "as large as on the held-out questions' views"


def test_a_blind_model_sees_grey_and_reads_the_same_question() -> None:
    seen, blind = marked_sample(), marked_sample(blank=True)
    assert (blind.parts, blind.answer, blind.shape) == (seen.parts, seen.answer, seen.shape)
    assert blind.scene is not None
    assert bool((blind.scene.images == GREY).all())
    assert all(bool((image == GREY).all()) for image in blind.images)
