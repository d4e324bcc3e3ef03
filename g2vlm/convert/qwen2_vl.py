"""A stock Qwen2-VL as the semantic half of our model: names of tensors and sizes.

Its files name tensors in one of two styles: `model.*` and `visual.*`, or, newer, `model.language_model.*` and
`model.visual.*`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2vlm.config import DecoderConfig, SemanticEncoderConfig, TokenIds
from g2vlm.convert.configs import Section, read_decoder, read_semantic_encoder
from g2vlm.convert.keymap import KeyMap, Recipe, Rule, Translated, rule
from g2vlm.convert.tokens import read_tokens
from g2vlm.model.loading import possible_config
from g2vlm.weights import Specs, TensorSource, WeightFiles, compare, read_json

MODEL_TYPE = "qwen2_vl"


def expert_rules(llm: str, expert: str, suffix: str) -> list[Rule]:
    """Qwen2's decoder layers and final norm <-> one of our experts; `suffix` marks a second set of names."""
    layer, half = f"{llm}layers.{{i}}.", f"decoder.layers.{{i}}.{expert}."
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    return [
        rule(f"{llm}norm{suffix}.weight", f"decoder.{expert}_norm.weight"),
        rule(f"{layer}input_layernorm{suffix}.weight", f"{half}input_norm.weight"),
        rule(f"{layer}post_attention_layernorm{suffix}.weight", f"{half}post_attention_norm.weight"),
        rule(f"{layer}mlp{suffix}.{{tail}}", f"{half}mlp.{{tail}}"),
        *(rule(f"{layer}self_attn.{part}{suffix}.{{tail}}", f"{half}attention.{part}.{{tail}}") for part in attention),
    ]


def _keymap(llm: str, vision: str) -> KeyMap:
    return KeyMap(
        [
            rule(f"{llm}embed_tokens.weight", "embed_tokens.weight"),
            rule("lm_head.weight", "lm_head.weight"),
            *expert_rules(llm, "semantic", ""),
            rule(f"{vision}{{tail}}", "semantic_encoder.{tail}"),
        ]
    )


OLDER_NAMES, NEWER_NAMES = _keymap("model.", "visual."), _keymap("model.language_model.", "model.visual.")


@dataclass(frozen=True)
class Qwen2VL:
    """A Qwen2-VL folder: the parts of our config that it decides, its files, and the map of their names."""

    decoder: DecoderConfig
    semantic_encoder: SemanticEncoderConfig
    tokens: TokenIds
    files: WeightFiles
    keymap: KeyMap
    tied: bool

    def source(self) -> TensorSource:
        """Its tensors under our names; a tied embedding appears as `lm_head` too."""
        recipes = self.keymap.to_ours(self.files.specs)
        if self.tied:
            recipes["lm_head.weight"] = recipes["embed_tokens.weight"]
        return Translated(self.files, recipes)

    def require_complete(self, ours: Specs) -> None:
        """Raise a CheckpointError unless the files hold exactly what a model with our tensors takes from them."""
        parts = ("embed_tokens.", "lm_head.", "semantic_encoder.")
        needed = {name: spec for name, spec in ours.items() if name.startswith(parts) or ".semantic" in name}
        expected = self.keymap.their_specs(needed)
        if self.tied and "lm_head.weight" not in self.files.specs:
            del expected["lm_head.weight"]
        compare(expected, self.files.specs).require_complete(self.files.path)


def is_qwen2_vl(folder: Path) -> bool:
    """Whether a folder says that it holds a Qwen2-VL."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def open_qwen2_vl(folder: Path, **decoder_fields: Any) -> Qwen2VL:
    """Read a Qwen2-VL folder's config and headers; `decoder_fields` sets what its config does not decide.

    Raises:
        CheckpointError: damaged, or of a kind that we do not compute.
    """
    config = Section(read_json(folder / "config.json"), str(folder / "config.json"))
    text = config.section("text_config") if config.values.get("text_config") else config
    files = WeightFiles(folder)
    with possible_config(config.name):
        decoder = read_decoder(text, semantic_qk_norm=False, **decoder_fields)
    newer = any(name.startswith("model.language_model.") for name in files.specs)
    return Qwen2VL(
        decoder=decoder,
        semantic_encoder=read_semantic_encoder(config.section("vision_config"), decoder.hidden_size),
        tokens=read_tokens(folder, decoder.vocab_size),
        files=files,
        keymap=NEWER_NAMES if newer else OLDER_NAMES,
        tied=any(part.values.get("tie_word_embeddings") is True for part in (config, text)),
    )


def copy_recipes(semantic: Specs, needed: Specs) -> dict[str, Recipe]:
    """Recipes that start the geometric expert as a copy of the semantic one, where both have the tensor."""
    twins = {name: name.replace("geometric", "semantic") for name in needed if name.startswith("decoder.")}
    return {name: Recipe((twin,)) for name, twin in twins.items() if name != twin and twin in semantic}
