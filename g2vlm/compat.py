"""Every use of transformers' model internals, so that a new version of it breaks one file and one test.

The contract is held by tests/g2vlm/test_compat.py on each supported version.
"""

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from g2vlm.config import Qwen3VLTowerConfig, Qwen25VLTowerConfig, SemanticEncoderConfig, VisionTowerConfig

TOWER_BLOCKS = ("Qwen2VLVisionBlock", "Qwen2_5_VLVisionBlock", "Qwen3VLVisionBlock")
"""Classes of the towers' layers."""


class TowerOutput(NamedTuple):
    """What a vision tower makes of images.

    Args:
        patches: (patches, width) features before the merger; Qwen2.5-VL's are in the order of its windows.
        merged: (patches / 4, output_dim) image tokens, row by row.
        deepstack: per entry of `deepstack_layers`, features (patches / 4, output_dim); none but in Qwen3-VL.
    """

    patches: Tensor
    merged: Tensor
    deepstack: tuple[Tensor, ...] = ()


def build_vision_tower(config: VisionTowerConfig, output_dim: int) -> nn.Module:
    """transformers' vision tower of the config's architecture with a merger to `output_dim`."""
    if isinstance(config, SemanticEncoderConfig):
        own = {"embed_dim": config.hidden_size, "hidden_size": output_dim, "mlp_ratio": config.mlp_ratio}
        return _tower(Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig, config, own)
    if isinstance(config, Qwen25VLTowerConfig):
        own = {
            "hidden_size": config.hidden_size,
            "out_hidden_size": output_dim,
            "intermediate_size": config.intermediate_size,
            "window_size": config.window_size,
            "fullatt_block_indexes": list(config.full_attention_layers),
        }
        return _tower(Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig, config, own)
    assert isinstance(config, Qwen3VLTowerConfig)
    own = {
        "hidden_size": config.hidden_size,
        "out_hidden_size": output_dim,
        "intermediate_size": config.intermediate_size,
        "num_position_embeddings": config.num_positions,
        "deepstack_visual_indexes": list(config.deepstack_layers),
    }
    return _tower(Qwen3VLVisionModel, Qwen3VLVisionConfig, config, own)


def _tower(model: Any, kind: Any, config: VisionTowerConfig, own: dict[str, Any]) -> nn.Module:
    """A tower from the sizes that all architectures share and its own."""
    tower_config = kind(
        depth=config.num_layers,
        hidden_act=config.hidden_act,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        spatial_merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        **own,
    )
    tower_config._attn_implementation = "sdpa"
    return model(tower_config)


def init_vision_tower_module(tower: nn.Module, module: nn.Module) -> None:
    """Random weights of one module of a tower, as transformers starts them."""
    cast(PreTrainedModel, tower)._init_weights(module)


def run_vision_tower(tower: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> TowerOutput:
    """Encode images and videos.

    Args:
        tower: what `build_vision_tower` made.
        pixel_values: (patches of all images, 3 * temporal_patch_size * patch_size^2) in 2x2 merge order.
        grid_thw: (images, 3) time, rows and columns in patches.
    """
    output = tower(pixel_values, grid_thw=grid_thw)
    deepstack = tuple(getattr(output, "deepstack_features", None) or ())
    return TowerOutput(output.last_hidden_state, output.pooler_output, deepstack)
