"""A small random model in float64 and chats of every shape for it, with the pixels that they need."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor

from g2vlm.config import (
    DecoderConfig,
    G2VLMConfig,
    GeometryEncoderConfig,
    HeadsConfig,
    Qwen3VLTowerConfig,
    SemanticEncoderConfig,
    TokenIds,
)
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.sequence import (
    GeometryAttention,
    GeometrySees,
    GeometryViews,
    Sample,
    Segment,
    SemanticImage,
    SemanticImageAttention,
    SemanticVideo,
    Text,
    ViewPositions,
)

VOCABULARY = 40
TOKENS = TokenIds(bos=0, eos=1, vision_start=2, vision_end=3, recon_prompt=(4, 5))

HEADER = Text((10, 11, 12))
VIEWS = GeometryViews(((2, 3),) * 3)
OTHER_VIEWS = GeometryViews(((1, 2),) * 2)
IMAGES = (SemanticImage((4, 4)), SemanticImage((2, 6)))
QUESTION = Text((20, 21, 9))
CHATS: dict[str, Sample] = {
    "chat": (HEADER, VIEWS, *IMAGES, QUESTION),
    "recon": (HEADER, VIEWS),
    "images": (HEADER, IMAGES[0], Text((13,)), IMAGES[1], QUESTION),
    "video": (HEADER, SemanticVideo((4, 2), times=(0, 2, 5)), QUESTION),
    "text": (HEADER, QUESTION),
    "late views": (HEADER, IMAGES[1], Text((14, 15)), VIEWS, Text((16,)), OTHER_VIEWS, QUESTION),
}
PACKS: dict[str, list[Sample]] = {
    **{name: [sample] for name, sample in CHATS.items()},
    "pack": [CHATS["text"], CHATS["late views"], CHATS["chat"]],
}
KINDS: list[tuple[str, str, str, str]] = list(
    product(*map(get_args, (GeometryAttention, SemanticImageAttention, ViewPositions, GeometrySees)))
)


@cache
@torch.inference_mode(mode=False)
def chat_model(geometry: str = "global", images: str = "full", positions: str = "sequential", sees: str = "everything"):
    """A model in float64 whose answers differ from question to question and do not end; one for equal arguments."""
    return _random_model(_config(geometry, images, positions, sees))


@cache
@torch.inference_mode(mode=False)
def deepstack_model():
    """The same in the way of Qwen3-VL: interleaved rotation, features of two tower layers added in the decoder."""
    config = _config("global", "causal", "sequential", "everything")
    config.decoder = replace(config.decoder, mrope_layout="interleaved", mrope_sections=(2, 1, 1))
    config.semantic_encoder = Qwen3VLTowerConfig(
        hidden_size=32, num_layers=2, num_heads=2, intermediate_size=40, num_positions=16, patch_size=14,
        deepstack_layers=(0, 1),
    )  # fmt: skip
    return _random_model(config)


def _config(geometry: str, images: str, positions: str, sees: str) -> G2VLMConfig:
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mrope_sections=(1, 1, 2),
        geometric_layer_scale=0.5,
    )
    return G2VLMConfig(
        decoder=decoder,
        semantic_encoder=SemanticEncoderConfig(hidden_size=32, num_layers=1, num_heads=2),
        geometry_encoder=GeometryEncoderConfig(
            hidden_size=24, num_layers=1, num_heads=2, image_size=42, windows="per_image", projection_init="normal"
        ),
        heads=HeadsConfig(depth=1, num_heads=4, point_dim=16, camera_dim=16),
        tokens=TOKENS,
        geometry_attention=geometry,  # pyright: ignore[reportArgumentType]
        semantic_image_attention=images,  # pyright: ignore[reportArgumentType]
        view_positions=positions,  # pyright: ignore[reportArgumentType]
        geometry_sees=sees,  # pyright: ignore[reportArgumentType]
    )


def _random_model(config: G2VLMConfig) -> G2VLMForConditionalGeneration:
    torch.manual_seed(0)
    model = G2VLMForConditionalGeneration(config).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.4 if name.startswith("embed_tokens") else 0.2)
    torch.nn.init.zeros_(model.lm_head.weight[TOKENS.eos])
    return model


@dataclass(frozen=True)
class Pixels:
    """The images of some segments, as the model's forward takes them."""

    views: list[Tensor]
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def pixels(segments: Iterable[Segment]) -> Pixels:
    """Random pixels that depend on each segment's own shape alone, so that parts of a chat get what the whole gets."""
    views, patches, grids = [], [], []
    for segment in segments:
        if isinstance(segment, GeometryViews):
            rows, columns = segment.grids[0]
            views.append(_random(len(segment.grids), 3, 14 * rows, 14 * columns))
        elif isinstance(segment, SemanticImage):
            patches.append(_random(segment.grid[0] * segment.grid[1], 1176))
            grids.append((1, *segment.grid))
        elif isinstance(segment, SemanticVideo):
            grids.append((len(segment.times), *segment.grid))
            patches.append(_random(prod(grids[-1]), 1176))
    if not grids:
        return Pixels(views, None, None)
    return Pixels(views, torch.cat(patches), torch.tensor(grids))


def pack_inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """The pixels of all samples of a pack, as keyword arguments."""
    return pixels(segment for sample in samples for segment in sample).as_dict()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
