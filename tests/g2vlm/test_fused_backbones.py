"""The contract with transformers' models that g2vlm/fused_backbones.py relies on, and fusion on them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from g2vlm.fused_backbones import FusedLlavaVideo, FusedModel, FusedQwen, pooled_rows, tokens_per_frame
from g2vlm.model.fusion import Fusion, NoFusion, SpatialVisualViewFusion
from tests.g2vlm.stock import IMAGE, VIDEO, VISION, VOCABULARY, randomise, vision_model

OTHER = 12
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 6]])
SIDE, FRAMES = 5, 3


def frames(*counts: int | None) -> list[Tensor | None]:
    draws = torch.Generator().manual_seed(3)
    return [None if count is None else torch.randn(count, OTHER, generator=draws) for count in counts]


def fusion(width: int, **options: Any) -> SpatialVisualViewFusion:
    return randomise(SpatialVisualViewFusion(width, OTHER, head_dim=16, **options))


def qwen_inputs(family: str) -> dict[str, Tensor]:
    """Two images of 4 and 3 tokens and a video of two steps of 2, in one prompt; Qwen3-VL has text between steps."""
    draws = torch.Generator().manual_seed(2)
    video = [VIDEO, VIDEO, *([13] if family == "qwen3_vl" else []), VIDEO, VIDEO]
    ids = torch.tensor([[10, 2, *[IMAGE] * 4, 3, 11, 2, *[IMAGE] * 3, 3, 2, *video, 3, 12]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": torch.randn(16 + 12, 1176, generator=draws),
        "image_grid_thw": GRIDS,
        "pixel_values_videos": torch.randn(16, 1176, generator=draws),
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }


@pytest.fixture(params=VISION)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_no_fusion_leaves_a_qwen_alone(family: str) -> None:
    model = vision_model(family)
    names, expected = model.state_dict().keys(), model(**qwen_inputs(family)).logits
    fused = FusedQwen(model, NoFusion())
    assert torch.equal(fused(**qwen_inputs(family)).logits, expected)
    assert not model.model.visual._forward_hooks
    assert model.state_dict().keys() == names
    assert fused.state_dict().keys() == {f"model.{name}" for name in names}


@torch.no_grad()
def test_image_tokens_are_fused_behind_the_merger(family: str) -> None:
    """The decoder gets, in the slots of the prompt, what the block makes of each frame and its geometry."""
    model, block, inputs = vision_model(family), fusion(64), qwen_inputs(family)
    towers = [
        model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output,
        model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]).pooler_output,
    ]
    given = frames(5, 5, None, 7)
    expected = [
        own if source is None else block(own[None], source[None])[0]
        for own, source in zip(torch.cat(towers).split([4, 3, 2, 2]), given, strict=True)
    ]
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True)
    fused = FusedQwen(model, block)
    with fused.given_frames.use(given):
        fused(**inputs)
    slots = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    torch.testing.assert_close(seen[0][slots], torch.cat(expected))


@torch.no_grad()
def test_the_zero_start_is_the_stock_model(family: str) -> None:
    model = vision_model(family)
    expected = model(**qwen_inputs(family)).logits
    fused = FusedQwen(model, SpatialVisualViewFusion(64, OTHER, 16, init="zero").eval())
    with fused.given_frames.use(frames(5, 5, 5, 5)):
        assert torch.equal(fused(**qwen_inputs(family)).logits, expected)


@torch.no_grad()
def test_missing_geometry_is_an_error(family: str) -> None:
    fused = FusedQwen(vision_model(family), fusion(64))
    with pytest.raises(ValueError, match="2 frames of images without geometry tokens"):
        fused(**qwen_inputs(family))
    with (
        pytest.raises(ValueError, match="2 frames of images; geometry tokens of 1 frames"),
        fused.given_frames.use(frames(5, 5, 5)),
    ):
        fused(**qwen_inputs(family))
    with (
        pytest.raises(ValueError, match="1 of 5 given frames met no image"),
        fused.given_frames.use(frames(5, 5, 5, 5, 5)),
    ):
        fused(**qwen_inputs(family))


def generated(fused: FusedModel, inputs: dict[str, Tensor], given: list[Tensor | None], **options: Any) -> Tensor:
    with fused.given_frames.use(given):
        return fused.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)


@torch.no_grad()
def test_a_fused_qwen_generates(family: str) -> None:
    """With the cache, what whole forwards say token by token."""
    model, given, inputs = vision_model(family), frames(5, 5, 6, 6), qwen_inputs(family)
    plain = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    fused = FusedQwen(model, fusion(64))
    ids = generated(fused, inputs, given)
    assert torch.equal(generated(fused, inputs, given), ids)
    with fused.given_frames.use(given):
        first = fused(**inputs).logits[0, -1]
    assert int(ids[0, -4]) == int(first.index_fill(0, torch.tensor([1]), float("-inf")).argmax())
    assert ids.shape == plain.shape


def test_only_the_fusion_learns(family: str) -> None:
    model = vision_model(family).requires_grad_(False)
    fused = FusedQwen(model, fusion(64))
    with fused.given_frames.use(frames(5, 5, 5, 5)):
        fused(**qwen_inputs(family)).logits.square().mean().backward()
    assert all(p.grad is not None for p in fused.fusion.parameters())
    assert all(p.grad is None for p in model.parameters())


# LLaVA-NeXT-Video.


def llava(strategy: str = "full") -> Any:
    """LLaVA-Video's parts: SigLIP, from its second-last layer, and Qwen2; or CLIP, whose class token is left out."""
    tower = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 14 * SIDE, "patch_size": 14,
             "model_type": "siglip_vision_model" if strategy == "full" else "clip_vision_model"}  # fmt: skip
    text = {"model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    config = LlavaNextVideoConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_select_strategy=strategy, vision_feature_layer=-2,
    )  # fmt: skip
    return randomise(LlavaNextVideoForConditionalGeneration(config))


def llava_inputs(per_frame: int) -> dict[str, Tensor]:
    ids = torch.tensor([[10, *[VIDEO] * (per_frame * FRAMES), 11, 12]])
    pixels = torch.randn(1, FRAMES, 3, 14 * SIDE, 14 * SIDE, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """What the stock model hands to its pooling."""
    seen: list[Tensor] = []
    hook = model.model.vision_resampler.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.model.get_video_features(pixels)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("fuses", [False, True])
@torch.no_grad()
def test_video_tokens_in_the_published_order(strategy: str, fuses: bool) -> None:
    """Fusion, projector, pooling, a newline behind every row; the decoder gets them in the slots of the prompt."""
    model = llava(strategy)
    inputs = llava_inputs(tokens_per_frame(SIDE))
    features, given = tower_features(model, inputs["pixel_values_videos"]), frames(4, 4, 6)
    block: Fusion = fusion(32) if fuses else NoFusion()
    if fuses:
        pairs = zip(features, given, strict=True)
        features = torch.cat([block(own[None], source[None]) for own, source in pairs if source is not None])
    maps = model.model.multi_modal_projector(features).unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
    pooled = F.interpolate(maps, size=(3, 3), mode="bilinear").permute(0, 2, 3, 1)  # (F, 3, 3, E)
    rows = [
        torch.cat([row, model.model.image_newline[None]]) for frame in pooled for row in frame
    ]  # (4, E) per row of a frame
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True)
    fused = FusedLlavaVideo(model, block)
    with fused.given_frames.use(given if fuses else []):
        fused(**inputs)
    torch.testing.assert_close(seen[0][inputs["input_ids"] == VIDEO], torch.cat(rows))


@torch.no_grad()
def test_the_zero_start_is_the_model_in_the_published_order() -> None:
    inputs = llava_inputs(tokens_per_frame(SIDE))
    expected = FusedLlavaVideo(llava(), NoFusion())(**inputs).logits
    fused = FusedLlavaVideo(llava(), SpatialVisualViewFusion(32, OTHER, 16, init="zero").eval())
    with fused.given_frames.use(frames(4, 4, 4)):
        assert torch.equal(fused(**inputs).logits, expected)


@torch.no_grad()
def test_a_fused_llava_generates_and_keeps_plain_names() -> None:
    model, inputs = llava(), llava_inputs(tokens_per_frame(SIDE))
    names = model.state_dict().keys()
    fused = FusedLlavaVideo(model, fusion(32))
    assert model.state_dict().keys() == names
    assert generated(fused, inputs, frames(4, 4, 4)).shape == (1, inputs["input_ids"].shape[1] + 4)
    with pytest.raises(ValueError, match="3 frames of images without geometry tokens"):
        fused(**inputs)


def test_frames_see_their_own_geometry_alone() -> None:
    model = llava().requires_grad_(False)
    pixels = llava_inputs(tokens_per_frame(SIDE))["pixel_values_videos"]
    fused = FusedLlavaVideo(model, fusion(32))
    given = [frame.requires_grad_() for frame in frames(4, 4, 4) if frame is not None]
    with fused.given_frames.use(given):
        tokens = model.model.get_video_features(pixels).pooler_output[0].unflatten(0, (FRAMES, -1))
    tokens[1].square().sum().backward()
    assert [given[i].grad is not None and bool(given[i].grad.any()) for i in range(FRAMES)] == [False, True, False]


def test_the_published_number_of_tokens() -> None:
    """27 x 27 tokens of SigLIP become 14 x 15: 6720 of 32 frames."""
    assert tokens_per_frame(27) == 210
    rows = pooled_rows(torch.randn(2, 729, 4), torch.full((4,), 9.0)).unflatten(1, (14, 15))
    assert torch.equal(rows[:, :, 14], torch.full((2, 14, 4), 9.0))
    assert not (rows[:, :, :14] == 9).any()
    with pytest.raises(ValueError, match="8 tokens are not a square frame"):
        pooled_rows(torch.randn(1, 8, 4), torch.zeros(4))


def test_pooling_resizes_with_half_pixel_centres() -> None:
    """An even side: the mean of 2 x 2."""
    tokens = torch.randn(1, 16, 2, dtype=torch.float32)
    expected = nn.functional.avg_pool2d(tokens.transpose(1, 2).unflatten(-1, (4, 4)), 2)
    pooled = pooled_rows(tokens, torch.zeros(2)).unflatten(1, (2, 3))[:, :, :2]
    torch.testing.assert_close(pooled.permute(0, 3, 1, 2), expected)
