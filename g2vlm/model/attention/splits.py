"""From splits of a sequence to an attention plan: the one visibility rule of training, inference and cached decoding.

A split is a run of tokens in sequence order with one attention mode. Query `q` sees key `k` when both belong to the
same sample and

* they are in the same split, and `k <= q` or the split is not causal; or
* `k` is in an earlier split that is not `noise`, and the two splits are not both `frame`.

`causal`, `full` and `noise` are the modes of the released code; `frame` is a full split that the other frames of its
sample do not see, for frame-wise attention.

With `geometry_alone`, geometry tokens see, of these keys, only those of geometry tokens.

A layout may continue what a cache holds. The keys are then the cached ones followed by the layout's own tokens.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

from g2vlm.model.attention.plan import AttnPlan, Block, Range, length

Mode = Literal["causal", "full", "frame", "noise"]


@dataclass(frozen=True)
class Split:
    """Tokens `start <= position < stop` of the sequence, their attention mode and the sample they belong to."""

    start: int
    stop: int
    mode: Mode
    sample: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"split ({self.start}, {self.stop}) must satisfy 0 <= start < stop")
        if self.mode not in get_args(Mode):
            raise ValueError(f"split mode {self.mode!r} is unknown; allowed: {', '.join(get_args(Mode))}")


@dataclass(frozen=True)
class Seen:
    """Keys of one sample: those that its next split sees, those that its next frame sees, and those of its geometry.

    Each is sorted and disjoint.
    """

    everything: tuple[Range, ...] = ()
    but_frames: tuple[Range, ...] = ()
    geometry: tuple[Range, ...] = ()

    def by(self, mode: Mode) -> tuple[Range, ...]:
        """What a split of this mode sees of them."""
        return self.but_frames if mode == "frame" else self.everything


@dataclass
class _Context:
    """What a sample has laid down so far, in sequence ranges: what its next split sees, what its next frame sees."""

    everything: list[Range] = field(default_factory=list)
    but_frames: list[Range] = field(default_factory=list)

    def seen_by(self, split: Split) -> list[Range]:
        return self.but_frames if split.mode == "frame" else self.everything

    def add(self, split: Split) -> None:
        if split.mode == "noise":
            return
        self.everything = merge_touching([*self.everything, (split.start, split.stop)])
        if split.mode != "frame":
            self.but_frames = merge_touching([*self.but_frames, (split.start, split.stop)])


@dataclass(frozen=True)
class SplitLayout:
    """The splits of a packed sequence and which of its tokens go to the geometry expert.

    Args:
        splits: in sequence order, tiling `[0, num_tokens)`.
        geometry: ranges of geometry tokens in sequence order, disjoint and increasing.
        num_cached: number of keys in the cache that this layout continues.
        cached: per sample, which of those keys are its own; empty when there is no cache.
        geometry_alone: geometry tokens see geometry tokens only.
    """

    splits: tuple[Split, ...]
    geometry: tuple[Range, ...] = ()
    num_cached: int = 0
    cached: tuple[Seen, ...] = ()
    geometry_alone: bool = False

    def __post_init__(self) -> None:
        _check_order("splits", [(split.start, split.stop) for split in self.splits], contiguous=True)
        _check_order("geometry ranges", self.geometry)
        if self.geometry and self.geometry[-1][1] > self.num_tokens:
            raise ValueError(
                f"geometry range {self.geometry[-1]} reaches beyond the {self.num_tokens} tokens of the splits"
            )

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.splits[-1].stop if self.splits else 0

    @cached_property
    def num_geometry(self) -> int:
        """Number of geometry tokens."""
        return sum(length(span) for span in self.geometry)

    def plan(self) -> AttnPlan:
        """The minimal plan: queries in expert layout; keys are the cached ones, then the same layout."""
        blocks = [block for split, context in self._walk() for block in self._blocks(split, context.seen_by(split))]
        blocks.sort(key=lambda block: block.q_range)
        return AttnPlan(_merge_blocks(blocks), self.num_tokens, self.num_cached + self.num_tokens)

    def seen(self, num_samples: int) -> tuple[Seen, ...]:
        """Per sample, the keys that what follows this layout sees; the start of a layout that continues it."""
        contexts = {split.sample: context for split, context in self._walk()}
        found = []
        for sample in range(num_samples):
            context, earlier = contexts.get(sample, _Context()), self._cached(sample)
            everything = self._keys(earlier.everything, context.everything)
            but_frames = self._keys(earlier.but_frames, context.but_frames)
            geometry = [*earlier.geometry, *self._geometry_keys(context.everything)]
            found.append(Seen(everything, but_frames, tuple(merge_touching(geometry))))
        return tuple(found)

    def _walk(self) -> Iterator[tuple[Split, _Context]]:
        """Every split with what its sample has laid down before it; after the last split also that one."""
        contexts: dict[int, _Context] = {}
        for split in self.splits:
            context = contexts.setdefault(split.sample, _Context())
            yield split, context
            context.add(split)

    def _cached(self, sample: int) -> Seen:
        return self.cached[sample] if self.cached else Seen()

    def _blocks(self, split: Split, earlier: list[Range]) -> list[Block]:
        """The blocks of one split. A causal split is cut into runs of one expert; that does not change what is seen."""
        if split.mode != "causal":
            span = (split.start, split.stop)
            queries = zip(self.experts(span), (True, False), strict=True)
            return [
                Block(part, self._seen_by(split, [*earlier, span], geometry), False)
                for part, geometry in queries
                if length(part)
            ]
        blocks = []
        for start, stop, geometry in self._runs(split):
            seen = merge_touching([*earlier, (split.start, stop)])
            (query,) = (part for part in self.experts((start, stop)) if length(part))
            blocks.append(Block(query, self._seen_by(split, seen, geometry), True))
        return blocks

    def _seen_by(self, split: Split, seen: Iterable[Range], geometry: bool) -> tuple[Range, ...]:
        """The keys of a split's geometry or semantic tokens, which see these sequence ranges and what is cached."""
        cached = self._cached(split.sample)
        if geometry and self.geometry_alone:
            own = overlap(cached.by(split.mode), cached.geometry)
            return tuple(merge_touching([*own, *self._geometry_keys(seen)]))
        return self._keys(cached.by(split.mode), seen, geometry and split.mode == "causal")

    def _runs(self, split: Split) -> list[tuple[int, int, bool]]:
        """`(start, stop, is geometry)` runs of one expert inside a split."""
        inside = [
            (max(a, split.start), min(b, split.stop)) for a, b in self.geometry if a < split.stop and b > split.start
        ]
        runs, position = [], split.start
        for start, stop in inside:
            runs += [(position, start, False), (start, stop, True)]
            position = stop
        runs.append((position, split.stop, False))
        return [run for run in runs if run[0] < run[1]]

    @cached_property
    def _geometry_starts(self) -> tuple[list[int], list[int]]:
        """Start of each geometry range, and the number of geometry tokens before it."""
        before = accumulate((length(span) for span in self.geometry), initial=0)
        return [span[0] for span in self.geometry], list(before)

    def _geometry_before(self, position: int) -> int:
        starts, before = self._geometry_starts
        index = bisect_right(starts, position) - 1
        return before[index] + min(position - starts[index], length(self.geometry[index])) if index >= 0 else 0

    def experts(self, span: Range) -> tuple[Range, Range]:
        """A sequence range in expert layout: its geometry tokens and its semantic tokens (either may be empty)."""
        first, last = self._geometry_before(span[0]), self._geometry_before(span[1])
        offset = self.num_geometry
        return (first, last), (offset + span[0] - first, offset + span[1] - last)

    def _keys(self, cached: Iterable[Range], seen: Iterable[Range], geometry_last: bool = False) -> tuple[Range, ...]:
        """Cached keys and those of sequence ranges: geometry then semantic, or the reverse for causal geometry."""
        parts = [[self._key(part) for part in self.experts(span)] for span in seen]
        geometry, semantic = ([pair[expert] for pair in parts if length(pair[expert])] for expert in (0, 1))
        own = [*semantic, *geometry] if geometry_last else [*geometry, *semantic]
        return tuple(merge_touching([*cached, *own]))

    def _geometry_keys(self, seen: Iterable[Range]) -> list[Range]:
        """Those of the geometry tokens in sequence ranges."""
        return [self._key(part) for part, _ in map(self.experts, seen) if length(part)]

    def _key(self, span: Range) -> Range:
        return span[0] + self.num_cached, span[1] + self.num_cached


def merge_touching(ranges: Iterable[Range]) -> list[Range]:
    """Joins each range with the one listed before it when it starts where that one stops."""
    merged: list[Range] = []
    for span in ranges:
        if merged and merged[-1][1] == span[0]:
            merged[-1] = (merged[-1][0], span[1])
        else:
            merged.append(span)
    return merged


def overlap(first: Iterable[Range], second: Sequence[Range]) -> list[Range]:
    """What two lists of sorted, disjoint ranges have in common."""
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in first for b in second)
    return [span for span in pairs if span[0] < span[1]]


def _merge_blocks(blocks: Sequence[Block]) -> tuple[Block, ...]:
    merged: list[Block] = []
    for block in blocks:
        joined = _join(merged[-1], block) if merged else None
        if joined:
            merged[-1] = joined
        else:
            merged.append(block)
    return tuple(merged)


def _join(left: Block, right: Block) -> Block | None:
    """The one block equal to two adjacent ones, or None.

    Full blocks join when they see the same keys; causal ones when `right` sees `left`'s keys and its own tokens.
    """
    if left.causal != right.causal:
        return None
    expected = left.key_ranges
    if left.causal:
        start, stop = left.key_ranges[-1]
        expected = (*left.key_ranges[:-1], (start, stop + right.num_queries))
    if right.key_ranges != expected:
        return None
    return Block((left.q_range[0], right.q_range[1]), right.key_ranges, left.causal)


def _check_order(name: str, spans: Sequence[Range], contiguous: bool = False) -> None:
    position = 0
    for span in spans:
        if span[0] >= span[1] or span[0] < position or (contiguous and span[0] != position):
            raise ValueError(
                f"{name} must be non-empty and in order{', without gaps' * contiguous}: {span} after {position}"
            )
        position = span[1]
