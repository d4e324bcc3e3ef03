"""Decoding on every device: the same as one forward over everything, and without waiting for the host in a step."""

import pytest
import torch

from benchmarks.common import relative_error
from benchmarks.models import random_model
from g2vlm.config import PRESETS
from g2vlm.model.cache import Rows
from g2vlm.processing import sequence_builder
from g2vlm.sequence import GeometryViews, Sample, Text
from tests.gpu.devices import DEVICES
from tests.gpu.test_model import TOLERANCES, no_host_synchronisation

SAMPLES: list[Sample] = [(Text((4, 5)), GeometryViews(((4, 6),) * 3), Text((6, 7))), (Text((8, 9, 10)),)]


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_decoding_equals_one_forward(device: str, dtype: torch.dtype) -> None:
    model = random_model(PRESETS["tiny"](), torch.device(device), dtype)
    builder, views = sequence_builder(model.config), [torch.randn(3, 3, 56, 84, device=device).to(dtype)]
    sequence = builder.build(SAMPLES).to(device)
    rows = Rows.after(sequence, model(sequence=sequence, views=views, use_cache=True).cache, room=2)
    tokens = torch.tensor([[11, 12], [13, 14]], device=device)  # (rows, steps)
    with no_host_synchronisation(device):
        logits = [model.decode(step, rows) for step in tokens.T]
    said = [(*sample, Text(tuple(row))) for sample, row in zip(SAMPLES, tokens.tolist(), strict=True)]
    whole = builder.build(said).to(device)
    last = torch.tensor(whole.last_tokens, device=device)
    expected = model(sequence=whole, views=views, logits_at=last).logits
    assert relative_error(logits[-1], expected) < TOLERANCES[dtype]
