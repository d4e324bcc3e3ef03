"""Who attends to whom, as a short list of blocks of contiguous ranges instead of a dense mask.

Ranges are half-open `(start, stop)` token indices in the expert layout (all geometry tokens, then all semantic tokens).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Range = tuple[int, int]


def length(span: Range) -> int:
    """Number of tokens in a range."""
    return span[1] - span[0]


@dataclass(frozen=True)
class Block:
    """Queries that are contiguous and share their keys.

    Args:
        q_range: the queries.
        key_ranges: the keys, disjoint, in the order in which a backend concatenates them.
        causal: False: every query sees every key. True: query `j` of `n` sees the **last** key range but for its final
            `n - 1 - j` keys (causal, aligned to the end); the other key ranges are seen whole.

    Raises:
        ValueError: empty, negative or overlapping ranges; a causal block with more queries than keys in the last range.
    """

    q_range: Range
    key_ranges: tuple[Range, ...]
    causal: bool

    def __post_init__(self) -> None:
        if not self.key_ranges:
            raise ValueError(
                f"key_ranges of the block with queries {self.q_range} is empty; it needs at least one range"
            )
        for name, span in [("q_range", self.q_range), *(("key_ranges", span) for span in self.key_ranges)]:
            if not 0 <= span[0] < span[1]:
                raise ValueError(f"{name} {span} must satisfy 0 <= start < stop")
        for left, right in pairwise(sorted(self.key_ranges)):
            if left[1] > right[0]:
                raise ValueError(f"key_ranges {left} and {right} overlap; a key may appear once")
        if self.causal and length(self.key_ranges[-1]) < self.num_queries:
            raise ValueError(
                f"causal block: {self.num_queries} queries {self.q_range} need at least as many keys in the last key "
                f"range {self.key_ranges[-1]}"
            )

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return length(self.q_range)

    @property
    def num_keys(self) -> int:
        """Number of keys, all ranges together."""
        return sum(length(span) for span in self.key_ranges)


@dataclass(frozen=True)
class AttnPlan:
    """The attention pattern of one forward pass; integers only, so it is hashable, comparable and device-free.

    Args:
        blocks: in query order; together they cover every query exactly once.
        num_queries: length of the query axis.
        num_keys: length of the key axis; larger than `num_queries` when a cached prefix is attended to.

    Raises:
        ValueError: queries missing, repeated or out of order; a key range beyond `num_keys`.
    """

    blocks: tuple[Block, ...]
    num_queries: int
    num_keys: int

    def __post_init__(self) -> None:
        covered = 0
        for block in self.blocks:
            if block.q_range[0] != covered:
                raise ValueError(
                    f"blocks must cover the queries once and in order: expected a block starting at query {covered}, "
                    f"got {block.q_range}"
                )
            if max(stop for _, stop in block.key_ranges) > self.num_keys:
                raise ValueError(f"key_ranges {block.key_ranges} reach beyond num_keys {self.num_keys}")
            covered = block.q_range[1]
        if covered != self.num_queries:
            raise ValueError(f"blocks cover {covered} queries, num_queries is {self.num_queries}")

    def split(self, at: int) -> "tuple[AttnPlan, AttnPlan]":
        """The plans of the queries before and from `at` on, over the same keys.

        Raises:
            ValueError: `at` is inside a causal block.
        """
        parts: tuple[list[Block], list[Block]] = ([], [])
        for block in self.blocks:
            start, stop = block.q_range
            if block.causal and start < at < stop:
                raise ValueError(f"query {at} is inside the causal block of queries {block.q_range}")
            if start < at:
                parts[0].append(Block((start, min(stop, at)), block.key_ranges, block.causal))
            if stop > at:
                parts[1].append(Block((max(start, at) - at, stop - at), block.key_ranges, block.causal))
        return (
            AttnPlan(tuple(parts[0]), at, self.num_keys),
            AttnPlan(tuple(parts[1]), self.num_queries - at, self.num_keys),
        )

    def mask(self) -> Tensor:
        """Dense (num_queries, num_keys) bool mask, True = may attend. For the oracle and tests only."""
        mask = torch.zeros(self.num_queries, self.num_keys, dtype=torch.bool)
        for block in self.blocks:
            for span in block.key_ranges:
                mask[slice(*block.q_range), slice(*span)] = True
            if block.causal:
                mask[slice(*block.q_range), slice(*block.key_ranges[-1])] = _causal_mask(block)
        return mask


def _causal_mask(block: Block) -> Tensor:
    num_keys = length(block.key_ranges[-1])
    full = torch.ones(block.num_queries, num_keys, dtype=torch.bool)
    return full.tril(num_keys - block.num_queries)
