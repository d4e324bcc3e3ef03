"""From pixels and token ids to what the model's forward takes."""

from typing import cast

import torch
from torch import Tensor

from g2vlm.config import IMAGENET_MEAN, IMAGENET_STD, G2VLMConfig
from g2vlm.sequence import (
    GeometryAttention,
    GeometrySees,
    GeometryViews,
    PackedSequence,
    SemanticImageAttention,
    SequenceBuilder,
    SpecialIds,
    Text,
    ViewPositions,
)


def sequence_builder(config: G2VLMConfig, geometry_attention: GeometryAttention | None = None) -> SequenceBuilder:
    """The builder with a model's own rules.

    Args:
        config: the model's config.
        geometry_attention: another choice for this batch; by default the config's, with `mixed` read as `global`.
    """
    own = "global" if config.geometry_attention == "mixed" else config.geometry_attention
    tokens = config.tokens
    return SequenceBuilder(
        special=SpecialIds(tokens.bos, tokens.eos, tokens.vision_start, tokens.vision_end),
        geometry_attention=geometry_attention or cast(GeometryAttention, own),
        semantic_image_attention=cast(SemanticImageAttention, config.semantic_image_attention),
        view_positions=cast(ViewPositions, config.view_positions),
        geometry_sees=cast(GeometrySees, config.geometry_sees),
    )


def normalise_views(images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [0, 1] -> what the geometry encoder takes (ImageNet mean and standard deviation)."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def view_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of images (..., H, W).

    Raises:
        ValueError: a side that is not a multiple of the patch.
    """
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {width}x{height}; sides must be multiples of {patch_size}")
    return height // patch_size, width // patch_size


def recon_sequence(
    scenes: list[Tensor], config: G2VLMConfig, geometry_attention: GeometryAttention | None = None
) -> PackedSequence:
    """The released reconstruction sequence of one or more scenes: bos, the fixed prompt, then all views as one block.

    Args:
        scenes: per scene, images (S, 3, H, W).
        config: the model's config, with its special tokens.
        geometry_attention: as in `sequence_builder`.
    """
    prompt = Text((config.tokens.bos, *config.tokens.recon_prompt))
    patch_size = config.geometry_encoder.patch_size
    samples = [(prompt, GeometryViews((view_grid(images, patch_size),) * images.shape[0])) for images in scenes]
    return sequence_builder(config, geometry_attention).build(samples)


def recon_inputs(images: Tensor, config: G2VLMConfig, device: torch.device | str) -> dict[str, object]:
    """Keyword arguments of the model's forward that reconstruct one scene from images (S, 3, H, W) in [0, 1]."""
    return {
        "sequence": recon_sequence([images], config).to(device),
        "views": [normalise_views(images.to(device))],
    }
