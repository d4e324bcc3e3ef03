"""What a stock model is shown: its processor's tokens and pixels, labels on answers alone, rows of any kind."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.errors import CheckpointError, InputError
from g2vlm.semantic_images import SemanticRule
from g2vlm.sequence import IGNORED
from g2vlm.stock.layout import StockLayout
from g2vlm.stock.model import FAMILIES
from tests.g2vlm.stock_folders import IMAGE
from tests.train.chats import Colours
from tests.train.stocks import fresh_layout, stock_layout
from train.packing import ChatMixture, PackStream
from train.stock.batch import collate_stock, padded

END = 1


def conversation() -> ChatSample:
    """Two turns with images of several sizes, one of them shown twice."""
    random = np.random.default_rng(0)
    images = tuple(random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 90), (64, 33)))
    later = (Turn(("And now ", ImageAt(1), ImageAt(0), "?"), "A 3D  chair,\nit is 1.5 m away"),)
    return ChatSample((ImageAt(1), "What is  this?"), "red", images, name="two", later=later)


def messages(sample: ChatSample) -> tuple[list[dict[str, Any]], list[Any]]:
    """As people give them to a processor."""
    told, images = [], []
    for turn in sample.shape.turns:
        parts = [{"type": "image"} if isinstance(p, ImageAt) else {"type": "text", "text": p} for p in turn.parts]
        told += [{"role": "user", "content": parts}]
        told += [{"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}]
        images += [Image.fromarray(sample.images[p.index]) for p in turn.parts if isinstance(p, ImageAt)]
    return told, images


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_the_processors(family: str) -> None:
    """Up to the newline after the last answer, and to the rounding of its resizing."""
    layout, sample = stock_layout(family), conversation()
    told, images = messages(sample)
    text = layout.processor.apply_chat_template(told, tokenize=False)
    expected = layout.processor(text=[text], images=images, return_tensors="pt")
    batch = collate_stock([sample], layout)
    assert torch.equal(batch.input_ids, expected["input_ids"][:, :-1])
    assert torch.equal(batch.attention_mask, expected["attention_mask"][:, :-1])
    assert torch.equal(batch.mm_token_type_ids, expected["mm_token_type_ids"][:, :-1].int())
    assert torch.equal(batch.image_grid_thw, expected["image_grid_thw"])
    torch.testing.assert_close(batch.pixel_values, expected["pixel_values"], rtol=0, atol=0.05)
    assert layout.num_tokens(sample.shape) == batch.input_ids.shape[1]


def test_answers_and_their_ends_are_learned_and_nothing_else() -> None:
    layout = stock_layout()
    row = layout.row(conversation().shape)
    spans = [[]]
    for token, label in zip(row.ids, row.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    decode = layout.processor.tokenizer.decode
    assert [decode(own) for own in spans if own] == ["red<|im_end|>", "A 3D  chair,\nit is 1.5 m away<|im_end|>"]
    weights = [weight for weight, label in zip(row.weights, row.labels, strict=True) if label != IGNORED]
    assert weights == [len(own) ** -0.5 for own in spans if own for _ in own]
    assert not any(weight for weight, label in zip(row.weights, row.labels, strict=True) if label == IGNORED)


def test_rows_are_padded_to_the_longest() -> None:
    layout = stock_layout()
    samples = [conversation(), Colours(pictures=0).load(1, 1)]
    batch, alone = collate_stock(samples, layout), [collate_stock([sample], layout) for sample in samples]
    lengths = [len(layout.row(sample.shape).ids) for sample in samples]
    assert batch.input_ids.shape == (2, lengths[0])
    assert padded(lengths) == batch.input_ids.numel()
    assert batch.attention_mask.sum(1).tolist() == lengths
    for row, (length, one) in enumerate(zip(lengths, alone, strict=True)):
        assert torch.equal(batch.input_ids[row, :length], one.input_ids[0, :length])
    assert (batch.input_ids != IMAGE)[1].all()
    assert torch.equal(batch.label_ids, torch.cat([one.label_ids for one in alone]))
    assert torch.equal(batch.label_weights, torch.cat([one.label_weights for one in alone]))
    assert batch.label_ids.tolist().count(END) == 3


@pytest.mark.parametrize("samples", [[], [Colours(pictures=0).load(0, 0)]], ids=["nothing", "text"])
def test_there_is_always_an_image(samples: list[ChatSample]) -> None:
    """Of one token, in a row that teaches nothing."""
    layout = stock_layout()
    batch = collate_stock(samples, layout)
    assert batch.input_ids.shape[0] == len(samples) + 1 == len(batch.clips)
    assert batch.input_ids[-1, :3].tolist() == [2, IMAGE, 3]
    assert batch.image_grid_thw.tolist() == [[1, 2, 2]]
    assert (batch.labels[-1] == IGNORED).all()
    assert len(batch.label_ids) == len(batch.label_weights)
    assert bool(len(batch.label_ids)) == bool(samples)
    assert batch.names == tuple(sample.name for sample in samples)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_placeholders_in_words_are_refused(token: str) -> None:
    with pytest.raises(InputError, match="placeholders"):
        stock_layout().row(ChatShape((Turn((ImageAt(0), f"a {token}"), "b"),), ((30, 30),)))
    with pytest.raises(InputError, match="placeholders"):
        stock_layout().row(ChatShape((Turn(("a",), f"b {token}"),)))


def test_a_rule_with_other_limits() -> None:
    shape = ChatShape((Turn((ImageAt(0), "a"), "b"),), ((400, 400),))
    small = stock_layout().row(shape)
    large = stock_layout(limits=SemanticRule.native(max_pixels=112 * 112)).row(shape)
    assert (small.ids.count(IMAGE), large.ids.count(IMAGE)) == (4, 16)
    with pytest.raises(InputError, match="squash"):
        stock_layout(limits=SemanticRule.official())


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", "changes what came"),
        ("{% for m in messages %}{{ m['role'] }}|{% endfor %}", "end answers with"),
    ],
)
def test_templates_that_cannot_be_learned_from(template: str, told: str) -> None:
    layout = fresh_layout()
    layout.processor.chat_template = template
    with pytest.raises(CheckpointError, match=told):
        layout.row(conversation().shape)
    layout.processor.chat_template = layout.processor.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        StockLayout(layout.processor, layout.rule)


def test_packs_count_their_padding() -> None:
    """Rows of a pack times the longest of them fit; the next item would not have."""
    layout = stock_layout()
    sources = (Colours(3, views=0), Colours(0, views=0), Colours(1, views=0))
    mixture = ChatMixture(sources, (1.0, 1.0, 1.0))
    stream = PackStream(mixture, layout, tokens_per_pack=300, view_size=(28, 28), size=padded)
    packs = stream.packs()
    for _ in range(20):
        pack = next(packs)
        items = [*pack.items, stream.item(pack.end)]
        lengths = [layout.num_tokens(sources[item.source].shape(item.index, item.seed)) for item in items]
        assert pack.num_tokens == sum(lengths[:-1])
        assert padded(lengths[:-1]) <= 300 < padded(lengths)
