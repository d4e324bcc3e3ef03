import pytest
import torch

from g2vlm.model.attention.plan import AttnPlan, Block


def rows(plan: AttnPlan) -> list[str]:
    return ["".join(str(int(bit)) for bit in row) for row in plan.mask()]


def test_mask_of_full_and_causal_blocks() -> None:
    plan = AttnPlan((Block((0, 1), ((0, 4),), False), Block((1, 3), ((4, 5), (0, 3)), True)), 3, 5)
    assert rows(plan) == ["11110", "11001", "11101"]


def test_causal_is_aligned_to_the_end_when_keys_outnumber_queries() -> None:
    assert rows(AttnPlan((Block((0, 2), ((1, 5),), True),), 2, 5)) == ["01110", "01111"]


def test_plan_is_hashable_and_comparable() -> None:
    first, second = (AttnPlan((Block((0, 2), ((0, 2),), True),), 2, 2) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_empty_plan() -> None:
    assert AttnPlan((), 0, 3).mask().shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 1), (), False), "empty"),
        (((1, 1), ((0, 1),), False), "q_range"),
        (((-1, 1), ((0, 1),), False), "q_range"),
        (((0, 1), ((2, 2),), False), "key_ranges"),
        (((0, 1), ((0, 3), (5, 6), (2, 4)), False), "overlap"),
        (((0, 3), ((4, 9), (0, 2)), True), "causal"),
    ],
)
def test_bad_blocks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(*arguments)


@pytest.mark.parametrize(
    ("ranges", "num_queries", "message"),
    [
        ([(0, 2), (3, 4)], 4, "starting at query 2"),
        ([(0, 2), (1, 4)], 4, "starting at query 2"),
        ([(2, 4), (0, 2)], 4, "starting at query 0"),
        ([(0, 2)], 3, "cover 2 queries"),
        ([(0, 3)], 2, "cover 3 queries"),
    ],
)
def test_queries_are_covered_once_and_in_order(ranges: list, num_queries: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttnPlan(tuple(Block(span, ((0, 4),), False) for span in ranges), num_queries, 4)


def test_keys_beyond_the_end_are_refused() -> None:
    with pytest.raises(ValueError, match="num_keys 4"):
        AttnPlan((Block((0, 2), ((3, 5), (0, 1)), False),), 2, 4)


def test_touching_key_ranges_are_allowed() -> None:
    assert AttnPlan((Block((0, 1), ((0, 2), (2, 3)), False),), 1, 3).mask().equal(torch.ones(1, 3, dtype=torch.bool))


def test_split_plans_are_halves_of_the_mask() -> None:
    plan = AttnPlan(
        (Block((0, 2), ((0, 4),), False), Block((2, 6), ((1, 3), (4, 6)), False), Block((6, 9), ((0, 9),), True)), 9, 9
    )
    for at in (0, 1, 2, 4, 6, 9):
        before, after = plan.split(at)
        assert torch.equal(torch.cat([before.mask(), after.mask()]), plan.mask())
    with pytest.raises(ValueError, match="inside the causal block"):
        plan.split(7)
