import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.supervision.activations import inverse_log, one_plus_exp
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.heads import (
    LIFT_TASKS,
    CameraHead,
    CorrespondenceHead,
    FeatureAlignmentHead,
    LiftHeads,
    LiftProjectors,
    ScaleHead,
    SharedLiftProjector,
    TokenMLP,
    init_from_query,
    query_basis,
)

DIM = 12
WIDTHS = DPTWidths((8, 8, 12, 12), 8)


def test_inverse_log() -> None:
    x = torch.tensor([-3.0, -1e-4, 0.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    y = inverse_log(x)
    torch.testing.assert_close(y, x.sign() * (x.abs().exp() - 1))
    torch.testing.assert_close(y.sign() * torch.log1p(y.abs()), x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, x.abs().exp())


def test_one_plus_exp() -> None:
    torch.testing.assert_close(one_plus_exp(torch.tensor([-1e3, 0.0])), torch.tensor([1.0, 2.0]))


def test_token_mlp_is_its_formula() -> None:
    mlp, x = TokenMLP([DIM, 7, 5, 3], norm=True, activation=torch.tanh), torch.randn(4, 6, DIM)
    first, second, third = mlp.layers
    expected = third(F.gelu(second(F.gelu(first(F.layer_norm(x, (DIM,)))))))
    torch.testing.assert_close(mlp(x), expected.tanh())
    assert [layer.out_features for layer in mlp.layers] == [7, 5, 3]


def test_activations_see_float32_even_of_half_precision_weights() -> None:
    seen = []
    TokenMLP([DIM, 3], activation=lambda x: seen.append(x.dtype) or x).bfloat16()(torch.randn(4, DIM))
    assert seen == [torch.float32]


def test_token_mlp_needs_two_widths() -> None:
    with pytest.raises(ValueError, match="at least an input and an output width"):
        TokenMLP([DIM])


def test_camera_head_orders_its_numbers() -> None:
    head = CameraHead(DIM, inner_dim=16)
    with torch.no_grad():
        for layer, bias in ((head.translation, [1, 2, 3]), (head.quaternion, [4, 5, 6, 7]), (head.fov, [8.0, -9.0])):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(bias))
    torch.testing.assert_close(
        head(torch.randn(2, 5, DIM)), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 0]).expand(2, 5, 9)
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_first_field_of_view_can_learn(seed: int) -> None:
    torch.manual_seed(seed)
    assert (CameraHead(64)(torch.randn(32, 64))[:, 7:] > 0.1).all()


def test_camera_head_of_the_paper() -> None:
    with torch.device("meta"):
        head = CameraHead(2048)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if p.dim() == 2}
    assert shapes == {
        "trunk.layers.0.weight": (1536, 2048),
        "trunk.layers.1.weight": (1536, 1536),
        "translation.weight": (3, 1536),
        "quaternion.weight": (4, 1536),
        "fov.weight": (2, 1536),
    }


def test_scale_head_gives_one_positive_number_per_token() -> None:
    scale = ScaleHead(DIM)(1e2 * torch.randn(2, 5, DIM))
    assert scale.shape == (2, 5)
    assert (scale > 0).all()


def test_alignment_head_resizes_with_cell_borders_aligned() -> None:
    """Halving the grid is the mean of 2 x 2 cells, the same size changes nothing."""
    head, tokens = FeatureAlignmentHead(DIM, 5), torch.randn(3, 4, 6, DIM)
    torch.testing.assert_close(head(tokens, (4, 6)), head.mlp(tokens))
    pooled = tokens.unflatten(1, (2, 2)).unflatten(3, (3, 2)).mean((2, 4))
    torch.testing.assert_close(head(tokens, (2, 3)), head.mlp(pooled))


# Correspondence: d is the width of the block, rows that of all its query heads.
RANKS = {"small": (12, 12, 5), "rows_below_d": (8, 12, 5), "rows_above_d": (20, 12, 5), "full": (12, 12, 12),
         "above_d": (20, 12, 16), "above_rows": (8, 12, 11)}  # fmt: skip


def block(rows: int, dim: int, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query weight (of a given rank), query bias and norm weight of a block."""
    weight = torch.randn(rows, dim)
    if rank is not None:
        weight = torch.randn(rows, rank) @ torch.randn(rank, dim)
    return weight, torch.randn(rows), torch.rand(dim) + 0.5


def queries(tokens: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor, eps: float) -> Tensor:
    normed = tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + eps) * norm_weight
    return F.linear(normed, weight, bias)


def filled(weight: Tensor, bias: Tensor | None, norm_weight: Tensor, embed_dim: int) -> CorrespondenceHead:
    head = CorrespondenceHead(weight.shape[1], embed_dim)
    init_from_query(head, weight, bias, norm_weight)
    return head


def best_approximation(square: Tensor, rank: int) -> Tensor:
    """The rank-r matrix nearest to a symmetric one, by its SVD (Eckart and Young)."""
    U, S, Vh = torch.linalg.svd(square.double())
    return U[:, :rank] @ S[:rank].diag() @ Vh[:rank]


@pytest.mark.parametrize(("rows", "dim", "embed_dim"), RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_correspondence_starts_as_projected_queries(rows: int, dim: int, embed_dim: int, with_bias: bool) -> None:
    weight, bias, norm_weight = block(rows, dim)
    bias = bias if with_bias else None
    head, tokens = filled(weight, bias, norm_weight, embed_dim), 3 * torch.randn(40, dim)
    Q = queries(tokens, weight, bias, norm_weight, head.norm.eps)
    U = query_basis(weight, embed_dim).float()
    E = head(tokens)
    scale = Q.abs().max().item()
    torch.testing.assert_close(E[:, : U.shape[1]], Q @ U, rtol=0, atol=2e-6 * scale)
    assert (E[:, U.shape[1] :] == 0).all()


@pytest.mark.parametrize(("rows", "dim", "embed_dim"), RANKS.values(), ids=RANKS)
def test_first_layer_keeps_the_best_approximation_of_the_queries(rows: int, dim: int, embed_dim: int) -> None:
    weight, bias, norm_weight = block(rows, dim)
    A = filled(weight, bias, norm_weight, embed_dim).expand.weight[:embed_dim].double()
    square = weight.double().T @ weight.double()
    expected = best_approximation(square, embed_dim)
    torch.testing.assert_close(A.T @ A, expected, rtol=0, atol=1e-6 * square.abs().max().item())


@pytest.mark.parametrize(("rows", "dim", "embed_dim"), RANKS.values(), ids=RANKS)
def test_basis_holds_the_left_singular_vectors(rows: int, dim: int, embed_dim: int) -> None:
    weight, _, _ = block(rows, dim)
    U = query_basis(weight, embed_dim)
    kept = min(embed_dim, rows)
    assert U.shape == (rows, kept)
    torch.testing.assert_close(U.T @ U, torch.eye(kept, dtype=torch.float64))
    values = torch.linalg.svdvals(weight.double())[:kept]
    values = F.pad(values, (0, kept - len(values)))
    torch.testing.assert_close((U.T @ weight.double()).norm(dim=1), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [8, 12, 20])
def test_with_room_for_all_rows_no_similarity_changes(rows: int) -> None:
    weight, bias, norm_weight = block(rows, DIM)
    head, tokens = filled(weight, bias, norm_weight, rows + 3), torch.randn(30, DIM)
    Q, E = queries(tokens, weight, bias, norm_weight, head.norm.eps), head(tokens)
    torch.testing.assert_close(E @ E.T, Q @ Q.T, rtol=1e-5, atol=1e-5 * (Q @ Q.T).abs().max().item())


def test_embedding_wider_than_the_rank_of_the_queries() -> None:
    weight, bias, norm_weight = block(16, DIM, rank=3)
    head, tokens = filled(weight, bias, norm_weight, 7), torch.randn(30, DIM)
    Q, U = queries(tokens, weight, bias, norm_weight, head.norm.eps), query_basis(weight, 7).float()
    torch.testing.assert_close(head(tokens), Q @ U, rtol=0, atol=2e-6 * Q.abs().max().item())
    A = head.expand.weight[:7]
    torch.testing.assert_close(A.T @ A, weight.T @ weight, rtol=0, atol=1e-5 * (weight.T @ weight).abs().max().item())


def test_every_embedding_dimension_can_learn_even_where_it_starts_at_zero() -> None:
    head = filled(*block(4, DIM), 9)
    head(torch.randn(30, DIM)).pow(2).sum().backward()
    head(torch.randn(30, DIM)).sum().backward()
    assert (head.expand.weight.grad.abs().amax(1) > 0).all()


def test_correspondence_head_takes_half_precision_weights_of_a_block() -> None:
    weight, bias, norm_weight = (tensor.bfloat16() for tensor in block(8, DIM))
    exact = filled(weight.float(), bias.float(), norm_weight.float(), 5)
    for name, value in filled(weight, bias, norm_weight, 5).state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[name])


def test_weights_that_do_not_fit_the_head_are_named() -> None:
    head, (weight, bias, norm_weight) = CorrespondenceHead(DIM, 5), block(8, DIM)
    with pytest.raises(ValueError, match=r"query_weight: given shape \(12, 8\), expected \(12, 12\)"):
        init_from_query(head, weight.T, None, norm_weight)
    with pytest.raises(ValueError, match=r"query_bias: given shape \(7,\), expected \(8,\)"):
        init_from_query(head, weight, bias[:7], norm_weight)
    with pytest.raises(ValueError, match=r"norm_weight: given shape \(11,\), expected \(12,\)"):
        init_from_query(head, weight, bias, norm_weight[:11])


def test_lifting_gives_every_task_with_its_channels_and_activation() -> None:
    head, layers = LiftHeads(LiftProjectors(DIM, 8), widths=WIDTHS), list(torch.randn(4, 2, 2, 3, DIM))
    predictions = head(layers, (10, 14))
    assert {name: p.values.shape for name, p in predictions.items()} == {
        "depth": (2, 10, 14, 1),
        "ray": (2, 10, 14, 6),
        "point": (2, 10, 14, 3),
    }
    features = head.projectors(layers)
    inverse = {"depth": torch.log, "ray": lambda y: y, "point": lambda y: y.sign() * torch.log1p(y.abs())}
    for name, prediction in predictions.items():
        assert (prediction.confidence > 1).all()
        maps = [feature.reshape(-1, 2, 3, 8) for feature in features]
        logits, _ = head.heads[name].tail(head.heads[name].body(maps), (10, 14))
        torch.testing.assert_close(inverse[name](prediction.values), logits.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def test_lifting_of_a_single_task() -> None:
    assert list(LiftHeads(LiftProjectors(DIM, 8), ["ray"], WIDTHS).heads) == ["ray"]
    with pytest.raises(ValueError, match=f"given \\['normal'\\], allowed are {', '.join(LIFT_TASKS)}"):
        LiftHeads(LiftProjectors(DIM, 8), ["depth", "normal"])


def test_projectors_are_one_per_layer_or_one_for_all() -> None:
    layers = list(torch.randn(4, 2, 2, 3, DIM))
    separate, shared = LiftProjectors(DIM, 8), SharedLiftProjector(DIM, 8)
    for layer, feature, projector in zip(layers, separate(layers), separate.projectors, strict=True):
        assert feature.equal(projector(layer))
    for layer, feature in zip(layers, shared(layers), strict=True):
        assert feature.equal(shared.projector(layer))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (separate, shared)]
    assert sizes[0] == 4 * sizes[1]
    with pytest.raises(ValueError, match="zip"):
        separate(layers[:3])
