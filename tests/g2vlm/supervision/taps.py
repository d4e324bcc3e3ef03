"""What the tests of backbones ask for, and how they compare."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g2vlm.supervision.backbones import Probes, Tapped, Taps, backbone_of
from tests.g2vlm.supervision.vlms import FAMILIES, OURS, STOCK, Family

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


stock_families = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.name in STOCK], ids=lambda family: family.name
)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=2e-5 * max(1.0, right.abs().max().item()), rtol=0)


def probes_for(width: int, camera: bool = True, scale: bool = True, dtype: Any = torch.float32) -> Probes:
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(3, width, generator=generator, dtype=dtype)
    return Probes(embeddings[:2] if camera else None, embeddings[2] if scale else None)


def its_probes(family: Family, backbone: Any, camera: bool = True, scale: bool = True) -> Probes:
    dtype = torch.float64 if family.name in OURS else torch.float32
    return probes_for(backbone.width, camera, scale, dtype)


def scores(tapped: Tapped, block: int, sample: int) -> Tensor:
    """(N, n, n) attention scores among a sample's visual tokens."""
    q, k = tapped.queries[block].after_rotary[sample], tapped.keys[block].after_rotary[sample]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("inc,jnc->nij", q, k) / q.shape[-1] ** 0.5


def every_layer(backbone: Any, **more: Any) -> Taps:
    return Taps(tuple(range(backbone.num_layers + 1)), True, tuple(range(1, backbone.num_layers + 1)), **more)


def the_models_own(family: Family, model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of the model's own forward at every token."""
    if family.name in OURS:
        return model(**inputs, logits_at=torch.arange(len(inputs["sequence"].semantic_ids))).logits
    return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def of(name: str) -> tuple[Family, Any, dict[str, Any]]:
    """A family, its backbone and a batch."""
    family = next(family for family in FAMILIES if family.name == name)
    return family, backbone_of(family.model()), family.inputs(family.samples)
