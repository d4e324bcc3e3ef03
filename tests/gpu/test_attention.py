"""The default attention backend against the oracle on every device."""

from collections.abc import Callable

import pytest
import torch

from g2vlm.model.attention import AttnPlan, Block, attend
from tests.g2vlm.test_attention_backends import PLANS, named_plan, output_and_gradients, qkv
from tests.gpu.devices import DEVICES

# Each is about ten roundings of values around one, through the softmax and its gradient.
TOLERANCES = {torch.bfloat16: 0.1, torch.float32: 5e-4}


def assert_sdpa_equals_eager(plan: AttnPlan, device: str, dtype: torch.dtype) -> None:
    inputs = [x.detach().to(device).requires_grad_() for x in qkv(plan, (12, 2), 128, dtype)]
    outputs = [output_and_gradients((inputs[0], inputs[1], inputs[2]), plan, name) for name in ("sdpa", "eager")]
    for fast, slow in zip(*outputs, strict=True):
        torch.testing.assert_close(fast, slow, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@named_plan
def test_sdpa_equals_eager_on_cuda(plan: AttnPlan, dtype: torch.dtype) -> None:
    assert_sdpa_equals_eager(plan, "cuda", dtype)


@pytest.mark.parametrize("name", ["chat-frame-causal", "packed-global-full", "decode", "causal_several_ranges"])
def test_sdpa_equals_eager_with_the_released_head_sizes(name: str) -> None:
    assert_sdpa_equals_eager(PLANS[name], "cpu", torch.float32)


def allocated_by(run: Callable[[], object]) -> int:
    """Bytes at the peak of a call on CUDA above those before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_after_a_long_prefix_makes_no_mask_on_cuda(causal: bool) -> None:
    num_queries, num_keys = 4096, 32768
    plan = AttnPlan((Block((0, num_queries), ((0, num_keys),), causal),), num_queries, num_keys)
    q, k, v = (x.detach().cuda() for x in qkv(plan, (12, 2), 128, torch.bfloat16))
    assert allocated_by(lambda: attend(q, k, v, plan, backend="sdpa")) < num_queries * num_keys  # a bool mask alone


@DEVICES
def test_the_result_is_on_the_device_and_in_the_precision_of_the_queries(device: str) -> None:
    plan = PLANS["chat-global-full"]
    q, k, v = (x.detach().to(device) for x in qkv(plan, (4, 2), 64, torch.bfloat16))
    out = attend(q, k, v, plan)
    assert (out.device.type, out.dtype, out.shape) == (device, torch.bfloat16, q.shape)
