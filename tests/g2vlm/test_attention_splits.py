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
    assert layout.plan().mask()[order][:, order].equal(split_mask(layout.splits))


@pytest.mark.parametrize("seed", SEEDS)
def test_continued_plan_is_the_tail_of_the_whole_plan(seed: int) -> None:
    prefix = random_layout(seed)
    samples = [split.sample for split in prefix.splits]
    whole = prefix.appended(2, "causal", samples[-1]).appended(3, "full", samples[0]).appended(1, "causal", samples[0])
    for cached in (prefix.num_tokens, prefix.num_tokens + 1, prefix.num_tokens + 2, prefix.num_tokens + 5):
        assert whole.plan(cached).mask().equal(whole.plan().mask()[cached:])


def test_causal_tokens_prolong_a_causal_split() -> None:
    layout = SplitLayout((Split(0, 3, "causal"),))
    for _ in range(4):
        layout = layout.appended(1)
    assert layout.splits == (Split(0, 7, "causal"),)
    assert layout.appended(1, sample=1).splits == (Split(0, 7, "causal"), Split(7, 8, "causal", 1))
    assert layout.appended(1, "full").splits == (Split(0, 7, "causal"), Split(7, 8, "full"))


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
    assert layout.plan().mask().equal(split_mask(layout.splits))


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


def test_a_cached_prefix_ends_between_full_splits_and_after_the_geometry() -> None:
    layout = SplitLayout((Split(0, 2, "causal"), Split(2, 6, "full"), Split(6, 8, "causal")), geometry=((3, 5),))
    with pytest.raises(ValueError, match="geometry tokens"):
        layout.plan(cached=2)
    with pytest.raises(ValueError, match="cut Split"):
        layout.plan(cached=5)
    with pytest.raises(ValueError, match="8 tokens"):
        layout.plan(cached=9)
    assert layout.plan(cached=7).mask().equal(torch.ones(1, 8, dtype=torch.bool))
