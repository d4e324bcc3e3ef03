"""The whole model on every device: close to the CPU in float32, and never waiting for the host inside the decoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import relative_error
from benchmarks.models import cast_weights, prediction_tensors, random_model, random_views
from g2vlm.config import PRESETS
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs, sequence_builder
from g2vlm.sequence import GeometryViews, SemanticImage, Text
from tests.gpu.devices import DEVICES

CPU = torch.device("cpu")
# Relative, over all elements. float32: another order of sums. bfloat16: 8 bits through every layer; about twice what
# `python -m benchmarks.precision` shows on a CPU.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
CASES = [
    ("tiny", "cpu", torch.float32),
    ("tiny", "cpu", torch.bfloat16),
    *(pytest.param(name, "cuda", dtype, marks=pytest.mark.gpu) for name in ("tiny", "small") for dtype in TOLERANCES),
]


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@torch.inference_mode()
def reconstruct(model: G2VLMForConditionalGeneration, views: Tensor) -> list[Tensor]:
    (prediction,) = model(**recon_inputs(views, model.config, model.device)).geometry
    return [tensor.cpu() for tensor in prediction_tensors(prediction)]


@pytest.mark.parametrize(("preset", "device", "dtype"), CASES)
def test_reconstruction_is_close_to_float32_on_the_cpu(preset: str, device: str, dtype: torch.dtype) -> None:
    model = random_model(PRESETS[preset](), CPU, torch.float32)
    views = random_views(3, 70, 56, CPU)
    expected = reconstruct(model, views)
    given = reconstruct(cast_weights(model.to(device), dtype), views)
    for a, b in zip(given, expected, strict=True):
        assert relative_error(a, b) < TOLERANCES[dtype]


@DEVICES
def test_weights_are_made_on_the_device_in_the_wanted_precision(device: str) -> None:
    model = random_model(PRESETS["tiny"](), torch.device(device), torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert model.decoder.semantic_norm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.heads.point_head.parameters()} == {torch.float32}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} <= {torch.float32}


HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
}


class RefuseHostReads(TorchDispatchMode):
    """Raises where a CUDA run would wait for a value: what the sync debug mode sees, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in _indices(func, args))
        if func in HOST_READS or by_mask:
            raise RuntimeError(f"{func} reads a value on the host")
        return func(*args, **(kwargs or {}))


def _indices(func, args) -> list:
    return list(args[1]) if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else []


@contextmanager
def no_host_synchronisation(device: str) -> Iterator[None]:
    with RefuseHostReads():
        if device != "cuda":
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@DEVICES
@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_the_guard_sees_a_host_read(device: str, read) -> None:
    x = torch.arange(4.0, device=device)
    with pytest.raises(RuntimeError), no_host_synchronisation(device):
        read(x)


@DEVICES
@pytest.mark.parametrize("attention", ["global", "block_causal", "frame"])
def test_the_decoder_never_waits_for_the_host(device: str, attention: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = PRESETS["tiny"](geometry_attention=attention)
    model = random_model(config, torch.device(device), dtype)
    sample = (Text((4, 5)), GeometryViews(((4, 6),) * 3), SemanticImage((4, 4)), Text((6, 7)))
    sequence = sequence_builder(config).build([sample, sample]).to(device)
    geometry = torch.randn(sequence.num_geometry, config.hidden_size, device=device, dtype=dtype)
    semantic = torch.randn(sequence.semantic_ids.shape[0], config.hidden_size, device=device, dtype=dtype)
    with no_host_synchronisation(device):
        outputs = model.decoder(geometry, semantic, sequence.position_ids, sequence.plan)
        sum(out.float().square().sum() for out in outputs).backward()
    assert model.decoder.layers[0].geometric.mlp.down_proj.weight.grad.isfinite().all()
