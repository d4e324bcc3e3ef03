"""Every use of transformers' model internals, so that a new version of it breaks one file and one test.

The contract is held by tests/g2vlm/test_compat.py on each supported version.
"""

from torch import Tensor, nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from g2vlm.config import SemanticEncoderConfig


def build_vision_tower(config: SemanticEncoderConfig, output_dim: int) -> nn.Module:
    """transformers' Qwen2-VL vision tower with a merger to `output_dim`."""
    tower_config = Qwen2VLVisionConfig(
        depth=config.num_layers,
        embed_dim=config.hidden_size,
        hidden_size=output_dim,
        hidden_act=config.hidden_act,
        mlp_ratio=config.mlp_ratio,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        spatial_merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
    )
    tower_config._attn_implementation = "sdpa"
    return Qwen2VisionTransformerPretrainedModel(tower_config)


def run_vision_tower(tower: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images.

    Args:
        tower: what `build_vision_tower` made.
        pixel_values: (patches of all images, 3 * 2 * 14 * 14) in 2x2 merge order.
        grid_thw: (images, 3) time, rows and columns in patches.

    Returns:
        Patch features before the merger (patches, width), and merged tokens (patches / 4, output_dim).
    """
    output = tower(pixel_values, grid_thw=grid_thw)
    return output.last_hidden_state, output.pooler_output
