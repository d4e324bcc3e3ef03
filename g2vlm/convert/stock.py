"""A stock model as the semantic half of ours: a Qwen-VL with its vision tower, or a text model alone.

Files of a Qwen-VL name tensors in one of two styles: `model.*` and `visual.*`, or, newer, `model.language_model.*` and
`model.visual.*`. Text models use the first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g2vlm.config import DecoderConfig, MropeLayout, VisionTowerConfig
from g2vlm.convert.configs import (
    Section,
    read_decoder,
    read_qwen3_vl_tower,
    read_qwen25_vl_tower,
    read_semantic_encoder,
    read_text_decoder,
)
from g2vlm.convert.gguf import GGUF_RULES, is_gguf, open_gguf
from g2vlm.convert.keymap import KeyMap, Recipe, Rule, Translated, rule
from g2vlm.convert.tokens import Vocabulary, extended_vocabulary, read_tokens, read_vocabulary
from g2vlm.errors import CheckpointError
from g2vlm.model.loading import possible_config
from g2vlm.weights import Specs, TensorSource, TensorSpec, WeightFiles, compare, read_json

TABLES = ("embed_tokens.weight", "lm_head.weight")
SEMANTIC = ("embed_tokens.", "lm_head.", "semantic_encoder.")
BUFFERS = ".rotary_emb.inv_freq"
"""Ending of tensors that older files hold and nobody needs."""


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have in common.

    Args:
        title: what people call them.
        read_tower: the vision tower's config from its section and the decoder's width; None for text models.
        has_biases: queries, keys and values have biases; otherwise ours are zero.
        qk_norm: queries and keys are normed.
        rope_theta: base of the rotation where the config does not state it.
        mrope_layout: as in `DecoderConfig`.
    """

    title: str
    read_tower: Callable[[Section, int], VisionTowerConfig] | None = None
    has_biases: bool = True
    qk_norm: bool = False
    rope_theta: float = 1e6
    mrope_layout: MropeLayout = "blocks"


FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", read_semantic_encoder),
    "qwen2_5_vl": Family("Qwen2.5-VL", read_qwen25_vl_tower),
    "qwen3_vl": Family("Qwen3-VL", read_qwen3_vl_tower, False, True, 5e5, "interleaved"),
    "llama": Family("Llama", None, False, rope_theta=1e4),
    "qwen2": Family("Qwen2", None, rope_theta=1e4),
    "qwen3": Family("Qwen3", None, False, True, rope_theta=1e4),
}


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
class Stock:
    """A stock model: the parts of our config that it decides, its tensors, and the map of their names.

    Args:
        path: where it is.
        title: what people call its family.
        decoder: with our vocabulary, which may have more rows than its tables.
        semantic_encoder: None for a text model.
        vocabulary: special tokens, and the tokenizer's files where they had to be made.
        files: tensors under their own names.
        keymap: their names <-> ours.
        num_rows: of its own embedding table.
        tied: the embedding serves as `lm_head`.
        has_biases: as in `Family`.
    """

    path: Path
    title: str
    decoder: DecoderConfig
    semantic_encoder: VisionTowerConfig | None
    vocabulary: Vocabulary
    files: TensorSource
    keymap: KeyMap
    num_rows: int
    tied: bool
    has_biases: bool

    def source(self, ours: Specs) -> TensorSource:
        """Its tensors under our names, as a model with our tensors takes them.

        A tied embedding appears as `lm_head` too, absent biases as zeros, missing rows of a table as its mean row: a
        token that nobody saw yet is never the most probable one.
        """
        recipes = self.keymap.to_ours(self.files.specs)
        if self.tied:
            recipes["lm_head.weight"] = recipes["embed_tokens.weight"]
        biases = {name: spec for name, spec in ours.items() if self._lacks(name)}
        return Fitted(Translated(self.files, recipes), self.decoder.vocab_size, biases)

    def original(self, written: TensorSource) -> TensorSource:
        """Its own tensors again, from ours."""
        return Translated(Fitted(written, self.num_rows), self.keymap.to_theirs(written.specs))

    def require_complete(self, ours: Specs) -> None:
        """Raise a CheckpointError unless the files hold exactly what a model with our tensors takes from them."""
        own = {name: spec for name, spec in ours.items() if is_semantic(name) and not self._lacks(name)}
        if self.semantic_encoder is None:
            own = {name: spec for name, spec in own.items() if not name.startswith("semantic_encoder.")}
        for name in TABLES:
            own[name] = _with_rows(own[name], self.num_rows)
        expected = self.keymap.their_specs(own)
        head = next(iter(self.keymap.to_theirs(["lm_head.weight"])))
        if self.tied and head not in self.files.specs:
            del expected[head]
        compare(expected, self.files.specs).require_complete(self.path)

    def _lacks(self, name: str) -> bool:
        return not self.has_biases and ".semantic.attention." in name and name.endswith(".bias")


class Fitted:
    """A source with tables of another number of rows, and zeros for tensors that it lacks.

    Rows too many are cut off; rows too few are filled with the mean row.
    """

    def __init__(self, source: TensorSource, num_rows: int, zeros: Specs | None = None):
        self._source, self._zeros, self._num_rows = source, zeros or {}, num_rows
        dtype = next(iter(source.specs.values())).dtype
        self.specs = {name: TensorSpec(dtype, spec.shape) for name, spec in self._zeros.items()} | {
            name: _with_rows(spec, num_rows) if name in TABLES else spec for name, spec in source.specs.items()
        }

    def load(self, name: str) -> Tensor:
        """The tensor, brought to its number of rows."""
        if name in self._zeros:
            return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)
        tensor = self._source.load(name)
        if name not in TABLES or len(tensor) == self._num_rows:
            return tensor
        missing = max(self._num_rows - len(tensor), 0)
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor[: self._num_rows], mean.expand(missing, -1)])


def _with_rows(spec: TensorSpec, num_rows: int) -> TensorSpec:
    return TensorSpec(spec.dtype, (num_rows, *spec.shape[1:]))


def is_semantic(name: str) -> bool:
    """Whether a tensor of ours belongs to the semantic half."""
    return name.startswith(SEMANTIC) or ".semantic" in name


def stock_family(path: Path) -> Family | None:
    """What a GGUF file, or a folder by the `model_type` of its config.json, holds; None if it is no stock model."""
    if is_gguf(path):
        return FAMILIES["llama"]
    if not (path / "config.json").is_file():
        return None
    return FAMILIES.get(str(read_json(path / "config.json").get("model_type")))


def open_stock(path: Path, **decoder_fields: Any) -> Stock:
    """Read a stock model's config and headers; `decoder_fields` sets what its config does not decide.

    Raises:
        CheckpointError: damaged, or of a kind that we do not compute.
        MissingExtra: a GGUF file without the package that reads it.
    """
    if is_gguf(path):
        return _open_gguf(path, decoder_fields)
    config = Section(read_json(path / "config.json"), str(path / "config.json"))
    family = FAMILIES[config.read("model_type", str)]
    text = config.section("text_config") if config.values.get("text_config") else config
    decoder = _decoder(family, text, decoder_fields)
    num_rows, tower = decoder.vocab_size, None
    if family.read_tower is None:
        vocabulary = read_vocabulary(path, num_rows)
    else:
        tower = family.read_tower(config.section("vision_config"), decoder.hidden_size)
        vocabulary = Vocabulary(read_tokens(path, num_rows), num_rows)
    files = _Needed(WeightFiles(path))
    newer = any(name.startswith("model.language_model.") for name in files.specs)
    return Stock(
        path=path,
        title=family.title,
        decoder=replace(decoder, vocab_size=vocabulary.size),
        semantic_encoder=tower,
        vocabulary=vocabulary,
        files=files,
        keymap=NEWER_NAMES if newer else OLDER_NAMES,
        num_rows=num_rows,
        tied=any(part.values.get("tie_word_embeddings") is True for part in (config, text)),
        has_biases=family.has_biases,
    )


def _open_gguf(path: Path, decoder_fields: dict[str, Any]) -> Stock:
    content = open_gguf(path)
    decoder = _decoder(FAMILIES["llama"], content.settings, decoder_fields)
    vocabulary = extended_vocabulary(content.tokenizer, decoder.vocab_size, content.chat_template)
    return Stock(
        path=path,
        title="Llama (GGUF)",
        decoder=replace(decoder, vocab_size=vocabulary.size),
        semantic_encoder=None,
        vocabulary=vocabulary,
        files=content.tensors,
        keymap=KeyMap(GGUF_RULES),
        num_rows=decoder.vocab_size,
        tied="output.weight" not in content.tensors.specs,
        has_biases=False,
    )


def _decoder(family: Family, text: Section, fields: dict[str, Any]) -> DecoderConfig:
    if not family.has_biases:
        text.allow("attention_bias", False, None)
    fields = {"semantic_qk_norm": family.qk_norm, "mrope_layout": family.mrope_layout, **fields}
    with possible_config(text.name):
        if family.read_tower is None:
            return read_text_decoder(text, family.rope_theta, **fields)
        return read_decoder(text, family.rope_theta, **fields)


class _Needed:
    """Files without buffers that older versions of transformers stored."""

    def __init__(self, files: WeightFiles):
        self._files = files
        self.specs = {name: spec for name, spec in files.specs.items() if not name.endswith(BUFFERS)}
        if not self.specs:
            raise CheckpointError(f"no weights in {files.path}", "its files hold no tensors", "download it again")

    def load(self, name: str) -> Tensor:
        return self._files.load(name)


def copy_recipes(semantic: Specs, needed: Specs) -> dict[str, Recipe]:
    """Recipes that start the geometric expert as a copy of the semantic one, where both have the tensor."""
    twins = {name: name.replace("geometric", "semantic") for name in needed if name.startswith("decoder.")}
    return {name: Recipe((twin,)) for name, twin in twins.items() if name != twin and twin in semantic}
