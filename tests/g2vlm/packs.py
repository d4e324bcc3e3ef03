"""Packs used by several tests, and the visibility of their tokens written straight from the rule, token by token."""

import random
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from g2vlm.model.attention.splits import Split, SplitLayout
from g2vlm.sequence import (
    GeometryAttention,
    GeometrySees,
    GeometryViews,
    PackedSequence,
    Sample,
    SemanticImage,
    SemanticImageAttention,
    SequenceBuilder,
    SpecialIds,
    Text,
    ViewPositions,
)

SPECIAL = SpecialIds(bos=90, eos=91, vision_start=92, vision_end=93)

RECON: Sample = [Text((1, 2, 3)), GeometryViews(((2, 3), (2, 3), (2, 3)))]
CHAT: Sample = [
    Text((1, 2)),
    GeometryViews(((3, 2), (3, 2))),
    SemanticImage((4, 4)),
    SemanticImage((2, 6)),
    Text((4, 5)),
    Text((6, 7, 8), supervised=True),
]
OTHER: Sample = [Text((9,)), GeometryViews(((1, 4), (2, 2), (3, 1), (1, 1))), Text((5, 6))]
IMAGES: Sample = [Text((1, 2)), SemanticImage((2, 4)), Text((3,)), SemanticImage((4, 2)), Text((4,), supervised=True)]
TEXT: Sample = [Text((1, 2, 3, 4)), Text((5, 6), supervised=True), Text((7,))]
TWO_GROUPS: Sample = [GeometryViews(((1, 2), (2, 2))), Text((1, 2)), GeometryViews(((2, 1), (1, 1))), Text((3,))]

PACKS: dict[str, list[Sample]] = {
    "recon": [RECON],
    "chat": [CHAT],
    "images": [IMAGES],
    "text": [TEXT],
    "two_groups": [TWO_GROUPS],
    "views_only": [[GeometryViews(((2, 2), (2, 2)))]],
    "packed": [RECON, CHAT, OTHER],
    "packed_text": [TEXT, IMAGES, TEXT],
    "one_token": [[Text((1,))]],
}
BUILDERS = {
    f"{geometry}-{images}{'-alone' * (sees == 'views')}": SequenceBuilder(SPECIAL, geometry, images, geometry_sees=sees)
    for geometry in get_args(GeometryAttention)
    for images in get_args(SemanticImageAttention)
    for sees in get_args(GeometrySees)
}


@dataclass(frozen=True)
class Token:
    sample: int
    segment: int
    kind: type
    view: int = 0
    marker: bool = False


def tokens(samples: list[Sample]) -> list[Token]:
    """Every token of a pack in sequence order, counted from the segments."""
    found = []
    for i, sample in enumerate(samples):
        for j, segment in enumerate(sample):
            if isinstance(segment, Text):
                found += [Token(i, j, Text)] * (len(segment.ids) + segment.supervised)
            elif isinstance(segment, SemanticImage):
                count = segment.grid[0] * segment.grid[1] // segment.merge**2
                found += [Token(i, j, SemanticImage)] * (count + 2)
            elif isinstance(segment, GeometryViews):
                for view, (rows, columns) in enumerate(segment.grids):
                    marker = Token(i, j, GeometryViews, view, marker=True)
                    found += [marker, *[Token(i, j, GeometryViews, view)] * (rows * columns), marker]
    return found


def sees(builder: SequenceBuilder, query: Token, key: Token, key_is_later: bool) -> bool:
    """May this query token attend to this key token?"""
    same_segment = query.segment == key.segment
    same_view = same_segment and query.view == key.view
    if query.sample != key.sample:
        return False
    if builder.geometry_sees == "views" and is_geometry(query) and not is_geometry(key):
        return False
    if builder.geometry_attention == "frame" and query.kind == key.kind == GeometryViews:
        return same_view
    if not key_is_later:
        return True
    if query.kind is GeometryViews:
        return same_segment if builder.geometry_attention == "global" else same_view
    return query.kind is SemanticImage and builder.semantic_image_attention == "full" and same_segment


def is_geometry(token: Token) -> bool:
    return token.kind is GeometryViews and not token.marker


def segment_mask(builder: SequenceBuilder, samples: list[Sample]) -> Tensor:
    """(S, S) visibility in sequence order, from the segments."""
    found = tokens(samples)
    return torch.tensor([[sees(builder, q, k, j > i) for j, k in enumerate(found)] for i, q in enumerate(found)])


def split_mask(layout: SplitLayout) -> Tensor:
    """(S, S) visibility in sequence order, from the splits."""
    owner = [split for split in layout.splits for _ in range(split.start, split.stop)]
    geometry = {position for start, stop in layout.geometry for position in range(start, stop)}
    rows = []
    for i, query in enumerate(owner):
        row = []
        for j, key in enumerate(owner):
            if query is key:
                visible = j <= i or query.mode != "causal"
            else:
                hidden = key.mode == "noise" or query.mode == key.mode == "frame"
                visible = key.sample == query.sample and j < i and not hidden
            alone = layout.geometry_alone and i in geometry and j not in geometry
            row.append(visible and not alone)
        rows.append(row)
    return torch.tensor(rows)


def in_sequence(packed: PackedSequence) -> Tensor:
    """The plan's mask permuted to sequence order."""
    return packed.plan.mask()[packed.order][:, packed.order]


def random_segment(rng: random.Random) -> Text | GeometryViews | SemanticImage:
    kind = rng.randrange(4)
    if kind == 0:
        return GeometryViews(tuple((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(rng.randint(1, 3))))
    if kind == 1:
        return SemanticImage((2 * rng.randint(1, 2), 2 * rng.randint(1, 3)))
    return Text(tuple(range(1, 1 + rng.randint(1, 4))), supervised=rng.random() < 0.3)


def random_pack(seed: int) -> tuple[SequenceBuilder, list[Sample]]:
    rng = random.Random(seed)
    builder = SequenceBuilder(
        SPECIAL,
        rng.choice(get_args(GeometryAttention)),
        rng.choice(get_args(SemanticImageAttention)),
        rng.choice(get_args(ViewPositions)),
        rng.choice(get_args(GeometrySees)),
    )
    return builder, [[random_segment(rng) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 3))]


def random_layout(seed: int) -> SplitLayout:
    """Splits of every mode, with geometry tokens anywhere."""
    rng = random.Random(seed)
    splits, start = [], 0
    for sample in range(rng.randint(1, 3)):
        for _ in range(rng.randint(1, 5)):
            stop = start + rng.randint(1, 5)
            splits.append(Split(start, stop, rng.choice(("causal", "causal", "full", "frame", "noise")), sample))
            start = stop
    geometry, position = [], 0
    while (position := position + rng.randint(0, 4)) < start:
        stop = min(position + rng.randint(1, 4), start)
        geometry.append((position, stop))
        position = stop
    ranges = tuple(geometry) if rng.random() < 0.8 else ()
    return SplitLayout(tuple(splits), ranges, geometry_alone=rng.random() < 0.3)


def layout_order(layout: SplitLayout) -> Tensor:
    """Sequence order from expert layout, counted token by token."""
    geometry = {position for start, stop in layout.geometry for position in range(start, stop)}
    semantic = [position for position in range(layout.num_tokens) if position not in geometry]
    return torch.argsort(torch.tensor([*sorted(geometry), *semantic]))
