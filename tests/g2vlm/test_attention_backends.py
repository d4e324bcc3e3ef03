import logging

import pytest
import torch
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.model.attention import AttnPlan, Block, attend, register, registry, sdpa
from g2vlm.sequence import Sample, Text
from tests.g2vlm.packs import BUILDERS, CHAT, OTHER, PACKS, RECON, TEXT, random_layout

QKV = tuple[Tensor, Tensor, Tensor]
HEADS = [(12, 2), (4, 4), (4, 2)]
PLANS: dict[str, AttnPlan] = {
    **{f"{pack}-{mode}": BUILDERS[mode].build(PACKS[pack]).plan for pack in PACKS for mode in BUILDERS},
    **{f"splits{seed}": random_layout(seed).plan() for seed in range(8)},
    "decode": BUILDERS["global-full"].extend(BUILDERS["global-full"].build([CHAT]), [[Text((1,))]]).plan,
    "continued": BUILDERS["global-full"].extend(BUILDERS["global-full"].build([CHAT]), [OTHER]).plan,
    "continued_pack": BUILDERS["frame-full"].extend(BUILDERS["frame-full"].build([RECON, OTHER]), [CHAT, []]).plan,
    "questions": BUILDERS["global-full"].extend(BUILDERS["global-full"].build([CHAT]), [TEXT] * 2, [0, 0]).plan,
    "causal_short": AttnPlan((Block((0, 3), ((2, 11),), True),), 3, 12),
    "causal_several_ranges": AttnPlan((Block((0, 3), ((7, 9), (0, 2), (3, 7)), True),), 3, 10),
    "empty": AttnPlan((), 0, 4),
}
named_plan = pytest.mark.parametrize("plan", [pytest.param(plan, id=name) for name, plan in PLANS.items()])


def qkv(plan: AttnPlan, heads: tuple[int, int], dim: int, dtype: torch.dtype = torch.float32) -> QKV:
    query, key = (plan.num_queries, heads[0], dim), (plan.num_keys, heads[1], dim)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (query, key, key))
    return q, k, v


def output_and_gradients(inputs: QKV, plan: AttnPlan, backend: str) -> list[Tensor]:
    out = attend(*inputs, plan, backend=backend)
    weights = torch.sin(torch.arange(out.numel(), dtype=out.dtype, device=out.device)).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@named_plan
def test_sdpa_equals_eager(plan: AttnPlan, heads: tuple[int, int], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients in fp32; small tiles so that causal blocks span several."""
    monkeypatch.setattr(sdpa, "TILE_ROWS", 2)
    inputs = qkv(plan, heads, dim)
    for fast, slow in zip(*(output_and_gradients(inputs, plan, name) for name in ("sdpa", "eager")), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@named_plan
def test_sdpa_equals_eager_in_bfloat16(plan: AttnPlan) -> None:
    inputs = qkv(plan, (4, 2), 64, torch.bfloat16)
    fast, slow = (attend(*inputs, plan, backend=name) for name in ("sdpa", "eager"))
    assert fast.dtype == slow.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, rtol=2e-2, atol=2e-2)  # three bf16 roundings of values around 1


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention query by query and head by head."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys, values = k[mask[i], head // group], v[mask[i], head // group]
            out[i, head] = (scale * keys @ q[i, head]).softmax(0) @ values
    return out


@pytest.mark.parametrize("name", ["chat-global-full", "packed-frame-causal", "causal_several_ranges"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_eager_equals_a_loop(name: str, scale: float | None) -> None:
    plan = PLANS[name]
    q, k, v = (x.detach() for x in qkv(plan, (4, 2), 8, torch.float64))
    expected = naive(q, k, v, plan.mask(), scale or 8**-0.5)
    for backend in ("eager", "sdpa"):
        out = attend(q, k, v, plan, scale=scale, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


PADDING: Sample = [Text((0,) * 5)]


@pytest.mark.parametrize("second", [pytest.param(OTHER, id="sample"), pytest.param(PADDING, id="padding")])
@pytest.mark.parametrize("mode", BUILDERS)
def test_what_is_packed_behind_changes_nothing(mode: str, second: Sample) -> None:
    alone, packed = (BUILDERS[mode].build(samples) for samples in ([CHAT], [CHAT, second]))
    x = torch.randn(packed.num_tokens, 12, 64)  # in sequence order
    outputs = []
    for sequence in (alone, packed):
        q = x[: sequence.num_tokens][sequence.inverse_order]
        outputs.append(attend(q, q[:, :2], q[:, 2:4], sequence.plan)[sequence.order])
    torch.testing.assert_close(outputs[1][: alone.num_tokens], outputs[0], rtol=0, atol=1e-6)


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Arguments of every scaled_dot_product_attention call of the sdpa backend."""
    calls, real = [], sdpa.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        calls.append({"query": query, "key": key, "value": value, **options})
        return real(query, key, value, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    return calls


def test_sdpa_reads_views_and_masks_nothing_in_recon(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS["recon-global-full"]
    calls = recorded_calls(monkeypatch)
    q, k, v = (x.detach() for x in qkv(plan, (4, 2), 64))
    attend(q, k, v, plan, backend="sdpa")
    assert len(calls) == len(plan.blocks)
    for call in calls:
        assert "attn_mask" not in call
        assert call["enable_gqa"]
        for name, whole in (("query", q), ("key", k), ("value", v)):
            assert call[name].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_sdpa_needs_no_mask_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_calls(monkeypatch)
    attend(*qkv(PLANS["decode"], (4, 2), 64), PLANS["decode"], backend="sdpa")
    assert ["attn_mask" in call or call["is_causal"] for call in calls] == [False]


def test_sdpa_never_masks_more_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = AttnPlan((Block((0, 600), ((0, 700),), True),), 600, 700)
    calls = recorded_calls(monkeypatch)
    attend(*qkv(plan, (4, 2), 8), plan, backend="sdpa")
    assert [tuple(call["attn_mask"].shape) for call in calls] == [(256, 356), (256, 612), (88, 700)]
    assert not any(call.get("enable_gqa") for call in calls)


# The registry.

Tiny = tuple[AttnPlan, QKV]


@pytest.fixture
def tiny() -> Tiny:
    plan = AttnPlan((Block((0, 2), ((0, 2),), False),), 2, 2)
    return plan, qkv(plan, (2, 2), 4)


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    registry._announce.cache_clear()


def ones(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, scale: float) -> Tensor:
    return torch.ones_like(q)


def test_registered_backend_runs_by_argument_and_by_environment(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, inputs = tiny
    register("ones", ones)
    assert (attend(*inputs, plan, backend="ones") == 1).all()
    assert not (attend(*inputs, plan) == 1).all()
    monkeypatch.setenv(registry.ENVIRONMENT, "ones")
    assert (attend(*inputs, plan) == 1).all()
    assert not (attend(*inputs, plan, backend="eager") == 1).all()


def test_refusal_rule_gets_the_request(tiny: Tiny) -> None:
    plan, inputs = tiny
    asked = []
    register("curious", ones, lambda request: asked.append(request))
    attend(*inputs, plan, backend="curious")
    with torch.no_grad():
        attend(*inputs, plan, backend="curious")
    expected = registry.Request(plan, torch.device("cpu"), torch.float32, 4, 2, 2, needs_grad=True)
    assert asked[0] == expected
    assert not asked[1].needs_grad


def test_refusing_and_unknown_backends_raise_with_the_reason(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, inputs = tiny
    register("picky", ones, lambda request: "needs a CUDA device")
    with pytest.raises(InputError, match=r"(?s)'picky', named by the caller.*needs a CUDA device.*eager, sdpa"):
        attend(*inputs, plan, backend="picky")
    monkeypatch.setenv(registry.ENVIRONMENT, "missing")
    with pytest.raises(InputError, match=r"(?s)'missing', named by G2VLM_ATTENTION.*no backend of this name"):
        attend(*inputs, plan)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register("sdpa", ones)


def test_choice_is_logged_once(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    plan, inputs = tiny
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attend(*inputs, plan)
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa (chosen automatically)"]


def test_shapes_are_checked(tiny: Tiny) -> None:
    plan, (q, k, v) = tiny
    with pytest.raises(ValueError, match="as wide as q"):
        attend(q[..., :2], k, v, plan)
    with pytest.raises(ValueError, match="not a multiple of 2 key heads"):
        attend(torch.cat([q, q[:, :1]], dim=1), k, v, plan)
    with pytest.raises(ValueError, match="plan is for 2 queries"):
        attend(q[:1], k, v, plan)
