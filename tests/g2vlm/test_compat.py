"""The contract with transformers' internals that g2vlm/compat.py and the model class rely on."""

import inspect

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, GenerationMixin

from g2vlm.compat import build_vision_tower, complete_generation_config, run_vision_tower
from g2vlm.config import G2VLMConfig, SemanticEncoderConfig, TokenIds
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration

CONFIG = SemanticEncoderConfig(hidden_size=32, num_layers=2, num_heads=2)


@pytest.fixture
def tower() -> nn.Module:
    return build_vision_tower(CONFIG, output_dim=24).eval()


def test_tower_has_the_released_names_and_shapes(tower: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}
    block = {
        "norm1.weight": (32,), "norm1.bias": (32,), "norm2.weight": (32,), "norm2.bias": (32,),
        "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.proj.weight": (32, 32), "attn.proj.bias": (32,),
        "mlp.fc1.weight": (128, 32), "mlp.fc1.bias": (128,), "mlp.fc2.weight": (32, 128), "mlp.fc2.bias": (32,),
    }  # fmt: skip
    merger = {
        "merger.ln_q.weight": (32,), "merger.ln_q.bias": (32,), "merger.mlp.0.weight": (128, 128),
        "merger.mlp.0.bias": (128,), "merger.mlp.2.weight": (24, 128), "merger.mlp.2.bias": (24,),
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert shapes == {"patch_embed.proj.weight": (32, 3, 2, 14, 14), **expected, **merger}
    assert not tower.state_dict().keys() - shapes.keys()


@torch.inference_mode()
def test_images_do_not_see_each_other(tower: nn.Module) -> None:
    grids = torch.tensor([[1, 4, 2], [1, 2, 2]])
    pixels = torch.randn(12, 1176)
    patches, merged = run_vision_tower(tower, pixels, grids)
    assert patches.shape == (12, 32)
    assert merged.shape == (3, 24)
    alone = torch.cat(
        [run_vision_tower(tower, pixels[:8], grids[:1])[1], run_vision_tower(tower, pixels[8:], grids[1:])[1]]
    )
    torch.testing.assert_close(merged, alone)


def test_auto_classes_know_the_model(tmp_path) -> None:
    model = G2VLMForConditionalGeneration(G2VLMConfig.tiny())
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), G2VLMConfig)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, G2VLMForConditionalGeneration)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_bfloat16_loading_keeps_the_output_layers_in_float32(tmp_path) -> None:
    G2VLMForConditionalGeneration(G2VLMConfig.tiny()).save_pretrained(tmp_path)
    loaded = G2VLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if "_head." in name and name.startswith("heads.")}
    assert loaded.geometry_projection.weight.dtype == torch.bfloat16


# Generation: the hooks that PackedGenerationMixin fills in, and what transformers calls them with.


def parameters(name: str) -> list[str]:
    return [name for name in inspect.signature(getattr(GenerationMixin, name)).parameters if name != "self"]


def test_generate_calls_the_hooks_that_are_filled_in() -> None:
    assert parameters("_prepare_model_inputs") == ["inputs", "bos_token_id", "model_kwargs"]
    assert parameters("_expand_inputs_for_generation") == [
        "expand_size", "is_encoder_decoder", "input_ids", "model_kwargs",
    ]  # fmt: skip
    assert parameters("_prepare_special_tokens") == [
        "generation_config", "kwargs_has_attention_mask", "device", "batch_size",
    ]  # fmt: skip
    assert parameters("_supports_default_dynamic_cache") == []
    assert parameters("_sample") == [
        "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "model_kwargs",
    ]  # fmt: skip


def test_generate_is_transformers_own() -> None:
    model = G2VLMForConditionalGeneration
    assert model.generate is GenerationMixin.generate
    assert model.can_generate()
    assert issubclass(model, GenerationMixin)


def test_special_tokens_complete_a_generation_config() -> None:
    tokens = TokenIds(bos=5, eos=6)
    config = GenerationConfig(eos_token_id=[6, 7])
    complete_generation_config(config, tokens)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, [6, 7], 6)
