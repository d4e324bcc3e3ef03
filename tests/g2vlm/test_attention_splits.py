import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from g2vlm.model.attention.plan import AttnPlan
from g2vlm.model.attention.splits import Split, SplitLayout
from tests.g2vlm.packs import layout_order, random_layout, split_mask

SEEDS = range(200)


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_equals_the_visibility_rule(seed: int) -> None:
    layout = random_layout(seed)
    order = layout_order(layout)
    assert layout.plan().mask()[order][:, order].equal(split_mask(layout))


@pytest.mark.parametrize("seed", SEEDS)
def test_continued_plans_follow_the_rule_of_the_whole(seed: int) -> None:
    """A layout cut between any two splits, each part in its own expert layout after the one before."""
    whole = random_layout(seed)
    order = layout_order(whole)
    num_samples = whole.splits[-1].sample + 1
    mask, keys, seen = split_mask(whole), [], ()
    for part in cut(whole, seed):
        layout = replace(part, num_cached=len(keys), cached=seen)
        start = len(keys)
        keys += [start + position for position in torch.argsort(layout_order(part)).tolist()]
        rows = torch.tensor(keys[start:])
        assert layout.plan().mask().equal(mask[rows][:, keys])
        seen = layout.seen(num_samples)
    assert sorted(keys) == list(range(len(order)))


def cut(layout: SplitLayout, seed: int) -> list[SplitLayout]:
    """The same splits in several layouts, each starting at 0."""
    rng = random.Random(seed)
    bounds = [0, *sorted(split.start for split in layout.splits[1:] if rng.random() < 0.6), layout.num_tokens]
    return [part_of(layout, start, stop) for start, stop in pairwise(bounds)]


def part_of(layout: SplitLayout, start: int, stop: int) -> SplitLayout:
    splits = [replace(s, start=s.start - start, stop=s.stop - start) for s in layout.splits if start <= s.start < stop]
    ranges = [(max(a, start) - start, min(b, stop) - start) for a, b in layout.geometry if a < stop and b > start]
    return SplitLayout(tuple(splits), tuple(ranges), geometry_alone=layout.geometry_alone)


def test_branches_of_one_sample_do_not_see_each_other() -> None:
    prefix = SplitLayout((Split(0, 2, "causal"), Split(2, 6, "full")), geometry=((3, 5),))
    (seen,) = prefix.seen(1)
    branches = SplitLayout((Split(0, 2, "causal", 0), Split(2, 5, "causal", 1)), (), 6, (seen, seen))
    expected = torch.zeros(5, 11, dtype=torch.bool)
    expected[:, :6] = True
    expected[:2, 6:8] = torch.ones(2, 2).tril().bool()
    expected[2:, 8:] = torch.ones(3, 3).tril().bool()
    assert branches.plan().mask().equal(expected)
    assert [after.everything for after in branches.seen(2)] == [((0, 8),), ((0, 6), (8, 11))]
    assert [after.geometry for after in branches.seen(2)] == [((0, 2),), ((0, 2),)]


def test_consecutive_causal_splits_are_one_block() -> None:
    layout = SplitLayout((Split(0, 2, "causal"), Split(2, 3, "causal"), Split(3, 7, "causal")))
    assert layout.plan() == SplitLayout((Split(0, 7, "causal"),)).plan()
    assert len(layout.plan().blocks) == 1


def test_full_split_of_both_experts_is_one_block_when_they_touch() -> None:
    plan = SplitLayout((Split(0, 6, "full"),), geometry=((1, 3), (4, 5))).plan()
    assert [(block.q_range, block.key_ranges) for block in plan.blocks] == [((0, 6), ((0, 6),))]


def test_empty_layout() -> None:
    assert SplitLayout(()).plan() == AttnPlan((), 0, 0)


def test_geometry_only_layout() -> None:
    layout = SplitLayout((Split(0, 3, "causal"), Split(3, 5, "full")), geometry=((0, 5),))
    assert layout.plan().mask().equal(split_mask(layout))


@pytest.mark.parametrize(
    ("spans", "geometry", "message"),
    [
        ([(0, 2), (3, 4)], (), "splits"),
        ([(0, 2), (1, 4)], (), "splits"),
        ([(1, 2)], (), "splits"),
        ([(0, 4)], ((2, 3), (0, 1)), "geometry ranges"),
        ([(0, 4)], ((2, 2),), "geometry ranges"),
        ([(0, 4)], ((2, 5),), "beyond the 4 tokens"),
    ],
)
def test_bad_layouts_are_refused(spans: list, geometry: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitLayout(tuple(Split(start, stop, "causal") for start, stop in spans), geometry)


def test_bad_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="causal, full, frame, noise"):
        Split(0, 1, "diagonal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="start < stop"):
        Split(2, 2, "full")
