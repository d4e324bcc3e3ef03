"""What a cache continues equals the whole computed at once, for every attention pattern."""

import copy

import pytest
import torch
from torch import Tensor

from g2vlm.generation import Prefix, prefill
from g2vlm.model.cache import KVCache, Rows
from g2vlm.processing import sequence_builder
from g2vlm.sequence import Sample, Text
from tests.g2vlm.chats import (
    CHATS,
    HEADER,
    KINDS,
    PACKS,
    QUESTION,
    VIEWS,
    chat_model,
    deepstack_model,
    pack_inputs,
    pixels,
)

kind_ = pytest.mark.parametrize("kind", KINDS, ids="-".join)
pack_ = pytest.mark.parametrize("samples", [pytest.param(samples, id=name) for name, samples in PACKS.items()])
ANSWER = (30, 31, 32, 33)


def last_logits(model, sequence, **inputs) -> Tensor:
    """(samples, vocab) where the next tokens are predicted."""
    return model(sequence=sequence, logits_at=torch.tensor(sequence.last_tokens), **inputs).logits


@kind_
@pack_
@torch.inference_mode()
def test_cached_decoding_equals_uncached(kind: tuple[str, str, str, str], samples: list[Sample]) -> None:
    """Token by token in rows of different lengths, against one forward over everything that was said so far."""
    assert_cached_decoding_equals_uncached(chat_model(*kind), samples)


@pack_
@torch.inference_mode()
def test_cached_decoding_with_interleaved_rotation_and_deepstack(samples: list[Sample]) -> None:
    assert_cached_decoding_equals_uncached(deepstack_model(), samples)


@torch.inference_mode()
def test_images_that_continue_a_cache_bring_their_deepstack_features() -> None:
    model, chat = deepstack_model(), CHATS["images"]
    prefix = prefill(model, chat[:3], **pixels(chat[:3]).as_dict())
    prefix = prefill(model, chat[3:], **pixels(chat[3:]).as_dict(), after=prefix)
    whole = prefill(model, chat, **pixels(chat).as_dict())
    for one, other in zip(tensors(prefix), tensors(whole), strict=True):
        torch.testing.assert_close(one, other)


def assert_cached_decoding_equals_uncached(model, samples: list[Sample]) -> None:
    inputs = pack_inputs(samples)
    builder = sequence_builder(model.config)
    sequence = builder.build(samples)
    output = model(sequence=sequence, use_cache=True, **inputs)
    rows = Rows.after(sequence, output.cache, room=len(ANSWER))
    for i, token in enumerate(ANSWER):
        decoded = model.decode(torch.tensor([token + row for row in range(len(samples))]), rows)
        said = [[*s, Text(tuple(t + row for t in ANSWER[: i + 1]))] for row, s in enumerate(samples)]
        torch.testing.assert_close(decoded, last_logits(model, builder.build(said), **inputs))
    assert rows.room == 0


@kind_
@pack_
@torch.inference_mode()
def test_one_prefill_equals_segment_by_segment(kind: tuple[str, str, str, str], samples: list[Sample]) -> None:
    model, builder = chat_model(*kind), sequence_builder(chat_model(*kind).config)
    sequence, cache, geometric = None, None, []
    for step in range(max(map(len, samples))):
        segments = [sample[step : step + 1] for sample in samples]
        if sequence is None:
            sequence = builder.build(segments)
        else:
            sequence = builder.extend(sequence, segments)
        output = model(sequence=sequence, cache=cache, use_cache=True, **pack_inputs(segments))
        cache = output.cache
        geometric.append(output.geometric_hidden)
    whole = model(sequence=builder.build(samples), use_cache=True, **pack_inputs(samples))
    assert sequence is not None
    next_token = [[Text((35,))]] * len(samples)
    expected = last_logits(model, builder.extend(builder.build(samples), next_token), cache=whole.cache)
    torch.testing.assert_close(last_logits(model, builder.extend(sequence, next_token), cache=cache), expected)
    assert sum(len(part) for part in geometric) == len(whole.geometric_hidden)
    if len(samples) == 1:
        torch.testing.assert_close(torch.cat(geometric), whole.geometric_hidden)


def tensors(prefix: Prefix) -> list[Tensor]:
    return [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]


def test_a_cache_is_not_changed_by_what_continues_it() -> None:
    model = chat_model()
    prefix = prefill(model, CHATS["chat"], **pixels(CHATS["chat"]).as_dict())
    before = [tensor.clone() for tensor in tensors(prefix)]
    longer = prefill(model, [VIEWS], pixels([VIEWS]).views, after=prefix)
    assert longer.num_tokens == prefix.num_tokens + 3 * 8
    assert all(a.equal(b) for a, b in zip(tensors(prefix), before, strict=True))


def test_the_cache_is_kept_only_when_asked_for() -> None:
    model = chat_model()
    sequence = sequence_builder(model.config).build([[HEADER]])
    assert model(sequence=sequence).cache is None
    cache = model(sequence=sequence, use_cache=True).cache
    assert cache.num_tokens == len(HEADER.ids)
    longer = sequence_builder(model.config).extend(sequence, [[QUESTION]])
    assert model(sequence=longer, cache=cache).cache is None


def test_a_cache_that_does_not_fit_is_refused() -> None:
    model = chat_model()
    builder = sequence_builder(model.config)
    sequence = builder.build([[HEADER]])
    longer = builder.extend(sequence, [[QUESTION]])
    with pytest.raises(ValueError, match="the cache holds 0 tokens; the sequence continues 3"):
        model(sequence=longer)
    with pytest.raises(ValueError, match="the cache holds 3 tokens; the sequence continues 0"):
        model(sequence=sequence, cache=model(sequence=sequence, use_cache=True).cache)


@torch.inference_mode()
def test_rows_of_one_length_need_no_mask() -> None:
    model = chat_model()
    sequence = sequence_builder(model.config).build([[HEADER], [QUESTION]])
    cache: KVCache = model(sequence=sequence, use_cache=True).cache
    rows = Rows.after(sequence, cache, room=2)
    assert rows.visible is None
    assert rows.keys[0].shape == (2, 2, len(HEADER.ids) + 2, 8)
    assert rows.repeated(3).positions.tolist() == [3] * 6


@torch.inference_mode()
def test_bfloat16_decoding_stays_close() -> None:
    """The rows have the weights' precision, and each step goes through the same casts as the whole."""
    model = copy.deepcopy(chat_model()).to(torch.bfloat16)
    builder = sequence_builder(model.config)
    sequence = builder.build([CHATS["text"]])
    rows = Rows.after(sequence, model(sequence=sequence, use_cache=True).cache, room=1)
    decoded = model.decode(torch.tensor([30]), rows)
    expected = last_logits(model, builder.build([[*CHATS["text"], Text((30,))]]))
    assert decoded.dtype == rows.keys[0].dtype == torch.bfloat16
    assert (decoded - expected).abs().max() < 0.05 * expected.abs().max()
