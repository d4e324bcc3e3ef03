"""VLM-3R's block against its equations in plain matrix products; starts, gradients, order of tokens, ragged frames."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from g2vlm.fusion_config import FusionConfig
from g2vlm.model.fusion import (
    GivenFrames,
    NoFusion,
    SpatialVisualViewFusion,
    build_fusion,
    frame_sizes,
    fuse_frames,
)

FRAMES, IMAGE, GEOMETRY, WIDTH, OTHER, HEAD = 3, 5, 7, 24, 10, 8


def block(**options) -> SpatialVisualViewFusion:
    """In float64, every parameter random, in evaluation."""
    fusion = SpatialVisualViewFusion(WIDTH, OTHER, HEAD, **options).double().eval()
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


def tokens(width: int, *shape: int) -> Tensor:
    return torch.randn(*shape, width, dtype=torch.float64)


@pytest.fixture
def visual() -> Tensor:
    return tokens(WIDTH, FRAMES, IMAGE)


@pytest.fixture
def geometry() -> Tensor:
    return tokens(OTHER, FRAMES, GEOMETRY)


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def reference(fusion: SpatialVisualViewFusion, visual: Tensor, geometry: Tensor, norm_out: bool = True) -> Tensor:
    """Token by token and head by head, for one frame: image tokens (N, D), geometry tokens (M, C)."""
    w = {name: value.detach() for name, value in fusion.state_dict().items()}
    sources = [norm(token, w, "geometry_norm") for token in geometry]
    keys = [linear(linear(token, w, "key"), w, "attention.k_proj") for token in sources]
    values = [linear(linear(token, w, "value"), w, "attention.v_proj") for token in sources]
    fused = []
    for token in visual:
        query = linear(linear(norm(token, w, "visual_norm"), w, "query"), w, "attention.q_proj")
        heads = []
        for start in range(0, WIDTH, HEAD):
            part = slice(start, start + HEAD)
            exps = torch.stack([(query[part] @ key[part] / HEAD**0.5).exp() for key in keys])
            heads.append(sum(e / exps.sum() * value[part] for e, value in zip(exps, values, strict=True)))
        branch = linear(linear(torch.cat(heads), w, "attention.out_proj"), w, "output")
        fused.append(token + (norm(branch, w, "output_norm") if norm_out else branch))
    return torch.stack(fused)


@pytest.mark.parametrize("norm_out", [True, False])
def test_equals_the_equations(visual: Tensor, geometry: Tensor, norm_out: bool) -> None:
    fusion = block(norm_out=norm_out)
    expected = [reference(fusion, v, g, norm_out) for v, g in zip(visual, geometry, strict=True)]
    torch.testing.assert_close(fusion(visual, geometry), torch.stack(expected))


def test_the_attention_is_torchs_with_its_packed_weights(visual: Tensor, geometry: Tensor) -> None:
    """What the released block holds: torch's module behind the first projections."""
    fusion = block()
    own = fusion.attention
    theirs = nn.MultiheadAttention(WIDTH, WIDTH // HEAD, batch_first=True).double().eval()
    inputs = (own.q_proj, own.k_proj, own.v_proj)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([layer.weight for layer in inputs]),
            "in_proj_bias": torch.cat([layer.bias for layer in inputs]),
            "out_proj.weight": own.out_proj.weight,
            "out_proj.bias": own.out_proj.bias,
        }
    )
    query, key, value = tokens(WIDTH, 2, 4), tokens(WIDTH, 2, 6), tokens(WIDTH, 2, 6)
    torch.testing.assert_close(own(query, key, value), theirs(query, key, value)[0])


def test_the_published_sizes() -> None:
    """18 heads, 729 image tokens of 1152, 730 tokens of CUT3R: queries, keys and values are projected twice."""
    with torch.device("meta"):
        fusion = SpatialVisualViewFusion(1152, 768)
        out = fusion(torch.empty(2, 729, 1152), torch.empty(2, 730, 768))
    assert out.shape == (2, 729, 1152)
    assert 1152 // fusion.attention.head_dim == 18
    shapes = {tuple(p.shape) for n, p in fusion.named_parameters() if n in ("query.weight", "key.weight")}
    assert shapes == {(1152, 1152), (1152, 768)}
    squares = sum(tuple(p.shape) == (1152, 1152) for p in fusion.parameters())
    assert squares == 6  # first query projection, three inputs and the output of the attention, the branch's output


@pytest.mark.parametrize("options", [{}, {"norm_out": False}, {"init": "zero"}])
def test_gradients(options: dict) -> None:
    """Of the inputs and of every parameter, by finite differences."""
    fusion = SpatialVisualViewFusion(4, 3, 2, **options).double().eval()
    visual, geometry = tokens(4, 1, 2).requires_grad_(), tokens(3, 1, 3).requires_grad_()
    assert gradcheck(lambda v, g, *_: fusion(v, g), (visual, geometry, *fusion.parameters()))


def test_order_of_geometry_tokens_says_nothing(visual: Tensor, geometry: Tensor) -> None:
    fusion = block()
    torch.testing.assert_close(fusion(visual, geometry[:, torch.randperm(GEOMETRY)]), fusion(visual, geometry))


def test_order_of_image_tokens_and_of_frames_is_kept(visual: Tensor, geometry: Tensor) -> None:
    fusion = block()
    fused = fusion(visual, geometry)
    rows, frames = torch.randperm(IMAGE), torch.randperm(FRAMES)
    torch.testing.assert_close(fusion(visual[:, rows], geometry), fused[:, rows])
    torch.testing.assert_close(fusion(visual[frames], geometry[frames]), fused[frames])


def test_frames_do_not_see_each_other(visual: Tensor, geometry: Tensor) -> None:
    fusion = block()
    changed = geometry.clone()
    changed[1] = tokens(OTHER, GEOMETRY)
    before, after = fusion(visual, geometry), fusion(visual, changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


def test_tokens_that_do_not_count(visual: Tensor, geometry: Tensor) -> None:
    fusion = block()
    valid = torch.ones(FRAMES, GEOMETRY, dtype=torch.bool)
    valid[:, 2] = valid[:, 5] = False
    torch.testing.assert_close(fusion(visual, geometry, valid), fusion(visual, geometry[:, [0, 1, 3, 4, 6]]))


def test_the_branch_has_unit_variance_from_the_first_step(visual: Tensor, geometry: Tensor) -> None:
    fusion = SpatialVisualViewFusion(WIDTH, OTHER, HEAD).double().eval()
    branch = fusion(visual, geometry) - visual
    torch.testing.assert_close(branch.mean(-1), torch.zeros_like(branch[..., 0]), atol=1e-9, rtol=0)
    assert 0.8 < branch.var(-1, correction=0).mean() <= 1  # eps keeps a little back


@pytest.mark.parametrize("norm_out", [True, False])
def test_zero_starts_as_without_fusion_and_learns(visual: Tensor, geometry: Tensor, norm_out: bool) -> None:
    fusion = SpatialVisualViewFusion(WIDTH, OTHER, HEAD, init="zero", norm_out=norm_out, dropout=0).double()
    assert torch.equal(fusion(visual, geometry), visual)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.01)
    target = tokens(WIDTH, FRAMES, IMAGE)
    losses = []
    for _ in range(20):
        loss = (fusion(visual, geometry) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.norm() < 10 for p in fusion.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in fusion.named_parameters() if n != "key.bias")


def test_dropout_acts_on_the_sum(visual: Tensor, geometry: Tensor) -> None:
    """Image tokens are dropped too, with what was added to them."""
    fusion, rate = block(dropout=0.5), 0.5
    whole = fusion(visual, geometry)
    dropped = fusion.train()(visual, geometry)
    zero = dropped == 0
    assert 0.3 < zero.double().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], whole[~zero] / (1 - rate))
    assert torch.equal(fusion.eval()(visual, geometry), whole)


def test_dropout_on_the_branch_alone(visual: Tensor, geometry: Tensor) -> None:
    fusion = block(dropout=0.5, dropout_on="branch")
    branch = fusion(visual, geometry) - visual
    dropped = fusion.train()(visual, geometry) - visual
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(dropped[kept], branch[kept] * 2)


def test_the_attention_starts_as_torchs() -> None:
    fusion = SpatialVisualViewFusion(256, 128)
    theirs = nn.MultiheadAttention(256, 4)
    for layer in (fusion.attention.q_proj, fusion.attention.k_proj, fusion.attention.v_proj):
        assert abs(layer.weight.std() / theirs.in_proj_weight.std() - 1) < 0.03
        assert not layer.bias.any()
    assert abs(fusion.attention.out_proj.weight.std() / theirs.out_proj.weight.std() - 1) < 0.03
    assert not fusion.attention.out_proj.bias.any()
    assert abs(fusion.query.weight.std() / nn.Linear(256, 256).weight.std() - 1) < 0.03


def test_heads_must_fill_the_width() -> None:
    with pytest.raises(ValueError, match="heads of width 7 do not fill 24"):
        SpatialVisualViewFusion(WIDTH, OTHER, 7)


def test_no_fusion_is_nothing(visual: Tensor, geometry: Tensor) -> None:
    fusion = build_fusion(None, WIDTH, OTHER)
    assert isinstance(fusion, NoFusion)
    assert not fusion.state_dict()
    assert fusion(visual, geometry) is visual


def test_the_config_builds_the_block() -> None:
    own = build_fusion(FusionConfig(head_dim=HEAD, dropout=0.3, dropout_on="branch"), WIDTH, OTHER)
    assert isinstance(own, SpatialVisualViewFusion)
    assert own.key.in_features == OTHER
    assert (own.branch_dropout.p, type(own.sum_dropout)) == (0.3, nn.Identity)
    given = build_fusion(FusionConfig(head_dim=HEAD, source="given", norm_out=False, init="zero"), WIDTH, OTHER)
    assert isinstance(given, SpatialVisualViewFusion)
    assert given.key.in_features == 768
    assert isinstance(given.output_norm, nn.Identity)
    assert not given.output.weight.any()


def test_frames_of_all_sizes() -> None:
    fusion = block()
    sizes, counts = [4, 2, 4, 4, 2], [3, 3, None, 3, 5]
    visual = tokens(WIDTH, sum(sizes))
    geometry = [None if count is None else tokens(OTHER, count) for count in counts]
    fused = fuse_frames(fusion, visual, sizes, geometry).split(sizes)
    for own, before, source in zip(fused, visual.split(sizes), geometry, strict=True):
        if source is None:
            assert torch.equal(own, before)
        else:
            torch.testing.assert_close(own, reference(fusion, before, source))


def test_frames_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match="2 frames of images and geometry tokens of 1 frames"):
        fuse_frames(block(), tokens(WIDTH, 4), [2, 2], [None])


def test_a_video_has_a_frame_per_step() -> None:
    assert frame_sizes(torch.tensor([[1, 4, 6], [3, 2, 4]]), 2) == [6, 2, 2, 2]


def test_given_frames_meet_images_in_order() -> None:
    given = GivenFrames()
    assert given.take(2) is None
    frames = [torch.ones(1, 2), None, torch.zeros(1, 2)]
    with given.use(frames):
        assert given.take(2) == frames[:2]
        assert given.take(1) == frames[2:]
        with pytest.raises(ValueError, match="1 frames of images; geometry tokens of 0 frames are left"):
            given.take(1)
    assert given.take(1) is None
    with pytest.raises(ValueError, match="3 of 3 given frames met no image"), given.use(frames):
        pass
    with pytest.raises(ValueError, match="in use already"), given.use([]), given.use([]):
        pass
    with pytest.raises(KeyError), given.use(frames):
        raise KeyError
    assert given.take(1) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "one"}, "fusion.init is 'one'; allowed: vlm3r, zero"),
        ({"tokens": "patch"}, "fusion.tokens is 'patch'; allowed: all, camera, patches"),
        ({"dropout": 1.0}, "fusion.dropout is 1.0"),
        ({"head_dim": 0}, "fusion.head_dim is 0; it must be positive"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionConfig(**values)
