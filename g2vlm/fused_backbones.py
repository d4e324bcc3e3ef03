"""Fusion on stock models of transformers, without a change to their classes: all that is assumed of them is here.

The contract is held by tests/g2vlm/test_fused_backbones.py on each supported version. The stock model keeps its own
parameters and names, so `fused.model.save_pretrained` writes a plain checkpoint; the fusion's are `fused.fusion`'s.

    fused = FusedQwen(model, fusion)
    with fused.given_frames.use(tokens.frames("frame")):
        fused(**inputs)

Shapes: F frames, N image tokens of a frame on a square grid of side h, D width of the vision tower, E of the decoder.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from g2vlm.fusion_config import FusionConfig
from g2vlm.model.fusion import Fusion, GivenFrames, NoFusion, build_fusion, frame_sizes, fuse_frames


class FusedModel(nn.Module):
    """A stock model and its fusion, side by side.

    Args:
        model: a model with a language head, for instance `Qwen2VLForConditionalGeneration`.
        fusion: for image tokens at the place where the subclass puts it.
    """

    def __init__(self, model: nn.Module, fusion: Fusion):
        super().__init__()
        self.model = model
        self.fusion = fusion
        self.given_frames = GivenFrames()

    @classmethod
    def of(cls, model: nn.Module, config: FusionConfig) -> Self:
        """A model with a new fusion; errors as in `new_fusion`."""
        return cls(model, cls.new_fusion(model, config))

    @classmethod
    def new_fusion(cls, model: nn.Module, config: FusionConfig) -> Fusion:
        """A fusion for a model, in its dtype and on its device; the model is not touched.

        Raises:
            ValueError: a fusion that is not given its tokens, or whose heads do not fill the width of image tokens.
        """
        if config.source != "given":
            raise ValueError(f"fusion.source is {config.source}; a stock model's tokens are given")
        like = next(model.parameters())
        return build_fusion(config, cls.visual_dim(model), config.token_dim).to(like.device, like.dtype)

    @staticmethod
    def visual_dim(model: nn.Module) -> int:
        """D of a stock model."""
        raise NotImplementedError

    def forward(self, **inputs: Any) -> Any:
        """The model's own forward; images and video steps are fused with `given_frames`, images first."""
        return self.model(**inputs)

    def generate(self, **inputs: Any) -> Any:
        """The model's own `generate`, fused in the same way."""
        model: Any = self.model
        return model.generate(**inputs)

    def _fuse(self, visual: Tensor, sizes: list[int]) -> Tensor:
        """Image tokens (V, D) of frames of `sizes` -> (V, D).

        Raises:
            ValueError: no geometry tokens were given for them.
        """
        frames = self.given_frames.take(len(sizes))
        if frames is None:
            raise ValueError(
                f"{len(sizes)} frames of images without geometry tokens: with fused.given_frames.use(frames): ..."
            )
        return fuse_frames(self.fusion, visual, sizes, frames)


class FusedQwen(FusedModel):
    """Fusion behind the merger of the vision tower of Qwen2-VL, Qwen2.5-VL or Qwen3-VL: D is the decoder's width.

    With `NoFusion` the model is not touched. Features that Qwen3-VL adds in later layers stay as they are.
    """

    def __init__(self, model: nn.Module, fusion: Fusion):
        super().__init__(model, fusion)
        tower: Any = model.get_submodule("model.visual")
        self._merge_size: int = tower.spatial_merge_size
        if not isinstance(fusion, NoFusion):
            tower.register_forward_hook(self._fuse_output, with_kwargs=True)

    @staticmethod
    def visual_dim(model: nn.Module) -> int:
        """Width of the decoder."""
        config: Any = model.config
        return config.text_config.hidden_size

    def _fuse_output(self, _tower: nn.Module, _args: object, kwargs: dict[str, Any], output: Any) -> Any:
        output.pooler_output = self._fuse(output.pooler_output, frame_sizes(kwargs["grid_thw"], self._merge_size))
        return output


class FusedLlavaVideo(FusedModel):
    """LLaVA-NeXT-Video with its video features in VLM-3R's order: fusion, projector, 2x2 pooling, row newlines.

    transformers pools first, by averages, and has no newlines in videos. LLaVA-Video-7B-Qwen2, which VLM-3R starts
    from, has the order of this class without the fusion: `NoFusion`. Images are left as transformers treats them.

    A frame has `tokens_per_frame(h)` video tokens in the prompt. The newline is the model's `image_newline`.
    """

    def __init__(self, model: nn.Module, fusion: Fusion):
        super().__init__(model, fusion)
        backbone: Any = model.get_submodule("model")
        backbone.get_video_features = self._video_features

    @staticmethod
    def visual_dim(model: nn.Module) -> int:
        """Width of the vision tower, times the number of its layers that are joined."""
        config: Any = model.config
        layers = config.vision_feature_layer
        return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    def _video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Videos (B, F, 3, H, W) -> their tokens (B, F h' (w' + 1), E) as `pooler_output`."""
        backbone: Any = self.model.get_submodule("model")
        layer = backbone.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or backbone.config.vision_feature_select_strategy
        pixels = pixel_values_videos.flatten(0, 1)
        states = backbone.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        features = torch.cat([states[index] for index in ([layer] if isinstance(layer, int) else layer)], dim=-1)
        features = features[:, 1:] if strategy == "default" else features  # (B F, N, D), without a class token
        if not isinstance(self.fusion, NoFusion):
            sizes = [features.shape[1]] * features.shape[0]
            features = self._fuse(features.flatten(0, 1), sizes).unflatten(0, features.shape[:2])
        tokens = pooled_rows(backbone.multi_modal_projector(features), backbone.image_newline)
        tokens = tokens.unflatten(0, pixel_values_videos.shape[:2]).flatten(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)  # pyright: ignore[reportArgumentType]


FUSED: dict[str, type[FusedModel]] = {"qwen": FusedQwen, "llava_video": FusedLlavaVideo}
"""Where a fusion stands, as saved fusions name it -> the class that puts it there."""


def pooled_rows(tokens: Tensor, newline: Tensor, stride: int = 2) -> Tensor:
    """Tokens of square frames (F, N, E), bilinearly resized to ceil(h / stride) rows and columns, newline (E) per row.

    Returns:
        (F, h' (w' + 1), E): 27 x 27 tokens become 14 x 15.

    Raises:
        ValueError: frames that are not square.
    """
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are not a square frame")
    pooled = -(-side // stride)
    maps = tokens.transpose(1, 2).unflatten(-1, (side, side))  # (F, E, h, w)
    maps = F.interpolate(maps.float(), size=(pooled, pooled), mode="bilinear", align_corners=False).to(tokens)
    rows = newline.to(tokens)[None, :, None, None].expand(maps.shape[0], -1, pooled, 1)
    return torch.cat([maps, rows], dim=-1).flatten(2).transpose(1, 2)


def tokens_per_frame(side: int, stride: int = 2) -> int:
    """What `pooled_rows` makes of a frame of side x side tokens: 210 of 27 x 27."""
    pooled = -(-side // stride)
    return pooled * (pooled + 1)
