"""Config files of transformers' Qwen-VL, Llama, Qwen and DINOv2-with-registers classes, to and from the parts of ours.

What our modules do not compute is refused by name and value; keys that do not touch the computation are passed over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from g2vlm.config import (
    DecoderConfig,
    GeometryEncoderConfig,
    Qwen3VLTowerConfig,
    Qwen25VLTowerConfig,
    SemanticEncoderConfig,
)
from g2vlm.errors import CheckpointError

_Kind = TypeVar("_Kind", int, float, str)


@dataclass(frozen=True)
class Section:
    """A JSON object of a config file, read with checks; `name` is what errors call it."""

    values: Mapping[str, Any]
    name: str

    def read(self, key: str, kind: type[_Kind], default: _Kind | None = None) -> _Kind:
        """A text or a positive number; without a default it must be there."""
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if isinstance(value, kind) and not isinstance(value, bool) and (isinstance(value, str) or value > 0):
            return value
        found = "is missing" if value is None else f"is {value!r}"
        wanted = "a text" if kind is str else f"a positive {'whole ' if kind is int else ''}number"
        raise CheckpointError(f"unusable {self.name}", f"{key} {found}; it must be {wanted}", "restore the original")

    def read_numbers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.values.get(key, default)
        if isinstance(value, Sequence) and all(type(number) is int for number in value):
            return tuple(value)
        raise CheckpointError(f"unusable {self.name}", f"{key} is {value!r}", "restore the original")

    def section(self, key: str) -> "Section":
        """A nested object; empty when absent."""
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"unusable {self.name}", f"{key} is {value!r}", "restore the original")
        return Section(value, f"{self.name}, {key}")

    def allow(self, key: str, *allowed: object) -> None:
        """Refuse any value but these; an absent key counts as the first."""
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"unsupported {self.name}",
                f"{key} is {value!r}; supported: {', '.join(map(repr, allowed))}",
                "use a checkpoint of the supported kind",
            )


def read_decoder(text: Section, default_theta: float = 1e6, **fixed: Any) -> DecoderConfig:
    """Sizes of a Qwen-VL's text model; `fixed` sets fields that its file does not decide."""
    return _sizes(text, default_theta, mrope_sections=_mrope_sections(_rope(text), _head_dim(text)), **fixed)


def read_text_decoder(text: Section, default_theta: float, **fixed: Any) -> DecoderConfig:
    """Sizes of a text model, whose slots are divided among time, row and column as Qwen2-VL's (1 : 1.5 : 1.5).

    The three positions of a text token are equal, so that the division changes nothing of what the model computes.
    """
    text.allow("mlp_bias", False, None)
    slots = _head_dim(text) // 2
    rows = slots * 3 // 8
    return _sizes(text, default_theta, mrope_sections=(slots - 2 * rows, rows, rows), **fixed)


def _sizes(text: Section, default_theta: float, **fixed: Any) -> DecoderConfig:
    text.allow("hidden_act", "silu")
    text.allow("use_sliding_window", False, None)
    for kind in text.values.get("layer_types") or ():
        Section({"layer_types": kind}, text.name).allow("layer_types", "full_attention")
    num_heads = text.read("num_attention_heads", int)
    return DecoderConfig(
        vocab_size=text.read("vocab_size", int),
        hidden_size=text.read("hidden_size", int),
        intermediate_size=text.read("intermediate_size", int),
        num_layers=text.read("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=text.read("num_key_value_heads", int, num_heads),
        head_dim=_head_dim(text),
        rms_norm_eps=text.read("rms_norm_eps", float, 1e-5),
        rope_theta=_rope(text).read("rope_theta", float, text.read("rope_theta", float, default_theta)),
        **fixed,
    )


def _head_dim(text: Section) -> int:
    return text.read("head_dim", int, text.read("hidden_size", int) // text.read("num_attention_heads", int))


def _rope(text: Section) -> Section:
    """Rotary settings under their older name (`rope_scaling`) or their newer one (`rope_parameters`)."""
    rope = text.section("rope_parameters" if text.values.get("rope_parameters") else "rope_scaling")
    rope.allow("type", "mrope", "default")
    rope.allow("rope_type", "default", "mrope")
    rope.allow("partial_rotary_factor", 1.0, None)
    return rope


def _mrope_sections(rope: Section, head_dim: int) -> tuple[int, int, int]:
    """The file's sections; without any, those that the released code writes out for heads of 128."""
    sections = rope.values.get("mrope_section", [16, 24, 24])
    numbers = isinstance(sections, list) and len(sections) == 3 and all(type(section) is int for section in sections)
    if not numbers or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"unusable {rope.name}",
            f"mrope_section is {sections!r}; it must be three numbers that add up to head_dim / 2 = {head_dim // 2}",
            "restore the original file",
        )
    return (sections[0], sections[1], sections[2])


def read_semantic_encoder(vision: Section, output_dim: int) -> SemanticEncoderConfig:
    """Sizes of a Qwen2-VL vision tower that feeds a decoder of width `output_dim`."""
    vision.allow("in_channels", 3)
    vision.allow("in_chans", 3)
    vision.allow("hidden_size", output_dim)
    return SemanticEncoderConfig(
        hidden_size=vision.read("embed_dim", int, 1280),
        num_layers=vision.read("depth", int, 32),
        num_heads=vision.read("num_heads", int, 16),
        mlp_ratio=int(vision.read("mlp_ratio", float, 4.0)),
        hidden_act=vision.read("hidden_act", str, "quick_gelu"),
        merge_size=vision.read("spatial_merge_size", int, 2),
        temporal_patch_size=vision.read("temporal_patch_size", int, 2),
    )


def read_qwen25_vl_tower(vision: Section, output_dim: int) -> Qwen25VLTowerConfig:
    """Sizes of a Qwen2.5-VL vision tower that feeds a decoder of width `output_dim`."""
    return Qwen25VLTowerConfig(
        **_later_tower(vision, output_dim, hidden_size=3584, depth=32, act="silu", patch_size=14),
        intermediate_size=vision.read("intermediate_size", int, 3420),
        window_size=vision.read("window_size", int, 112),
        full_attention_layers=vision.read_numbers("fullatt_block_indexes", (7, 15, 23, 31)),
        tokens_per_second=vision.read("tokens_per_second", float, 4.0),
    )


def read_qwen3_vl_tower(vision: Section, output_dim: int) -> Qwen3VLTowerConfig:
    """Sizes of a Qwen3-VL vision tower that feeds a decoder of width `output_dim`."""
    return Qwen3VLTowerConfig(
        **_later_tower(vision, output_dim, hidden_size=1152, depth=27, act="gelu_pytorch_tanh", patch_size=16),
        intermediate_size=vision.read("intermediate_size", int, 4304),
        num_positions=vision.read("num_position_embeddings", int, 2304),
        deepstack_layers=vision.read_numbers("deepstack_visual_indexes", (8, 16, 24)),
    )


def _later_tower(
    vision: Section, output_dim: int, *, hidden_size: int, depth: int, act: str, patch_size: int
) -> dict[str, Any]:
    """What the towers after Qwen2-VL's have in common, with transformers' defaults."""
    vision.allow("in_channels", 3)
    vision.allow("in_chans", 3)
    vision.allow("out_hidden_size", output_dim)
    return {
        "hidden_size": vision.read("hidden_size", int, hidden_size),
        "num_layers": vision.read("depth", int, depth),
        "num_heads": vision.read("num_heads", int, 16),
        "hidden_act": vision.read("hidden_act", str, act),
        "patch_size": vision.read("patch_size", int, patch_size),
        "merge_size": vision.read("spatial_merge_size", int, 2),
        "temporal_patch_size": vision.read("temporal_patch_size", int, 2),
    }


def read_geometry_encoder(dino: Section, **fixed: Any) -> GeometryEncoderConfig:
    """Sizes of a DINOv2 with registers; absent keys have transformers' defaults."""
    dino.allow("hidden_act", "gelu")
    dino.allow("use_swiglu_ffn", False)
    dino.allow("qkv_bias", True)
    dino.allow("num_channels", 3)
    dino.allow("patch_size", 14)
    return GeometryEncoderConfig(
        hidden_size=dino.read("hidden_size", int, 768),
        num_layers=dino.read("num_hidden_layers", int, 12),
        num_heads=dino.read("num_attention_heads", int, 12),
        mlp_ratio=dino.read("mlp_ratio", float, 4.0),
        image_size=dino.read("image_size", int, 224),
        num_registers=dino.read("num_register_tokens", int, 4),
        layer_norm_eps=dino.read("layer_norm_eps", float, 1e-6),
        layer_scale=dino.read("layerscale_value", float, 1.0),
        **fixed,
    )


def write_decoder(decoder: DecoderConfig) -> dict[str, Any]:
    """text_config.json of the released layout."""
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.mrope_sections)},
        "model_type": "qwen2_vl",
    }


def write_semantic_encoder(encoder: SemanticEncoderConfig, output_dim: int) -> dict[str, Any]:
    """vit_config.json of the released layout."""
    return {
        "depth": encoder.num_layers,
        "embed_dim": encoder.hidden_size,
        "hidden_size": output_dim,
        "mlp_ratio": encoder.mlp_ratio,
        "num_heads": encoder.num_heads,
        "in_channels": 3,
        "patch_size": encoder.patch_size,
        "spatial_merge_size": encoder.merge_size,
        "temporal_patch_size": encoder.temporal_patch_size,
        "hidden_act": encoder.hidden_act,
        "model_type": "qwen2_vl",
    }


def write_geometry_encoder(encoder: GeometryEncoderConfig) -> dict[str, Any]:
    """dino_config.json of the released layout."""
    whole = float(encoder.mlp_ratio).is_integer()
    return {
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": int(encoder.mlp_ratio) if whole else encoder.mlp_ratio,
        "hidden_act": "gelu",
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "num_register_tokens": encoder.num_registers,
        "qkv_bias": True,
        "layer_norm_eps": encoder.layer_norm_eps,
        "layerscale_value": encoder.layer_scale,
        "use_swiglu_ffn": False,
        "model_type": "dinov2_with_registers",
    }
