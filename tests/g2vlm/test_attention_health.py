import math

import pytest
import torch

from g2vlm.model.attention import AttnPlan, Block, health
from g2vlm.model.attention.health import PAIRS, AttentionHealth, attention_statistics, watch_attention
from g2vlm.processing import sequence_builder
from tests.g2vlm.chats import CHATS, KINDS, PACKS, chat_model, pack_inputs
from tests.g2vlm.packs import BUILDERS
from tests.g2vlm.packs import PACKS as PLANS


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("builder", BUILDERS.values(), ids=list(BUILDERS))
def test_statistics_equal_the_dense_computation(name: str, builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ROWS", 3)
    packed = builder.build(PLANS[name])
    num_tokens, num_geometry = packed.num_tokens, packed.num_geometry
    q, k = torch.randn(num_tokens, 4, 8) * 3, torch.randn(num_tokens, 2, 8)
    mask = packed.plan.mask()
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) / 8**0.5
    chances = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    geometric = torch.arange(num_tokens) < num_geometry
    expected = {}
    for pair, (rows, columns) in zip(
        PAIRS, [(a, b) for a in (geometric, ~geometric) for b in (geometric, ~geometric)], strict=True
    ):
        allowed = logits[:, mask & rows[:, None] & columns]
        if allowed.numel():
            expected[pair] = float(allowed.max())
    largest, entropy, uniform = attention_statistics(q, k, packed.plan, num_geometry)
    assert largest == pytest.approx(expected, rel=1e-5)
    dense = -(chances * chances.clamp_min(1e-30).log()).sum(dim=-1)
    assert entropy == pytest.approx(float(dense.mean()), rel=1e-5)
    assert uniform == pytest.approx(float(mask.sum(dim=1).double().log().mean()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS[:8], ids="-".join)
def test_watching_a_forward_changes_nothing(kind: tuple[str, str, str, str]) -> None:
    model, samples = chat_model(*kind), PACKS["pack"]
    sequence, inputs = sequence_builder(model.config).build(samples), pack_inputs(samples)
    plain = model(sequence=sequence, **inputs).semantic_hidden
    with watch_attention(model.decoder) as seen:
        watched = model(sequence=sequence, **inputs).semantic_hidden
    assert watched.equal(plain)
    hidden = {"geometric_semantic"} if kind[-1] == "views" else set()
    assert [set(layer) for layer in seen.largest_logits] == [set(PAIRS) - hidden] * 2
    assert all(0 < a < b for a, b in zip(seen.entropy, seen.uniform_entropy, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_saturated_attention_shows() -> None:
    """Queries of one expert a hundred times larger: its pairs' logits grow alone, and entropy falls."""
    model, samples = chat_model(), PACKS["chat"]
    sequence, inputs = sequence_builder(model.config).build(samples), pack_inputs(samples)
    norm = model.decoder.layers[0].geometric.attention.q_norm
    with watch_attention(model.decoder) as before:
        model(sequence=sequence, **inputs)
    with torch.no_grad():
        norm.weight.mul_(100)
    try:
        with watch_attention(model.decoder) as after:
            model(sequence=sequence, **inputs)
    finally:
        with torch.no_grad():
            norm.weight.div_(100)
    first, second = before.largest_logits[0], after.largest_logits[0]
    for pair in PAIRS[:2]:
        assert second[pair] == pytest.approx(100 * first[pair], rel=1e-4)
    for pair in PAIRS[2:]:
        assert second[pair] == first[pair]
    assert after.entropy[0] < 0.8 * before.entropy[0]


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=list(BUILDERS))
def test_half_precision_is_measured_in_single(builder) -> None:
    """Queries and keys are rounded to bfloat16; logits and entropy of the rounded ones are not."""
    packed = builder.build(PLANS["chat"])
    q, k = (torch.randn(packed.num_tokens, heads, 16).bfloat16() * 3 for heads in (4, 2))
    found = attention_statistics(q, k, packed.plan, packed.num_geometry)
    expected = attention_statistics(q.float(), k.float(), packed.plan, packed.num_geometry)
    assert found == expected


def test_summary_over_layers() -> None:
    geo_geo, geo_sem, *_, sem_sem = PAIRS
    health = AttentionHealth(
        [{geo_geo: 1.0, sem_sem: 50.0}, {geo_geo: 3.0, sem_sem: 50.5}, {geo_geo: -2.0}], [1.0, 1.0, 0.4], [2.0] * 3
    )
    assert health.largest == {geo_geo: (3.0, 1), sem_sem: (50.5, 1)}
    assert health.saturated == {sem_sem: (50.5, 1)}
    assert health.relative_entropy == pytest.approx(0.4)
    assert AttentionHealth([{}], [0.0], [0.0]).relative_entropy == 1
    broken = AttentionHealth([{geo_sem: float("nan")}, {geo_sem: 1.0}], [1.0], [1.0])
    assert [*broken.saturated] == [geo_sem]


def test_numbers_that_are_none_show() -> None:
    q = torch.full((3, 2, 4), torch.nan)
    plan = AttnPlan((Block((0, 3), ((0, 3),), causal=True),), 3, 3)
    largest, entropy, _ = attention_statistics(q, q, plan, 0)
    assert math.isnan(largest[PAIRS[3]])
    assert math.isnan(entropy)


def test_a_text_has_one_pair_and_a_cache_is_refused() -> None:
    model, builder = chat_model(), sequence_builder(chat_model().config)
    sequence = builder.build([CHATS["text"]])
    with watch_attention(model.decoder) as seen:
        cache = model(sequence=sequence, use_cache=True).cache
    assert [set(layer) for layer in seen.largest_logits] == [{PAIRS[3]}] * 2
    with pytest.raises(ValueError, match="6 cached keys"), watch_attention(model.decoder):
        model(sequence=builder.extend(sequence, [CHATS["text"]]), cache=cache)
    assert not any(module._forward_hooks for module in model.modules())
