"""From segments (text, views, images) to one packed sequence: token ids, M-RoPE positions, attention plan, labels.

Sequence order is the order in which a reader meets the tokens. Expert layout, in which the model works, is the same
tokens with all geometry tokens first and all semantic tokens after them, both in sequence order. A sequence may
continue others whose keys and values are cached; it then holds the new tokens alone.

Shape legend: S tokens of the pack, U semantic tokens, G = S - U geometry tokens, V image slots, P patches of one view.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from g2vlm.model.attention.plan import AttnPlan, Range
from g2vlm.model.attention.splits import Mode, Seen, Split, SplitLayout

Grid = tuple[int, int]
GeometryAttention = Literal["global", "block_causal", "frame"]
SemanticImageAttention = Literal["full", "causal"]
ViewPositions = Literal["sequential", "shared"]
GeometrySees = Literal["everything", "views"]

IGNORED = -100  # label of a token without loss, as in torch's cross_entropy
FILLER_ID = 0  # id in an image slot: a valid embedding row whose value is replaced


@dataclass(frozen=True)
class Text:
    """Causal text. `supervised` text gets eos appended and every token predicts its successor; eos itself has no label.

    Raises:
        ValueError: no ids.
    """

    ids: tuple[int, ...]
    supervised: bool = False

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("Text.ids is empty; leave the segment out")


@dataclass(frozen=True)
class GeometryViews:
    """Consecutive views for the geometry encoder, each a start marker, `rows * columns` geometry tokens, an end marker.

    Args:
        grids: (rows, columns) of each view in patches.

    Raises:
        ValueError: no views, or an empty grid.
    """

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("GeometryViews.grids is empty; leave the segment out")
        for grid in self.grids:
            _check_grid("GeometryViews.grids", grid, 1)


@dataclass(frozen=True)
class SemanticImage:
    """One image for the semantic encoder: a start marker, the merged tokens row by row, an end marker.

    Args:
        grid: (rows, columns) in patches, before merging.
        merge: side of the square of patches that becomes one token.
        probes: tokens after the last merged one, with its positions, whose embeddings the caller puts in.

    Raises:
        ValueError: an empty grid, or one that `merge` does not divide.
    """

    grid: Grid
    merge: int = 2
    probes: int = 0

    def __post_init__(self) -> None:
        _check_grid("SemanticImage.grid", self.grid, self.merge)


@dataclass(frozen=True)
class SemanticVideo:
    """One video for the semantic encoder: a start marker, the merged tokens step by step, an end marker.

    A step is what the encoder makes one patch of in time: two frames. For Qwen3-VL a video is no such segment, but a
    `Text` with the time and a `SemanticImage` for every step.

    Args:
        grid: (rows, columns) of each step in patches, before merging.
        times: temporal position of every step, counted from the video's first; see `VisionTowerConfig.video_times`.
        merge: side of the square of patches that becomes one token.
        probes: as in `SemanticImage`, for every step; empty for none.

    Raises:
        ValueError: an empty grid, one that `merge` does not divide, no steps, times that fall, or another number of
            `probes` than steps.
    """

    grid: Grid
    times: tuple[int, ...]
    merge: int = 2
    probes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_grid("SemanticVideo.grid", self.grid, self.merge)
        if not self.times or self.times[0] < 0 or list(self.times) != sorted(self.times):
            raise ValueError(f"SemanticVideo.times is {self.times}; it must hold rising positions from 0")
        if len(self.probes) not in (0, len(self.times)):
            raise ValueError(f"SemanticVideo.probes is {self.probes} for {len(self.times)} steps")


Segment = Text | GeometryViews | SemanticImage | SemanticVideo
Sample = Sequence[Segment]


def segment_length(segment: Segment) -> int:
    """Tokens of a segment, markers and the end of an answer included."""
    if isinstance(segment, Text):
        return len(segment.ids) + segment.supervised
    if isinstance(segment, GeometryViews):
        return sum(math.prod(grid) + 2 for grid in segment.grids)
    times, probes = _steps(segment)
    return len(times) * math.prod(segment.grid) // segment.merge**2 + sum(probes) + 2


def _steps(segment: SemanticImage | SemanticVideo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Time and number of probe tokens of every step."""
    if isinstance(segment, SemanticImage):
        return (0,), (segment.probes,)
    return segment.times, segment.probes or (0,) * len(segment.times)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens, looked up in the tokenizer. Both encoders use the same vision markers."""

    bos: int
    eos: int
    vision_start: int
    vision_end: int


class SampleRange(NamedTuple):
    """Where a sample's tokens are in the geometry part and in the semantic part (whose layout indices are G higher)."""

    geometry: Range
    semantic: Range


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One packed sequence in expert layout (all geometry tokens, then all semantic tokens, each in sequence order).

    Args:
        num_geometry: G; the first G rows of the layout are geometry tokens, view after view, patches row by row.
        semantic_ids: (U,) token ids; image slots hold `FILLER_ID`.
        image_slots: (V,) indices into the semantic part that take the merged image tokens, in order.
        probe_slots: indices into the semantic part of the probe tokens, in order.
        position_ids: (3, S) temporal, row and column position of every token; each sample starts at 0, or where the one
            that it continues stopped.
        plan: who attends to whom, in expert layout, after the cached keys.
        splits: the rule that `plan` follows.
        seen: per sample, the keys that what continues it sees: of the cache, then of this sequence in expert layout.
        view_grids: for every `GeometryViews` segment, in order, the (rows, columns) of its views.
        group_samples: index of the sample that each entry of `view_grids` belongs to.
        sample_ranges: per sample, its range in the geometry part and in the semantic part.
        next_positions: per sample, the position of the next token to append.
        labels: (U,) the id that each semantic token should predict (already shifted), `IGNORED` where there is no loss.
        label_weights: (U,) 1 / sqrt(number of labels of its segment), 0 where there is no loss.
        order: (S,) sequence order from expert layout: `in_sequence = in_layout[order]`.
        inverse_order: (S,) expert layout from sequence order: `in_layout = in_sequence[inverse_order]`.
    """

    num_geometry: int
    semantic_ids: Tensor
    image_slots: Tensor
    probe_slots: Tensor
    position_ids: Tensor
    plan: AttnPlan
    splits: SplitLayout
    seen: tuple[Seen, ...]
    view_grids: tuple[tuple[Grid, ...], ...]
    group_samples: tuple[int, ...]
    sample_ranges: tuple[SampleRange, ...]
    next_positions: tuple[int, ...]
    labels: Tensor
    label_weights: Tensor
    order: Tensor
    inverse_order: Tensor

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.position_ids.shape[1]

    @property
    def num_keys(self) -> int:
        """Length of the key axis: the cached keys and S."""
        return self.plan.num_keys

    @property
    def num_samples(self) -> int:
        """Number of samples in the pack."""
        return len(self.next_positions)

    @property
    def last_tokens(self) -> tuple[int, ...]:
        """Per sample, its last token as an index into the semantic part: where the next token is predicted.

        Raises:
            ValueError: a sample has no token here.
        """
        empty = [sample for sample, (_, (start, stop)) in enumerate(self.sample_ranges) if start == stop]
        if empty:
            raise ValueError(f"samples {empty} have no tokens to predict the next one at")
        return tuple(semantic[1] - 1 for _, semantic in self.sample_ranges)

    @property
    def views_per_group(self) -> tuple[int, ...]:
        """Number of views of every `GeometryViews` segment."""
        return tuple(len(grids) for grids in self.view_grids)

    def to(self, device: torch.device | str) -> "PackedSequence":
        """The same sequence with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class SequenceBuilder:
    """Lays out samples of segments as one `PackedSequence`; tokens of different samples never see each other.

    Args:
        special: ids of the special tokens.
        geometry_attention: `global`: the views of a segment are one full split, all see all (inference of the release).
            `block_causal`: each view is its own full split and sees everything before it (training of the release).
            `frame`: each view sees itself and everything before it except the other views of its sample.
            In all three, what follows sees all views.
        semantic_image_attention: `full`: an image or video and its markers are one full split. `causal`: they are like
            text.
        view_positions: `sequential`: each view starts where the one before stopped. `shared`: all views of a segment,
            markers included, start at one position; what follows starts as after the largest view alone, which is the
            largest id in use plus one, whatever the order of the views.
        geometry_sees: `everything`: geometry tokens see what stands before them, and their markers (the release).
            `views`: only each other, so that no word and no weight of the semantic expert changes a reconstruction.

    Raises:
        ValueError: an option outside its allowed values.
    """

    special: SpecialIds
    geometry_attention: GeometryAttention = "global"
    semantic_image_attention: SemanticImageAttention = "full"
    view_positions: ViewPositions = "sequential"
    geometry_sees: GeometrySees = "everything"

    def __post_init__(self) -> None:
        for name, allowed in [
            ("geometry_attention", get_args(GeometryAttention)),
            ("semantic_image_attention", get_args(SemanticImageAttention)),
            ("view_positions", get_args(ViewPositions)),
            ("geometry_sees", get_args(GeometrySees)),
        ]:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")

    def build(self, samples: Iterable[Sample]) -> PackedSequence:
        """Packs samples in order.

        Raises:
            ValueError: no samples, or a sample without segments.
        """
        return self._packed(_Draft(geometry_alone=self.geometry_sees == "views"), samples)

    def extend(
        self, cached: PackedSequence, samples: Sequence[Sample], parents: Sequence[int] | None = None
    ) -> PackedSequence:
        """Packs what continues a sequence whose keys and values are cached; any segments may follow any others.

        Args:
            cached: what the cache ends with, itself perhaps a continuation.
            samples: the new segments of each sample; none for a sample that waits while others grow.
            parents: per new sample, the sample of `cached` that it continues; several may continue the same one without
                seeing each other. By default each sample continues the one of its own number.

        Raises:
            ValueError: another number of samples than parents, or a parent that does not exist.
        """
        parents = range(cached.num_samples) if parents is None else parents
        if len(samples) != len(parents) or not set(parents) <= set(range(cached.num_samples)):
            raise ValueError(
                f"{len(samples)} samples continue the samples {list(parents)} of a sequence of {cached.num_samples}"
            )
        positions = [cached.next_positions[parent] for parent in parents]
        seen = tuple(cached.seen[parent] for parent in parents)
        alone = self.geometry_sees == "views"
        return self._packed(_Draft(positions, seen, cached.num_keys, alone), samples)

    def _packed(self, draft: "_Draft", samples: Iterable[Sample]) -> PackedSequence:
        for sample in samples:
            draft.start_sample(empty=not sample)
            for segment in sample:
                self._add(draft, segment)
        if not draft.next_positions:
            raise ValueError("no samples to pack")
        return draft.packed()

    def _add(self, draft: "_Draft", segment: Segment) -> None:
        if isinstance(segment, Text):
            draft.add_split("causal", [self._text_run(segment, draft.position)])
        elif isinstance(segment, SemanticImage | SemanticVideo):
            merged = (segment.grid[0] // segment.merge, segment.grid[1] // segment.merge)
            draft.add_split(self.semantic_image_attention, self._image(merged, draft.position, *_steps(segment)))
        else:
            self._add_views(draft, segment)

    def _add_views(self, draft: "_Draft", segment: GeometryViews) -> None:
        draft.add_group(segment.grids)
        if self.view_positions == "shared":
            bases = [draft.position] * len(segment.grids)
        else:
            bases = accumulate((max(grid) + 2 for grid in segment.grids[:-1]), initial=draft.position)
        views = [self._view(grid, base) for grid, base in zip(segment.grids, bases, strict=True)]
        if self.geometry_attention == "global":
            draft.add_split("full", [run for runs in views for run in runs])
        else:
            for runs in views:
                draft.add_split("frame" if self.geometry_attention == "frame" else "full", runs)

    def _text_run(self, text: Text, base: int) -> "_Run":
        if not text.supervised:
            return _Run("text", text.ids, text_positions(base, len(text.ids)))
        ids = (*text.ids, self.special.eos)
        labels, weight = (*ids[1:], IGNORED), 1 / math.sqrt(len(text.ids))
        return _Run("text", ids, text_positions(base, len(ids)), labels, weight)

    def _view(self, grid: Grid, base: int) -> list["_Run"]:
        """Start marker, one token per grid cell, end marker."""
        cells = _Run("geometry", (FILLER_ID,) * math.prod(grid), grid_positions(base + 1, *grid))
        return self._wrapped([cells], base, max(grid))

    def _image(self, grid: Grid, base: int, times: Sequence[int], probes: Sequence[int]) -> list["_Run"]:
        """Start marker, per time one token per grid cell and then the probe tokens, end marker."""
        runs = []
        for time, count in zip(times, probes, strict=True):
            positions = grid_positions(base + 1, *grid, (time,))
            runs.append(_Run("image", (FILLER_ID,) * math.prod(grid), positions))
            if count:
                runs.append(_Run("probe", (FILLER_ID,) * count, positions[:, -1:].expand(-1, count)))
        return self._wrapped(runs, base, max(*grid, times[-1] + 1))

    def _wrapped(self, runs: list["_Run"], base: int, extent: int) -> list["_Run"]:
        """Runs between the markers; `extent` is how many positions they span."""
        start, end = text_positions(base, 1), text_positions(base + 1 + extent, 1)
        return [
            _Run("text", (self.special.vision_start,), start),
            *runs,
            _Run("text", (self.special.vision_end,), end),
        ]


def text_positions(base: int, count: int) -> Tensor:
    """(3, count) positions of text: (p, p, p) for p = base, base + 1, ..."""
    return torch.arange(base, base + count).expand(3, -1)


def grid_positions(base: int, rows: int, columns: int, times: Sequence[int] = (0,)) -> Tensor:
    """(3, len(times) * rows * columns) positions of a grid: base + its (time, row, column).

    What follows starts one after the largest: at `base + max(times[-1] + 1, rows, columns)`.
    """
    return base + torch.cartesian_prod(torch.tensor(times), torch.arange(rows), torch.arange(columns)).T


_Kind = Literal["text", "image", "geometry", "probe"]


class _Run(NamedTuple):
    """Tokens of one kind: one id per token, (3, n) positions, one label per token or none, the weight of labels."""

    kind: _Kind
    ids: tuple[int, ...]
    positions: Tensor
    labels: tuple[int, ...] = ()
    weight: float = 0.0


@dataclass
class _Draft:
    """The pack while it grows, in sequence order; the last entry of `next_positions` is the sample being laid out.

    A pack that continues a cache has, per sample, its first position and its cached keys, and their total number.
    """

    first_positions: list[int] = field(default_factory=list)
    cached: tuple[Seen, ...] = ()
    num_cached: int = 0
    geometry_alone: bool = False
    runs: list[_Run] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    view_grids: list[tuple[Grid, ...]] = field(default_factory=list)
    group_samples: list[int] = field(default_factory=list)
    next_positions: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def start_sample(self, empty: bool) -> None:
        if empty and not self.cached:
            raise ValueError(f"sample {len(self.next_positions)} has no segments")
        self.next_positions.append(self.first_positions[len(self.next_positions)] if self.cached else 0)
        self.starts.append(self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence so far."""
        return self.splits[-1].stop if self.splits else 0

    @property
    def position(self) -> int:
        """Position of the sample's next token."""
        return self.next_positions[-1]

    def add_group(self, grids: tuple[Grid, ...]) -> None:
        self.view_grids.append(grids)
        self.group_samples.append(len(self.next_positions) - 1)

    def add_split(self, mode: Mode, runs: list[_Run]) -> None:
        """Appends runs as one split; the next position is one more than the largest that they end with."""
        start = self.num_tokens
        stop = start + sum(len(run.ids) for run in runs)
        self.splits.append(Split(start, stop, mode, len(self.next_positions) - 1))
        self.runs += runs
        self.next_positions[-1] = max(self.position, *(int(run.positions[0, -1]) + 1 for run in runs))

    def packed(self) -> PackedSequence:
        lengths = torch.tensor([len(run.ids) for run in self.runs], dtype=torch.long)
        is_geometry = _per_token([run.kind == "geometry" for run in self.runs], lengths, torch.bool)
        is_image = _per_token([run.kind == "image" for run in self.runs], lengths, torch.bool)
        is_probe = _per_token([run.kind == "probe" for run in self.runs], lengths, torch.bool)
        inverse_order = torch.argsort(is_geometry.logical_not().byte(), stable=True)
        layout = self._layout()
        semantic = inverse_order[layout.num_geometry :]
        ids = torch.tensor([token for run in self.runs for token in run.ids], dtype=torch.long)
        labels = [label for run in self.runs for label in run.labels or (IGNORED,) * len(run.ids)]
        labels = torch.tensor(labels, dtype=torch.long)
        weights = _per_token([run.weight for run in self.runs], lengths).where(labels != IGNORED, 0.0)
        positions = torch.cat([torch.empty(3, 0, dtype=torch.long), *(run.positions for run in self.runs)], dim=1)
        return PackedSequence(
            num_geometry=layout.num_geometry,
            semantic_ids=ids[semantic],
            image_slots=is_image[semantic].nonzero().flatten(),
            probe_slots=is_probe[semantic].nonzero().flatten(),
            position_ids=positions[:, inverse_order],
            plan=layout.plan(),
            splits=layout,
            seen=layout.seen(len(self.next_positions)),
            view_grids=tuple(self.view_grids),
            group_samples=tuple(self.group_samples),
            sample_ranges=self._sample_ranges(layout),
            next_positions=tuple(self.next_positions),
            labels=labels[semantic],
            label_weights=weights[semantic],
            order=torch.argsort(inverse_order),
            inverse_order=inverse_order,
        )

    def _layout(self) -> SplitLayout:
        ends = list(accumulate(len(run.ids) for run in self.runs))
        geometry = [
            (end - len(run.ids), end) for run, end in zip(self.runs, ends, strict=True) if run.kind == "geometry"
        ]
        return SplitLayout(tuple(self.splits), tuple(geometry), self.num_cached, self.cached, self.geometry_alone)

    def _sample_ranges(self, layout: SplitLayout) -> tuple[SampleRange, ...]:
        ranges = []
        for span in pairwise([*self.starts, self.num_tokens]):
            geometry, (start, stop) = layout.experts(span)
            ranges.append(SampleRange(geometry, (start - layout.num_geometry, stop - layout.num_geometry)))
        return tuple(ranges)


def _per_token(values: list[bool] | list[float], lengths: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value of each run, repeated for its tokens."""
    return torch.repeat_interleave(torch.tensor(values, dtype=dtype), lengths)


def _check_grid(name: str, grid: Grid, divisor: int) -> None:
    rows, columns = grid
    if rows < 1 or columns < 1 or rows % divisor or columns % divisor:
        raise ValueError(f"{name} holds {grid}; rows and columns must be positive multiples of {divisor}")
