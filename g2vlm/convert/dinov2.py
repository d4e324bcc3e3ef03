"""DINOv2 weights in the layouts that are in public use, as tensors of our geometry encoder.

timm's (`vit_*_patch14_reg4_dinov2`, the class token's position folded into the class token, or kept apart) and
transformers' (`dinov2-with-registers`), which the released checkpoint uses under `dino_model.`.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from g2vlm.config import GeometryEncoderConfig
from g2vlm.convert.configs import Section, read_geometry_encoder
from g2vlm.convert.keymap import KeyMap, Rule, Translated, rule
from g2vlm.encoders.dinov2 import DinoV2
from g2vlm.errors import CheckpointError
from g2vlm.model.loading import possible_config
from g2vlm.weights import TensorSource, TensorSpec, WeightFiles, common_size, compare, read_json

OURS = "geometry_encoder."
HEAD_DIM = 64
"""Of every public DINOv2 size; timm's files do not hold the number of heads."""


def transformers_rules(prefix: str) -> list[Rule]:
    """transformers' `Dinov2WithRegistersModel` under a prefix <-> our geometry encoder."""
    theirs, ours = f"{prefix}encoder.layer.{{i}}.", f"{OURS}blocks.{{i}}."
    rules = [
        rule(f"{prefix}embeddings.cls_token", f"{OURS}cls_token"),
        rule(f"{prefix}embeddings.mask_token", f"{OURS}mask_token"),
        rule(f"{prefix}embeddings.register_tokens", f"{OURS}register_tokens"),
        rule(f"{prefix}embeddings.position_embeddings", f"{OURS}position_embeddings"),
        rule(f"{prefix}embeddings.patch_embeddings.projection.{{tail}}", f"{OURS}patch_embed.proj.{{tail}}"),
        rule(f"{prefix}layernorm.{{tail}}", f"{OURS}norm.{{tail}}"),
        rule(f"{theirs}layer_scale1.lambda1", f"{ours}ls1.gamma"),
        rule(f"{theirs}layer_scale2.lambda1", f"{ours}ls2.gamma"),
        rule(f"{theirs}attention.output.dense.{{tail}}", f"{ours}attn.proj.{{tail}}"),
        rule(
            [f"{theirs}attention.attention.{name}.{{tail}}" for name in ("query", "key", "value")],
            f"{ours}attn.qkv.{{tail}}",
        ),
    ]
    return rules + [rule(f"{theirs}{name}.{{tail}}", f"{ours}{name}.{{tail}}") for name in ("norm1", "norm2", "mlp")]


TIMM_RULES = [
    rule("reg_token", f"{OURS}register_tokens"),
    rule("pos_embed", f"{OURS}position_embeddings"),
    *(rule(name, f"{OURS}{name}") for name in ("cls_token", "mask_token")),
    *(rule(f"{name}.{{tail}}", f"{OURS}{name}.{{tail}}") for name in ("patch_embed", "blocks", "norm")),
]


def open_dinov2(path: str | Path) -> tuple[GeometryEncoderConfig, TensorSource]:
    """Sizes and tensors (named as in our model) of a public DINOv2.

    Args:
        path: a folder with model.safetensors (and config.json), or a safetensors file beside its config.json.

    Raises:
        CheckpointError: neither of the two layouts, or incomplete.
    """
    files = WeightFiles(path)
    config_file = (files.path.parent if files.path.is_file() else files.path) / "config.json"
    settings = Section(read_json(config_file) if config_file.is_file() else {}, str(config_file))
    if "pos_embed" in files.specs:
        source: TensorSource = _TimmFiles(files)
        config, keymap = _timm_config(files, settings), KeyMap(TIMM_RULES)
    elif "embeddings.position_embeddings" in files.specs:
        source = files
        config, keymap = read_geometry_encoder(settings), KeyMap(transformers_rules(""))
    else:
        raise CheckpointError(
            f"no DINOv2 weights in {path}",
            "there is neither timm's pos_embed nor transformers' embeddings.position_embeddings",
            "give a timm vit_*_patch14_reg4_dinov2 or a transformers dinov2-with-registers folder",
        )
    with possible_config(path):
        expected = keymap.their_specs(encoder_specs(config))
    compare(expected, source.specs).require_complete(path)
    return config, Translated(source, keymap.to_ours(source.specs))


def encoder_specs(config: GeometryEncoderConfig) -> dict[str, TensorSpec]:
    """The tensors of our geometry encoder, named as in the whole model."""
    with torch.device("meta"):
        state = DinoV2(config).state_dict()
    return {f"{OURS}{name}": TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def _timm_config(files: WeightFiles, settings: Section) -> GeometryEncoderConfig:
    """Sizes from the tensors; the number of heads from timm's `model_args`, else from the heads' usual width."""
    specs = files.specs
    rows, patch = _shape(specs, "pos_embed")[1], _shape(specs, "patch_embed.proj.weight", 4)[-1]
    width = common_size(specs, ["cls_token:2", "pos_embed:2", "norm.weight:0"]) or 0
    depth = len({name.split(".")[1] for name in specs if name.startswith("blocks.")})
    hidden = common_size(specs, [f"blocks.{k}.mlp.fc1.weight:0" for k in range(depth)]) or 0
    return GeometryEncoderConfig(
        hidden_size=width,
        num_layers=depth,
        num_heads=settings.section("model_args").read("num_heads", int, max(width // HEAD_DIM, 1)),
        mlp_ratio=hidden / max(width, 1),
        patch_size=patch,
        image_size=math.isqrt(rows) * patch,
        num_registers=_shape(specs, "reg_token")[1] if "reg_token" in specs else 0,
    )


def _shape(specs: Mapping[str, TensorSpec], name: str, num_axes: int = 3) -> tuple[int, ...]:
    shape = specs[name].shape if name in specs else None
    if shape is None or len(shape) != num_axes or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise CheckpointError("unusable DINOv2 weights", f"{name} {found}", "use timm's or transformers' own file")
    return shape


class _TimmFiles:
    """timm's tensors with a position row for the class token, a mask token, and registers even when there are none.

    A folded table has one row per patch; the class token already holds its own position, so its row is zero.
    """

    def __init__(self, files: WeightFiles):
        self._files = files
        dtype, (_, rows, width) = files.specs["pos_embed"].dtype, _shape(files.specs, "pos_embed")
        self._folded = math.isqrt(rows) ** 2 == rows
        made = {
            "mask_token": TensorSpec(dtype, (1, width)),
            "reg_token": TensorSpec(dtype, (1, 0, width)),
        }
        self.specs = {**made, **files.specs}
        if self._folded:
            self.specs["pos_embed"] = TensorSpec(dtype, (1, rows + 1, width))

    def load(self, name: str) -> Tensor:
        """A tensor under timm's name."""
        if name not in self._files.specs:
            return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)
        tensor = self._files.load(name)
        if name == "pos_embed" and self._folded:
            return torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        return tensor
