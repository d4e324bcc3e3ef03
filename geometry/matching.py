"""Matching the cells of two views by the queries and keys of an attention layer.

Shape legend: T other views, P query cells of the first view, N cells per view, A attention heads, d width of a head.
Fewer key heads than query heads (grouped queries) are to be repeated before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.rotations import at_least_float32


def cosine_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosine similarity (T, P, N) of queries (P, A, d) and keys (T, N, A, d), the heads joined into one vector."""
    queries, keys = _checked(queries, keys)
    return F.normalize(queries.flatten(-2), dim=-1) @ F.normalize(keys.flatten(-2), dim=-1).mT


def attention_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention (T, P, N) of queries (P, A, d) to each view's keys (T, N, A, d) alone, averaged over heads.

    Each head's is `softmax(q k' / sqrt(d))` over the N cells of one view.
    """
    queries, keys = _checked(queries, keys)
    logits = torch.einsum("pad,tnad->tapn", queries, keys) / queries.shape[-1] ** 0.5
    return logits.softmax(-1).mean(1)


def best_cells(scores: Tensor, columns: int) -> Tensor:
    """The cell (x, y) of the highest score: (..., N) over a grid of this many columns, row by row -> (..., 2) int64."""
    index = scores.argmax(-1)
    return torch.stack([index % columns, index // columns], dim=-1)


def _checked(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64."""
    if queries.shape[-2:] != keys.shape[-2:]:
        raise ValueError(
            f"keys: {tuple(keys.shape[-2:])} heads and width, the queries have {tuple(queries.shape[-2:])}; "
            "repeat the key heads that several query heads share"
        )
    return at_least_float32(queries), at_least_float32(keys)
