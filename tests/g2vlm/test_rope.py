import cmath

import pytest
import torch
from torch import Tensor

from g2vlm.model.rope import apply_grid_rotary, apply_rotary, grid_rope_table, mrope_table


def turned(vector: list[float], angles: list[float]) -> list[float]:
    """Slot i and slot i + width / 2 as one complex number, turned by angle i."""
    half = len(angles)
    pairs = [complex(vector[i], vector[i + half]) * cmath.exp(1j * angle) for i, angle in enumerate(angles)]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


def mrope_reference(x: Tensor, positions: Tensor, theta: float, axis_of_slot: list[int]) -> Tensor:
    out = torch.empty_like(x)
    for token in range(x.shape[0]):
        angles = [float(positions[axis, token]) * theta ** (-2 * i / x.shape[2]) for i, axis in enumerate(axis_of_slot)]
        for head in range(x.shape[1]):
            out[token, head] = torch.tensor(turned(x[token, head].tolist(), angles))
    return out


@pytest.mark.parametrize(("sections", "theta"), [((2, 3, 3), 1e6), ((1, 4, 2), 1e4), ((4, 0, 1), 100.0)])
def test_mrope_equals_complex_rotation(sections: tuple[int, int, int], theta: float) -> None:
    head_dim = 2 * sum(sections)
    positions = torch.randint(0, 200, (3, 7))
    x = torch.randn(7, 2, head_dim)
    cos, sin = mrope_table(positions, head_dim, theta, sections)
    assert cos.shape == sin.shape == (7, head_dim)
    axis_of_slot = [0] * sections[0] + [1] * sections[1] + [2] * sections[2]
    torch.testing.assert_close(
        apply_rotary(x, cos, sin), mrope_reference(x, positions, theta, axis_of_slot), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("sections", "axis_of_slot"), [((4, 2, 2), [0, 1, 2, 0, 1, 2, 0, 0]), ((1, 1, 1), [0, 1, 2]), ((2, 0, 0), [0, 0])]
)
def test_interleaved_mrope_equals_complex_rotation(sections: tuple[int, int, int], axis_of_slot: list[int]) -> None:
    head_dim = 2 * sum(sections)
    positions, x = torch.randint(0, 200, (3, 7)), torch.randn(7, 2, head_dim)
    cos, sin = mrope_table(positions, head_dim, 1e4, sections, interleaved=True)
    expected = mrope_reference(x, positions, 1e4, axis_of_slot)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, rtol=1e-4, atol=1e-4)


def test_mrope_table_is_fp32_even_in_bf16_and_keeps_the_dtype_of_x() -> None:
    cos, sin = mrope_table(torch.full((3, 2), 1001), 8, 1e6, (2, 1, 1))
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(2, 1, 8, dtype=torch.bfloat16)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert out.equal(apply_rotary(x.float(), cos, sin).bfloat16())  # computed in fp32, rounded once


def test_logits_depend_on_position_differences_alone() -> None:
    q, k = torch.randn(2, 1, 3, 16, dtype=torch.float64)
    positions = torch.tensor([[3], [8], [1]])

    def logits(shift: int) -> Tensor:
        tables = [mrope_table(positions + shift + extra, 16, 100.0, (2, 3, 3)) for extra in (0, 5)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum(-1)

    torch.testing.assert_close(logits(0), logits(11), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sections", [(2, 3), (2, 3, 4), (4, 4, 4, 4)])
def test_wrong_sections_are_refused(sections: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="half of head_dim 16"):
        mrope_table(torch.zeros(3, 1, dtype=torch.long), 16, 1e4, sections)


@pytest.mark.parametrize(("rows", "columns", "head_dim"), [(2, 3, 8), (4, 1, 24), (1, 1, 4)])
def test_grid_rotary_equals_complex_rotation(rows: int, columns: int, head_dim: int) -> None:
    x = torch.randn(2, 3, rows * columns, head_dim)
    cos, sin = grid_rope_table(rows, columns, head_dim)
    assert cos.shape == sin.shape == (rows * columns, head_dim)
    half = head_dim // 2
    frequencies = [100.0 ** (-2 * i / half) for i in range(half // 2)]
    out = apply_grid_rotary(x, cos, sin)
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        for index in ((0, 0), (1, 2)):
            vector = x[*index, patch].tolist()
            by_row = turned(vector[:half], [row * f for f in frequencies])
            by_column = turned(vector[half:], [column * f for f in frequencies])
            torch.testing.assert_close(out[*index, patch], torch.tensor(by_row + by_column), rtol=1e-5, atol=1e-5)


def test_grid_rotary_keeps_dtype_and_uses_base() -> None:
    x = torch.randn(1, 6, 8, dtype=torch.bfloat16)
    assert apply_grid_rotary(x, *grid_rope_table(2, 3, 8)).dtype == torch.bfloat16
    assert not grid_rope_table(2, 3, 8, base=10.0)[0].equal(grid_rope_table(2, 3, 8)[0])


def test_head_dim_must_hold_two_axes_of_pairs() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_rope_table(2, 2, 6)
