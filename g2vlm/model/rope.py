"""Rotary position embeddings: multi-section (M-RoPE) in the decoder, row and column rotation in the geometry decoders.

Shape legend: T tokens, H heads, D width of a head, P patches of one view. Tables are fp32 and built once per forward.
Rotate-half convention: slot i of a vector is paired with slot i + width / 2 and rotated by the angle of slot i.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_table(
    position_ids: Tensor, head_dim: int, theta: float, sections: Sequence[int], interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles position * theta^(-2i / D), i < D / 2, the half table repeated twice.

    Args:
        position_ids: (3, T) temporal, row and column positions.
        head_dim: D.
        theta: base of the frequencies.
        sections: numbers of frequencies that follow the temporal, row and column position, in this order.
        interleaved: time, row and column take turns, slot by slot, and time has the slots after the last turn
            (Qwen3-VL); rows and columns have equally many.

    Returns:
        cos and sin, each (T, D) fp32.

    Raises:
        ValueError: not three sections that add up to D / 2.
    """
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise ValueError(f"sections {tuple(sections)} must be three numbers that add up to half of head_dim {head_dim}")
    angles = _angles(position_ids, head_dim, theta)  # (3, T, D / 2)
    if interleaved:
        in_turn = 3 * sections[1]
        turns = angles[..., :in_turn].unflatten(-1, (-1, 3)).diagonal(dim1=0, dim2=-1)  # (T, sections[1], 3)
        half = torch.cat([turns.flatten(-2), angles[0, :, in_turn:]], dim=-1)
    else:
        parts = torch.split(angles, list(sections), dim=-1)  # 3 x (3, T, section)
        half = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)  # (T, D / 2)
    return _cos_sin(half.repeat(1, 2))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (T, H, D) by a table (T, D), in the table's precision; the result has the dtype of `x`."""
    return _rotate(x, cos[:, None], sin[:, None])


def grid_rope_table(
    rows: int, columns: int, head_dim: int, base: float = 100.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Table for the patches of one view: the first half of a head turns with the row, the second with the column.

    Each half is D / 2 wide, with angles position * base^(-2i / (D / 2)), i < D / 4, repeated twice; positions from 0.

    Returns:
        cos and sin, each (rows * columns, D) fp32, patches row by row.

    Raises:
        ValueError: `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim {head_dim} must be a multiple of 4: two axes, each rotating pairs")
    positions = torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).T  # (2, P)
    row, column = _angles(positions, head_dim // 2, base)  # (P, D / 4) each
    return _cos_sin(torch.cat([row, row, column, column], dim=-1))


def apply_grid_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (..., P, D) by a table (P, D) of `grid_rope_table`; the result has the dtype of `x`."""
    halves = (t.unflatten(-1, (2, -1)) for t in (x, cos, sin))  # (..., P, 2, D / 2)
    return _rotate(*halves).flatten(-2)


def _angles(positions: Tensor, dim: int, base: float) -> Tensor:
    """positions (...) -> angles (..., dim / 2) in fp32."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    return positions[..., None].float() * frequencies


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
