import math

import pytest
import torch
from torch import nn

from g2vlm.supervision.dense_head import (
    DenseHead,
    DPTHead,
    DPTWidths,
    MLPHead,
    depth_head,
    patch_grid,
    uv_embedding,
    uv_grid,
)

DIM, PATCH = 12, 8
WIDTHS = DPTWidths((8, 8, 12, 12), 8)
HEADS = {
    "dense": lambda **options: DenseHead(DIM, PATCH, widths=WIDTHS, **options),
    "dpt": lambda **options: DPTHead(DIM, widths=WIDTHS, **options),
    "mlp": lambda **options: MLPHead(DIM, PATCH, inner_dim=16, **options),
}


def millions(head: nn.Module) -> float:
    return sum(parameter.numel() for parameter in head.parameters()) / 1e6


def test_parameter_counts_of_the_paper() -> None:
    """GeoVR Table 5: 32.3 M, 32.7 M and 13.6 M with d = 2048; the released head has 32.335 M with p = 28.

    DPT's output convolutions are 256 -> 128 and 128 -> 32 channels of 3 x 3, then 1 x 1 to the depth.
    """
    with torch.device("meta"):
        dense, dpt = DenseHead(2048, 28), DPTHead(2048)
        assert millions(dense) == pytest.approx(32.335, abs=5e-4)
        convolutions = (9 * 256 + 1) * 128 + (9 * 128 + 1) * 32 + (32 + 1)
        assert millions(dpt.tail) * 1e6 == pytest.approx(convolutions)
        for kind, expected in {"dense": 32.3, "dpt": 32.7, "mlp": 13.6}.items():
            assert round(millions(depth_head(kind, 2048, 32, confidence=False)), 1) == expected


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("grid", [(2, 3), (3, 5), (1, 1)])
def test_shapes(kind: str, batch: tuple[int, ...], grid: tuple[int, int]) -> None:
    layers = [torch.randn(*batch, *grid, DIM) for _ in range(4)]
    prediction = HEADS[kind](channels=3, confidence=True)(layers, (16, 24))
    assert prediction.values.shape == (*batch, 16, 24, 3)
    assert prediction.confidence.shape == (*batch, 16, 24)


def test_convolutional_tail_gives_any_size() -> None:
    layers = [torch.randn(2, 2, 3, DIM) for _ in range(4)]
    assert HEADS["dpt"]()(layers, (35, 50)).values.shape == (2, 35, 50, 1)


@pytest.mark.parametrize("kind", HEADS)
def test_first_confidence_is_the_same_everywhere(kind: str) -> None:
    layers = list(torch.randn(4, 2, 2, 3, DIM))
    confidence = HEADS[kind](confidence=True)(layers, (16, 24)).confidence
    torch.testing.assert_close(confidence, torch.full((2, 16, 24), 1.05))
    assert HEADS[kind]()(layers, (16, 24)).confidence is None


@pytest.mark.parametrize("kind", HEADS)
def test_views_do_not_see_each_other(kind: str) -> None:
    head, layers = HEADS[kind](), torch.randn(4, 3, 2, 3, DIM)
    together = head(list(layers), (16, 24)).values
    for view in range(3):
        torch.testing.assert_close(together[view], head(list(layers[:, view]), (16, 24)).values)


@pytest.mark.parametrize("kind", HEADS)
def test_activation_is_applied_to_the_values_alone(kind: str) -> None:
    raw = HEADS[kind](activation=lambda x: x, confidence=True)
    activated = HEADS[kind](activation=torch.exp, confidence=True)
    activated.load_state_dict(raw.state_dict())
    layers = list(torch.randn(4, 2, 2, 3, DIM))
    before, after = raw(layers, (16, 24)), activated(layers, (16, 24))
    torch.testing.assert_close(after.values, before.values.exp())
    assert after.confidence.equal(before.confidence)


def test_pixels_of_a_channel_lie_where_the_patch_is() -> None:
    """With the student's grid as the target's, a token of the MLP head moves the pixels of its own patch only."""
    head, layers = HEADS["mlp"](channels=2), torch.randn(4, 2, 3, DIM)
    changed = layers.clone()
    changed[:, 1, 2] = torch.randn(4, DIM)
    size = (2 * PATCH, 3 * PATCH)
    moved = head(list(layers), size).values != head(list(changed), size).values  # (H, W, C)
    inside = torch.zeros(*size, 1, dtype=torch.bool)
    inside[PATCH:, 2 * PATCH :] = True
    assert moved.equal(inside.expand_as(moved))


def test_every_layer_counts_and_their_order_matters() -> None:
    for build in HEADS.values():
        head, layers = build(), list(torch.randn(4, 1, 2, 3, DIM))
        values = head(layers, (16, 24)).values
        assert not torch.allclose(head(layers[::-1], (16, 24)).values, values)
        for level in range(4):
            other = [torch.randn_like(layer) if i == level else layer for i, layer in enumerate(layers)]
            assert not torch.allclose(head(other, (16, 24)).values, values)


def test_uv_grid_lies_inside_a_rectangle_of_unit_half_diagonal() -> None:
    height, width, aspect = 6, 8, 1.7
    grid = uv_grid(height, width, aspect)
    assert grid.flip(0, 1).equal(-grid)
    assert grid[:, 0, 0].unique().numel() == 1
    assert grid[0, :, 1].unique().numel() == 1
    half_cell = (grid[1, 1] - grid[0, 0]) / 2
    corner = grid[-1, -1] + half_cell
    assert corner.norm().item() == pytest.approx(1)
    assert (corner[0] / corner[1]).item() == pytest.approx(aspect)


def test_uv_embedding_has_sine_then_cosine_of_each_coordinate() -> None:
    u, v, dim = 0.3, -0.8, 8
    embedding = uv_embedding(torch.tensor([[[u, v]]]), dim)[0, 0]
    angles = [x * 100 ** (-k / 2) for x in (u, v) for k in (0, 1)]
    expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
    torch.testing.assert_close(embedding, torch.tensor(expected))


def test_wrong_calls_say_what_is_wrong() -> None:
    layers = list(torch.randn(4, 1, 2, 3, DIM))
    with pytest.raises(ValueError, match="expected 4 equal shapes"):
        HEADS["dense"]()(layers[:3], (16, 24))
    with pytest.raises(ValueError, match="expected 4 equal shapes"):
        HEADS["mlp"]()([*layers[:3], layers[3][:, :1]], (16, 24))
    for kind in ("dense", "mlp"):
        with pytest.raises(ValueError, match="multiples of the patch size 8"):
            HEADS[kind]()(layers, (16, 20))
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        DenseHead(DIM, 14)
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        uv_embedding(torch.zeros(1, 1, 2), 6)
    with pytest.raises(ValueError, match="must be one of dense, dpt, mlp"):
        depth_head("conv", DIM, PATCH, confidence=False)  # pyright: ignore[reportArgumentType]


def test_patch_grid() -> None:
    assert patch_grid((56, 84), 28) == (2, 3)
