"""The released G2VLM layout <-> ours: names of tensors, and three config files.

The released code writes the sizes of the geometry heads out in its source, except those below; here they are read from
the tensors, so that checkpoints of any size load. Its number of heads (16) and rotary base (100) leave no trace.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g2vlm.config import G2VLMConfig, HeadsConfig, SemanticEncoderConfig
from g2vlm.convert.configs import (
    Section,
    read_decoder,
    read_geometry_encoder,
    read_semantic_encoder,
    write_decoder,
    write_geometry_encoder,
    write_semantic_encoder,
)
from g2vlm.convert.dinov2 import transformers_rules
from g2vlm.convert.keymap import KeyMap, Rule, Translated, rule
from g2vlm.convert.stock import expert_rules
from g2vlm.convert.tokens import read_tokens
from g2vlm.errors import CheckpointError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.loading import possible_config
from g2vlm.weights import Specs, TensorSource, WeightFiles, common_size, compare, read_json

CONFIG_FILES = ("text_config.json", "vit_config.json", "dino_config.json")


def _decoder_rules(theirs: str, ours: str) -> list[Rule]:
    """One of the geometry decoders."""
    return [
        rule(f"{theirs}.blocks.{{i}}.{{tail}}", f"{ours}.blocks.{{i}}.{{tail}}"),
        rule(f"{theirs}.linear_out.{{tail}}", f"{ours}.output.{{tail}}"),
    ]


def _rules() -> list[Rule]:
    llm, head = "language_model.model.", "heads.camera_head."
    return [
        rule(f"{llm}embed_tokens.weight", "embed_tokens.weight"),
        rule("language_model.lm_head.weight", "lm_head.weight"),
        *expert_rules(llm, "semantic", ""),
        *expert_rules(llm, "geometric", "_moe_geo"),
        rule(f"{llm}layers.{{i}}.ls1.gamma", "decoder.layers.{i}.geometric.attention_scale.gamma"),
        rule(f"{llm}layers.{{i}}.ls2.gamma", "decoder.layers.{i}.geometric.mlp_scale.gamma"),
        rule("vit_model.{tail}", "semantic_encoder.{tail}"),
        *transformers_rules("dino_model."),
        rule("dino2llm.{tail}", "geometry_projection.{tail}"),
        *_decoder_rules("point_decoder", "heads.point_decoder"),
        *_decoder_rules("camera_decoder", "heads.camera_decoder"),
        *_decoder_rules("global_points_decoder", "heads.global_points_decoder"),
        *_decoder_rules("conf_decoder", "heads.confidence_decoder"),
        rule("point_head.{tail}", "heads.point_head.{tail}"),
        rule("global_point_head.{tail}", "heads.global_point_head.{tail}"),
        rule("conf_head.{tail}", "heads.confidence_head.{tail}"),
        *(rule(f"camera_head.res_conv.{{i}}.res_conv{k + 1}.{{tail}}", f"{head}residuals.{{i}}.layers.{k}.{{tail}}")
          for k in range(3)),
        *(rule(f"camera_head.more_mlps.{2 * k}.{{tail}}", f"{head}mlp.{k}.{{tail}}") for k in range(2)),
        rule("camera_head.fc_t.{tail}", f"{head}translation.{{tail}}"),
        rule("camera_head.fc_rot.{tail}", f"{head}rotation.{{tail}}"),
    ]  # fmt: skip


KEYMAP = KeyMap(_rules())


def is_release(folder: Path) -> bool:
    """Whether a folder is in the released layout."""
    return (folder / "text_config.json").is_file() and (folder / "dino_config.json").is_file()


def read_config(folder: Path, specs: Specs | None = None) -> G2VLMConfig:
    """Our config for a released checkpoint.

    Args:
        folder: the checkpoint.
        specs: its tensors; by default read from its files.

    Raises:
        CheckpointError: a config file is absent or damaged, or asks for something that we do not compute.
    """
    specs = WeightFiles(folder).specs if specs is None else specs
    text, vision, dino = (Section(read_json(folder / name), str(folder / name)) for name in CONFIG_FILES)
    with possible_config(folder):
        decoder = read_decoder(text)
        return G2VLMConfig(
            decoder=decoder,
            semantic_encoder=read_semantic_encoder(vision, decoder.hidden_size),
            geometry_encoder=read_geometry_encoder(dino, windows="official"),
            heads=_heads(specs, decoder.hidden_size),
            tokens=read_tokens(folder, decoder.vocab_size),
        )


def _heads(specs: Specs, width: int) -> HeadsConfig:
    """Sizes of the geometry heads by majority of the tensors that show them, so that a damaged one is named later."""
    released = HeadsConfig()
    decoders = [f"{name}_decoder." for name in ("point", "camera", "global_points")]
    hidden = common_size(specs, [f"{d}blocks.{k}.mlp.fc1.weight:0" for d in decoders for k in range(released.depth)])
    points = ["point_decoder.linear_out.weight:0", "point_decoder.linear_out.bias:0", "point_head.proj.weight:1",
              "global_points_decoder.linear_out.weight:0", "global_points_decoder.linear_out.bias:0"]  # fmt: skip
    camera = ["camera_decoder.linear_out.weight:0", "camera_decoder.linear_out.bias:0", "camera_head.fc_t.weight:1"]
    return HeadsConfig(
        depth=_depth(specs, decoders) or released.depth,
        mlp_ratio=hidden / width if hidden else released.mlp_ratio,
        point_dim=common_size(specs, points) or released.point_dim,
        camera_dim=common_size(specs, camera) or released.camera_dim,
        global_points=any(name.startswith("global_point") for name in specs),
        confidence=any(name.startswith("conf_") for name in specs),
    )


def _depth(specs: Specs, decoders: Sequence[str]) -> int | None:
    prefixes = [f"{decoder}blocks." for decoder in decoders]
    blocks = [{name[len(p) :].split(".")[0] for name in specs if name.startswith(p)} for p in prefixes]
    counts = [len(numbers) for numbers in blocks if numbers]
    return Counter(counts).most_common(1)[0][0] if counts else None


def open_release(folder: Path) -> tuple[G2VLMConfig, TensorSource]:
    """A released checkpoint as our config and our tensors, complete and of the right shapes.

    Raises:
        CheckpointError: with every missing, unexpected and misshapen tensor under its released name.
    """
    files = WeightFiles(folder)
    if "register_token" in files.specs:
        raise CheckpointError(
            f"unsupported checkpoint {folder}",
            "register_token: it was trained with register tokens inside the language model",
            "use a checkpoint without them, such as the released one",
        )
    config = read_config(folder, files.specs)
    with possible_config(folder):
        expected = KEYMAP.their_specs(G2VLMForConditionalGeneration.tensor_specs(config))
    compare(expected, files.specs).require_complete(folder)
    return config, Translated(files, KEYMAP.to_ours(files.specs))


def write_config(config: G2VLMConfig) -> dict[str, dict[str, Any]]:
    """The three config files of the released layout, by name.

    Raises:
        CheckpointError: the released layout has no place for this model, with every reason.
    """
    if reasons := _obstacles(config):
        raise CheckpointError(
            "this model does not fit the released layout", "; ".join(reasons), "keep it in the project's own layout"
        )
    assert isinstance(config.semantic_encoder, SemanticEncoderConfig)
    parts = (
        write_decoder(config.decoder),
        write_semantic_encoder(config.semantic_encoder, config.hidden_size),
        write_geometry_encoder(config.geometry_encoder),
    )
    return dict(zip(CONFIG_FILES, parts, strict=True))


def _obstacles(config: G2VLMConfig) -> list[str]:
    decoder, heads, released, encoder = config.decoder, config.heads, HeadsConfig(), config.semantic_encoder
    found = {
        f"encoders is {config.encoders}": config.encoders != "dual",
        "the semantic expert has no qk-norm": not decoder.semantic_qk_norm,
        "the geometric expert has no qk-norm": not decoder.geometric_qk_norm,
        "the normals are learned": heads.normals != "derived",
        f"heads.num_heads is {heads.num_heads}, not {released.num_heads}": heads.num_heads != released.num_heads,
        f"heads.rope_base is {heads.rope_base}, not {released.rope_base}": heads.rope_base != released.rope_base,
        "head_dim is not hidden_size / num_heads": decoder.head_dim * decoder.num_heads != decoder.hidden_size,
        f"decoder.mrope_layout is {decoder.mrope_layout}": decoder.mrope_layout != "blocks",
        f"the vision tower is {encoder.architecture}": not isinstance(encoder, SemanticEncoderConfig),
        "images are fused with geometry tokens": config.fusion is not None,
        "a patch is not 14 pixels": {config.geometry_encoder.patch_size, config.semantic_encoder.patch_size} != {14},
    }
    return [reason for reason, holds in found.items() if holds]


def lost_settings(config: G2VLMConfig) -> list[str]:
    """Settings of a model that the released layout does not store and the released code would compute otherwise."""
    released = G2VLMConfig()
    names = ("geometry_attention", "semantic_image_attention", "view_positions", "geometry_sees")
    lost = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) != getattr(released, name)]
    windows = config.geometry_encoder.windows
    return lost + ([f"geometry_encoder.windows={windows}"] if windows != "official" else [])
