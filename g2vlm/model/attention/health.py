"""How healthy attention is: the largest logits of each pair of experts, and the entropy of what every query looks at.

The two experts scale their queries and keys on their own, with or without a norm. A pair whose logits outgrow those of
the others saturates the shared softmax; an entropy near 0 means that queries look at single keys.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from g2vlm.model.attention.plan import AttnPlan, Block

ROWS = 256
"""Queries whose logits exist at one time: half a gigabyte for 12 heads and a pack of 40,960 tokens."""

PAIRS = ("geometric_geometric", "geometric_semantic", "semantic_geometric", "semantic_semantic")
"""Query expert, then key expert."""

SATURATED = 50.0
"""Largest logit above which attention may pass no gradient any more.

A key with logit L among n keys with logits near 0 gets all weight but n exp(-L). With n = 40,960 tokens float32
cannot tell that weight from 1 once L > 27, and the gradient of the softmax is 0. Other keys of a query are seldom near
0, so this is about twice as much; Gemma 2 caps its attention logits at the same value.
"""


@dataclass
class AttentionHealth:
    """What `watch_attention` saw of one forward.

    Args:
        largest_logits: per layer, by pair of experts, the largest scaled logit over all heads and allowed pairs of
            tokens; a pair that never meets is absent.
        entropy: per layer, the mean entropy in nats of a query's attention, over queries and heads.
        uniform_entropy: the same mean if every query looked at all its keys alike; the largest possible.
    """

    largest_logits: list[dict[str, float]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    uniform_entropy: list[float] = field(default_factory=list)

    @property
    def largest(self) -> dict[str, tuple[float, int]]:
        """By pair of experts that meets: the largest logit of all layers, and its layer; what is no number wins."""
        seen = {
            pair: [(layer[pair], number) for number, layer in enumerate(self.largest_logits) if pair in layer]
            for pair in PAIRS
        }
        return {
            pair: max(values, key=lambda found: math.inf if math.isnan(found[0]) else found[0])
            for pair, values in seen.items()
            if values
        }

    @property
    def relative_entropy(self) -> float:
        """Mean entropy over its largest possible value, over all layers; 1 if no query has a choice."""
        possible = sum(self.uniform_entropy)
        return sum(self.entropy) / possible if possible else 1.0

    @property
    def saturated(self) -> dict[str, tuple[float, int]]:
        """Those of `largest` that are above `SATURATED`, or no number."""
        return {pair: found for pair, found in self.largest.items() if not found[0] <= SATURATED}


@contextmanager
def watch_attention(decoder: nn.Module) -> Iterator[AttentionHealth]:
    """Measure every forward of a decoder inside the `with` block; a layer's numbers are there once it has run.

    Only forwards without a cache can be measured. The decoder is as before afterwards, and nothing is computed twice
    without the block.

    Args:
        decoder: an `MoTDecoder`; its `layers` hold `geometric.attention` and `semantic.attention`.

    Raises:
        ValueError: the forward continues a cache.
    """
    health, handles = AttentionHealth(), []
    layers: Any = decoder.get_submodule("layers")
    try:
        for layer in layers:
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            for expert in ("geometric", "semantic"):
                module = layer.get_submodule(f"{expert}.attention")
                handles.append(module.register_forward_hook(partial(_keep, seen, expert)))
            handles.append(layer.register_forward_hook(partial(_measure, health, seen), with_kwargs=True))
        yield health
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, tuple[Tensor, Tensor]], expert: str, module: nn.Module, given: Any, output: Any) -> None:
    seen[expert] = (output[0].detach(), output[1].detach())


def _measure(
    health: AttentionHealth,
    seen: dict[str, tuple[Tensor, Tensor]],
    layer: nn.Module,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    output: Any,
) -> None:
    plan: AttnPlan = options["plan"] if "plan" in options else arguments[4]
    (geometric_q, geometric_k), (semantic_q, semantic_k) = seen.pop("geometric"), seen.pop("semantic")
    queries, keys = torch.cat([geometric_q, semantic_q]), torch.cat([geometric_k, semantic_k])
    largest, entropy, uniform = attention_statistics(queries, keys, plan, len(geometric_q))
    health.largest_logits.append(largest)
    health.entropy.append(entropy)
    health.uniform_entropy.append(uniform)


@torch.no_grad()
def attention_statistics(
    q: Tensor, k: Tensor, plan: AttnPlan, num_geometry: int
) -> tuple[dict[str, float], float, float]:
    """Largest logit by pair of experts, mean entropy, and the mean entropy of uniform attention, of one layer.

    Args:
        q: (T, N, K) queries in expert layout, rotated.
        k: (T, M, K) keys.
        plan: who attends to whom.
        num_geometry: tokens of the geometric expert, which come first.

    Raises:
        ValueError: keys of a cache, whose experts are not known.
    """
    if plan.num_keys != plan.num_queries:
        raise ValueError(f"the plan has {plan.num_keys - plan.num_queries} cached keys; measure a whole forward")
    largest = q.new_full((2, 2), float("-inf"), dtype=torch.float32)
    entropy, uniform = q.new_zeros((), dtype=torch.float64), 0.0
    for block in plan.blocks:
        for start in range(*block.q_range, ROWS):
            rows = slice(start, min(start + ROWS, block.q_range[1]))
            places, allowed = _keys_of(block, rows, q.device)
            logits = _logits(q[rows], k[places]).masked_fill(~allowed, float("-inf"))  # (N, rows, keys)
            _raise_to(largest, logits, torch.arange(rows.start, rows.stop, device=q.device), places, num_geometry)
            entropy += torch.special.entr(logits.softmax(dim=-1)).sum(dtype=torch.float64)
            uniform += float(allowed.sum(dim=-1).double().log().sum())
    found = {name: float(value) for name, value in zip(PAIRS, largest.flatten(), strict=True) if value != -torch.inf}
    return found, float(entropy) / (q.shape[0] * q.shape[1]), uniform / q.shape[0]


def _keys_of(block: Block, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of a block's keys, and (rows, keys) which of them each query sees."""
    places = torch.cat([torch.arange(*span, device=device) for span in block.key_ranges])
    count = torch.full((rows.stop - rows.start,), block.num_keys, device=device)
    if block.causal:
        count -= block.q_range[1] - 1 - torch.arange(rows.start, rows.stop, device=device)
    return places, torch.arange(block.num_keys, device=device) < count[:, None]


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """(n, N, K) and (m, M, K) -> scaled logits (N, n, m), float32."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return torch.einsum("qhd,khd->hqk", q.float(), keys.float()) * q.shape[-1] ** -0.5


def _raise_to(largest: Tensor, logits: Tensor, rows: Tensor, keys: Tensor, num_geometry: int) -> None:
    """largest (2, 2) by (query expert, key expert), raised to the logits (N, rows, keys) of a tile."""
    for i, of_query in enumerate((rows < num_geometry, rows >= num_geometry)):
        for j, of_key in enumerate((keys < num_geometry, keys >= num_geometry)):
            tile = logits[:, of_query][:, :, of_key]
            if tile.numel():
                largest[i, j] = torch.maximum(largest[i, j], tile.max())
