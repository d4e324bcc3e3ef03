import pytest

from g2vlm.supervision.layers import proportional_layers


def test_same_depth_is_the_output_of_the_same_block() -> None:
    assert proportional_layers(range(24), 24, 24) == tuple(range(1, 25))


def test_ties_go_to_the_even_layer() -> None:
    assert proportional_layers([0, 2, 4], 8, 4) == (0, 2, 2)  # 0.5, 1.5, 2.5


def test_the_last_block_is_the_last_state() -> None:
    assert [proportional_layers([23], 24, depth) for depth in (1, 7, 28, 36)] == [(1,), (7,), (28,), (36,)]


@pytest.mark.parametrize("block", [-1, 24])
def test_a_block_that_the_teacher_lacks(block: int) -> None:
    with pytest.raises(ValueError, match="teacher that has 24"):
        proportional_layers([3, block], 24, 28)
