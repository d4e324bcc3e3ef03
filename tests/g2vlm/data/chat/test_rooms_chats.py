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
