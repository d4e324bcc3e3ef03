"""The model against slow references and the promises of its design: isolation of samples, order of views, precision."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from g2vlm.checkpoint import load_model, save_model
from g2vlm.config import DecoderConfig, G2VLMConfig, GeometryEncoderConfig, HeadsConfig, SemanticEncoderConfig
from g2vlm.model.decoder import MoTDecoder, MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.heads import PixelHead
from g2vlm.model.rope import mrope_table
from g2vlm.processing import recon_inputs, recon_sequence, sequence_builder
from g2vlm.sequence import GeometryViews, SemanticImage, Text

DECODER = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mrope_sections=(1, 1, 2),
    geometric_layer_scale=0.5,
)


def small_config(**changes) -> G2VLMConfig:
    parts = {
        "decoder": DECODER,
        "semantic_encoder": SemanticEncoderConfig(hidden_size=32, num_layers=1, num_heads=2),
        "geometry_encoder": GeometryEncoderConfig(
            hidden_size=24, num_layers=1, num_heads=2, image_size=42, windows="per_image", projection_init="normal"
        ),
        "heads": HeadsConfig(depth=1, num_heads=4, point_dim=16, camera_dim=16, normals="learned", confidence=True),
        "tokens": G2VLMConfig.tiny().tokens,
    }
    return G2VLMConfig(**{**parts, **changes})


def randomise(module: torch.nn.Module, std: float = 0.2) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


@pytest.fixture
def model() -> G2VLMForConditionalGeneration:
    model = G2VLMForConditionalGeneration(small_config()).double().eval()
    randomise(model)
    return model


def recon(model: G2VLMForConditionalGeneration, images: Tensor):
    (prediction,) = model(**recon_inputs(images, model.config, "cpu")).geometry
    return prediction


def slow_layer(layer: MoTLayer, tokens: Tensor, is_geometry: list[bool], cos: Tensor, sin: Tensor, mask: Tensor):
    """Token by token: each through its own expert's weights, attention as explicit softmax sums. (T, D) -> (T, D)."""
    experts = [layer.geometric if flag else layer.semantic for flag in is_geometry]
    qkv = [e.project(x[None], c[None], s[None]) for e, x, c, s in zip(experts, tokens, cos, sin, strict=True)]
    q, k, v = (torch.cat(part) for part in zip(*qkv, strict=True))
    group = q.shape[1] // k.shape[1]
    out = []
    for i, expert in enumerate(experts):
        heads = []
        for head in range(q.shape[1]):
            logits = k[:, head // group] @ q[i, head] * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~mask[i], float("-inf")).softmax(-1)
            heads.append(weights @ v[:, head // group])
        out.append(expert.update(tokens[i][None], torch.stack(heads)[None]))
    return torch.cat(out)


def test_layer_equals_a_token_by_token_reference() -> None:
    config = small_config()
    views = GeometryViews(((2, 3), (2, 3)))
    sequence = sequence_builder(config).build([(Text((4, 5, 6)), views, Text((7, 8)))])
    layer = MoTLayer(DECODER).double()
    randomise(layer)
    num_tokens, num_geometry = sequence.num_tokens, sequence.num_geometry
    tokens = torch.randn(num_tokens, 32, dtype=torch.float64)
    cos, sin = mrope_table(sequence.position_ids, 8, DECODER.rope_theta, DECODER.mrope_sections)
    is_geometry = [i < num_geometry for i in range(num_tokens)]
    expected = slow_layer(layer, tokens, is_geometry, cos, sin, sequence.plan.mask())
    geometry, semantic = layer(tokens[:num_geometry], tokens[num_geometry:], cos, sin, sequence.plan, None)
    torch.testing.assert_close(torch.cat([geometry, semantic]), expected)


@pytest.mark.parametrize("size", [(28, 42), (42, 42)])
def test_permuted_views_give_permuted_outputs(size: tuple[int, int]) -> None:
    model = G2VLMForConditionalGeneration(small_config(view_positions="shared")).double().eval()
    randomise(model)
    images = torch.rand(4, 3, *size, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = recon(model, images), recon(model, images[order])
    for name in ("local_points", "cam_to_world", "normals", "confidence"):
        torch.testing.assert_close(getattr(permuted, name), getattr(straight, name)[order])


def test_sequential_positions_depend_on_the_order_of_views(model: G2VLMForConditionalGeneration) -> None:
    """The released positions break permutation equivariance; docs/paper_map.md gives the size of the deviation."""
    images = torch.rand(3, 3, 28, 28, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    straight, permuted = recon(model, images), recon(model, images[order])
    assert not torch.allclose(permuted.local_points, straight.local_points[order], rtol=1e-4)


@pytest.mark.parametrize("windows", ["per_image", "official"])
@pytest.mark.parametrize("sizes", [((28, 42), (14, 28), (28, 42)), ((28, 42), (28, 42))])
def test_other_samples_change_nothing(model: G2VLMForConditionalGeneration, windows: str, sizes) -> None:
    model.geometry_encoder.windows = windows
    scenes = [torch.rand(2 + i, 3, *size, dtype=torch.float64) for i, size in enumerate(sizes)]
    packed = model(sequence=recon_sequence(scenes, model.config), views=scenes, predict_global_points=True)
    for scene, prediction in zip(scenes, packed.geometry, strict=True):
        sequence = recon_sequence([scene], model.config)
        (alone,) = model(sequence=sequence, views=[scene], predict_global_points=True).geometry
        for name in ("local_points", "cam_to_world", "normals", "global_points", "confidence"):
            torch.testing.assert_close(getattr(prediction, name), getattr(alone, name))


def test_semantic_tokens_never_change_the_views_before_them(model: G2VLMForConditionalGeneration) -> None:
    views = torch.rand(2, 3, 28, 28, dtype=torch.float64)
    pixel_values = torch.randn(16, 1176, dtype=torch.float64)
    segments = [Text((4, 5)), GeometryViews(((2, 2),) * 2), SemanticImage((4, 4)), Text((6, 7, 8))]
    builder = sequence_builder(model.config)
    grid = torch.tensor([[1, 4, 4]])
    full = model(sequence=builder.build([segments]), views=[views], pixel_values=pixel_values, image_grid_thw=grid)
    short = model(sequence=builder.build([segments[:2]]), views=[views])
    torch.testing.assert_close(full.geometric_hidden, short.geometric_hidden)


def test_every_parameter_is_trained() -> None:
    """Geometry outputs and logits together reach every parameter but the mask token, which computes nothing."""
    model = G2VLMForConditionalGeneration(small_config())
    randomise(model)
    views, pixel_values = torch.rand(2, 3, 28, 42), torch.randn(16, 1176)
    sequence = sequence_builder(model.config).build(
        [(Text((4, 5)), GeometryViews(((2, 3),) * 2), SemanticImage((4, 4)), Text((6, 7)))]
    )
    output = model(
        sequence=sequence,
        views=[views],
        pixel_values=pixel_values,
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        logits_at=torch.arange(sequence.semantic_ids.shape[0]),
        predict_global_points=True,
    )
    (prediction,) = output.geometry
    tensors = [output.logits, prediction.cam_to_world, prediction.global_points, prediction.normals]
    tensors += [prediction.local_points, prediction.confidence]
    sum(t.float().square().sum() for t in tensors).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == {"geometry_encoder.mask_token"}


def test_bfloat16_stays_close_and_keeps_heads_in_float32() -> None:
    config = small_config()
    model = G2VLMForConditionalGeneration(config).eval()
    images = torch.rand(2, 3, 28, 42)
    reference = recon(model, images)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for name in G2VLMForConditionalGeneration._keep_in_fp32_modules_strict:
        getattr(half.heads, name).float()
    for residual in ("bfloat16", "float32"):
        half.decoder.config = replace(config.decoder, residual_dtype=residual)
        prediction = recon(half, images)
        assert prediction.local_points.dtype == torch.float32
        error = (prediction.local_points - reference.local_points).abs().max()
        assert error < 0.05 * reference.local_points.abs().max()


def test_missing_pixels_are_named(model: G2VLMForConditionalGeneration) -> None:
    sequence = sequence_builder(model.config).build([(Text((4,)), SemanticImage((4, 4)))])
    with pytest.raises(ValueError, match="pixel_values give 0 image tokens; the sequence has 4 slots"):
        model(sequence=sequence)


def test_too_few_views_are_named(model: G2VLMForConditionalGeneration) -> None:
    scene = torch.rand(2, 3, 28, 28, dtype=torch.float64)
    with pytest.raises(ValueError, match="views give 4 geometry tokens; the sequence was built for 8"):
        model(sequence=recon_sequence([scene], model.config), views=[scene[:1]])


def test_pixel_head_places_channels_by_patch() -> None:
    head = PixelHead(feature_dim=5, channels=3, patch_size=14)
    features = torch.randn(2, 6, 5)
    output = head(features, (2, 3))
    raw = head.proj(features)
    view, row, column, y, x, channel = 1, 1, 2, 3, 11, 2
    expected = raw[view, row * 3 + column, channel * 196 + y * 14 + x]
    assert output.shape == (2, 28, 42, 3)
    torch.testing.assert_close(output[view, row * 14 + y, column * 14 + x, channel], expected)


def test_released_initialisation() -> None:
    config = small_config(
        decoder=replace(DECODER, geometric_layer_scale=0.01),
        geometry_encoder=replace(small_config().geometry_encoder, projection_init="zero"),
    )
    model = G2VLMForConditionalGeneration(config)
    layer = model.decoder.layers[0]
    assert not model.geometry_projection.weight.any()
    assert (layer.geometric.attention_scale.gamma == 0.01).all()
    assert not hasattr(layer.semantic.attention_scale, "gamma")
    assert (layer.semantic.attention.q_norm.weight == 1).all()
    assert 0.015 < layer.geometric.mlp.up_proj.weight.std() < 0.025
    assert model.heads.point_decoder.output.bias.any()
    assert model.heads.point_decoder.output.weight.abs().max() <= 32**-0.5


def test_copying_the_semantic_expert() -> None:
    decoder = MoTDecoder(replace(DECODER, semantic_qk_norm=False))
    randomise(decoder)
    scale = decoder.layers[0].geometric.mlp_scale.gamma.clone()
    decoder.copy_semantic_to_geometric()
    layer = decoder.layers[1]
    torch.testing.assert_close(layer.geometric.mlp.up_proj.weight, layer.semantic.mlp.up_proj.weight)
    torch.testing.assert_close(decoder.layers[0].geometric.mlp_scale.gamma, scale)


def first_queries_and_keys(tokens: Tensor, expert: str, **changes) -> tuple[Tensor, Tensor]:
    """Unrotated queries and keys (T, heads, K) of the second layer of a fresh model."""
    model = G2VLMForConditionalGeneration(small_config(decoder=replace(DECODER, **changes)))
    cos, sin = torch.ones(len(tokens), 8), torch.zeros(len(tokens), 8)
    q, k, _ = getattr(model.decoder.layers[1], expert).project(tokens, cos, sin)
    return q, k.repeat_interleave(2, dim=1)


def test_matching_starts_by_attending_to_the_most_alike() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(9, 32).repeat(2, 1)  # every token is there twice

    def most_attended(expert: str, init: str) -> Tensor:
        q, k = first_queries_and_keys(tokens, expert, geometric_init=init)
        return torch.einsum("qhd,khd->hqk", q, k).argmax(-1) % 9

    same = (torch.arange(18) % 9).expand(4, 18)
    assert torch.equal(most_attended("geometric", "matching"), same)
    assert not torch.equal(most_attended("geometric", "random"), same)
    assert not torch.equal(most_attended("semantic", "matching"), same)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_matching_sharpens_attention(qk_norm: bool) -> None:
    tokens = torch.randn(9, 32)
    q, k = first_queries_and_keys(tokens, "geometric", geometric_init="matching", geometric_qk_norm=qk_norm)
    torch.testing.assert_close(q, 3 * k)


def test_loading_keeps_what_matching_has_become(tmp_path: Path) -> None:
    model = G2VLMForConditionalGeneration(small_config(decoder=replace(DECODER, geometric_init="matching")))
    randomise(model)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_single_encoder_reconstructs() -> None:
    model = G2VLMForConditionalGeneration(small_config(encoders="single")).eval()
    assert recon(model, torch.rand(2, 3, 28, 56)).local_points.shape == (2, 28, 56, 3)
    assert not [name for name, _ in model.named_parameters() if name.startswith("geometry_encoder")]
