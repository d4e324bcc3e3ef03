"""InfoNCE with cosine logits, one value per query, computed for a chunk of queries at a time.

The logits of a chunk are computed again in the backward pass, so memory is that of one chunk.

Shape legend: N queries, M negatives, n queries of a chunk, D embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from geometry.losses.features import cosines, unit_vectors

CHUNK = 512  # queries whose logits exist at one time


def info_nce_in_batch(
    query: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """Each query against its positive, with the other queries' positives as negatives.

    Args:
        query, positive: (N, D), row i belongs to row i.
        temperature: divides the cosines.
        allowed: (N, N) bool, which positives are negatives of which query; False marks false negatives. The diagonal
            does not matter. Default all.
        chunk: number of queries at a time.

    Returns:
        (N,) losses -log softmax of the positive.
    """
    others = ~torch.eye(len(query), dtype=torch.bool, device=query.device)
    allowed = others if allowed is None else allowed & others
    return info_nce_shared(query, positive, positive, temperature, allowed, chunk)


def info_nce_shared(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    allowed: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Each query against its positive and one set of negatives.

    Args:
        query, positive: (N, D), row i belongs to row i.
        negatives: (M, D).
        temperature: divides the cosines.
        allowed: (N, M) bool, which negatives a query has; default all.
        chunk: number of queries at a time.

    Returns:
        (N,) losses -log softmax of the positive.
    """
    query, positive, negatives = (unit_vectors(x) for x in (query, positive, negatives))

    def losses(query: Tensor, positive: Tensor, allowed: Tensor) -> Tensor:
        negative_logits = cosines(query, negatives) / temperature
        return contrast((query * positive).sum(-1) / temperature, negative_logits, allowed)

    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=query.device).expand(len(query), len(negatives))
    return by_chunks(losses, chunk, query, positive, allowed)


def info_nce_paired(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    allowed: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Each query against its positive and its own negatives.

    Args:
        query, positive: (N, D), row i belongs to row i.
        negatives: (N, M, D).
        temperature: divides the cosines.
        allowed: (N, M) bool, which of its negatives a query has; default all.
        chunk: number of queries at a time.

    Returns:
        (N,) losses -log softmax of the positive.
    """

    def losses(query: Tensor, positive: Tensor, negatives: Tensor, allowed: Tensor) -> Tensor:
        query, positive, negatives = (unit_vectors(x) for x in (query, positive, negatives))
        negative_logits = (query[:, None] * negatives).sum(-1) / temperature
        return contrast((query * positive).sum(-1) / temperature, negative_logits, allowed)

    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=query.device).expand(negatives.shape[:2])
    return by_chunks(losses, chunk, query, positive, negatives, allowed)


def contrast(positive: Tensor, negatives: Tensor, allowed: Tensor) -> Tensor:
    """-log softmax of the positive logits (n,) beside the allowed negative logits (n, M); (n,)."""
    logits = torch.cat([positive[:, None], torch.where(allowed, negatives, -torch.inf)], dim=-1)
    return logits.logsumexp(-1) - positive


def by_chunks(compute: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    """`compute` on consecutive chunks of the rows, joined along the first axis; the backward pass computes it again.

    Args:
        compute: takes one chunk of each of the rows; what else it needs it holds itself.
        chunk: number of rows at a time.
        rows: each (N, ...).
    """
    starts = range(0, max(len(rows[0]), 1), chunk)
    chunks = [tuple(row[start : start + chunk] for row in rows) for start in starts]
    return torch.cat([checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks])
