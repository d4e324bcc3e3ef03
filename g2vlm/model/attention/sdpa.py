"""The default backend: one `scaled_dot_product_attention` call per block, without a mask wherever a kernel allows.

Shape legend: n queries and m keys of one block, Hq query heads, Hkv key heads, D width of a head.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from g2vlm.model.attention.plan import AttnPlan, Range

TILE_ROWS = 256


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, scale: float) -> Tensor:
    """Attention of q (Sq, Hq, D) over k, v (Sk, Hkv, D); a block with one key range works on views of them."""
    seen = [span for block in plan.blocks for span in block.key_ranges]
    queries, keys, values = _rows(q, [block.q_range for block in plan.blocks]), _rows(k, seen), _rows(v, seen)
    outputs, place = [], 0
    for block, query in zip(plan.blocks, queries, strict=True):
        own = slice(place, place := place + len(block.key_ranges))
        outputs.append(_attend_block(query, _joined(keys[own]), _joined(values[own]), block.causal, scale))
    return _joined(outputs)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """Queries (n, Hq, D), keys and values (m, Hkv, D) -> (n, Hq, D)."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    if causal and query.shape[2] > 1:
        out = _causal(query, key, value, scale)
    else:
        out = _unmasked(query, key, value, scale)
    return out[0].transpose(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _rows(x: Tensor, ranges: Sequence[Range]) -> tuple[Tensor, ...]:
    """Views of rows, which may overlap."""
    return cast(tuple[Tensor, ...], _Rows.apply(x, ranges))


class _Rows(torch.autograd.Function):
    """Slices whose gradients are added into one tensor; those of torch fill one of full length for every slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: Sequence[Range]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.shape = ranges, x.shape
        return tuple(x[start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (start, stop), gradient in zip(ctx.ranges, gradients, strict=True):
            total[start:stop] += gradient
        return total, None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention aligned to the end: query j sees all but the last n - 1 - j keys."""
    if query.shape[2] == key.shape[2]:
        return _unmasked(query, key, value, scale, is_causal=True)
    if query.is_cuda and query.dtype != torch.float32:
        bias = causal_lower_right(query.shape[2], key.shape[2])  # flash attention's own causal alignment, not a mask
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)
    return _causal_by_tiles(query, key, value, scale)


def _causal_by_tiles(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same where no kernel aligns to the end (CPU, fp32): row tiles that skip later keys and mask only themselves.

    torch would build the n x m mask at once; a tile's mask has at most `TILE_ROWS` rows.
    """
    num_queries = query.shape[2]
    before = key.shape[2] - num_queries
    outputs = []
    for start in range(0, num_queries, TILE_ROWS):
        stop = min(start + TILE_ROWS, num_queries)
        seen = slice(0, before + stop)
        mask = torch.ones(stop - start, before + stop, dtype=torch.bool, device=query.device).tril(before + start)
        outputs.append(_masked(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], scale, mask))
    return torch.cat(outputs, dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention with an (n, m) mask, each key head a batch entry that its query heads share.

    On CUDA every fused kernel refuses a mask together with `enable_gqa`, and the quadratic one would run instead.
    """
    num_key_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    grouped = query[0].unflatten(0, (num_key_heads, group))  # (Hkv, Hq / Hkv, n, D)
    key, value = (x[0, :, None].expand(-1, group, -1, -1) for x in (key, value))  # (Hkv, Hq / Hkv, m, D), a view
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.flatten(0, 1)[None]


def _unmasked(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool = False) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
