"""Text models of the Llama architecture in GGUF files, as llama.cpp writes them: settings, tensors, tokenizer.

Quantised tensors become float32. The package `gguf` parses the file: lengths and numbers, nothing that can run.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from g2vlm.convert.configs import Section
from g2vlm.convert.keymap import rule
from g2vlm.errors import CheckpointError, MissingExtra
from g2vlm.weights import TensorSpec

ARCHITECTURE = "llama"
CONTROL, USER_DEFINED = 3, 4
"""Token types: never in a text, and in a text but never split."""

_LAYER, _OURS = "blk.{i}.", "decoder.layers.{i}.semantic."
_PARTS = {
    "attn_norm": "input_norm", "ffn_norm": "post_attention_norm",
    "attn_q": "attention.q_proj", "attn_k": "attention.k_proj", "attn_v": "attention.v_proj",
    "attn_output": "attention.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GGUF_RULES = [
    rule("token_embd.weight", "embed_tokens.weight"),
    rule("output.weight", "lm_head.weight"),
    rule("output_norm.weight", "decoder.semantic_norm.weight"),
    *(rule(f"{_LAYER}{theirs}.weight", f"{_OURS}{ours}.weight") for theirs, ours in _PARTS.items()),
]
"""Names in GGUF files <-> ours."""


@dataclass(frozen=True)
class GGUF:
    """A file's content: settings under transformers' names for Llama, tensors under the file's own."""

    settings: Section
    tensors: "GGUFTensors"
    tokenizer: Tokenizer
    chat_template: str | None


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file by its name."""
    return path.suffix == ".gguf" and path.is_file()


def open_gguf(path: Path) -> GGUF:
    """Parse a file's header; tensors are read when they are asked for.

    Raises:
        CheckpointError: damaged, or of an architecture or tokenizer that is not supported.
        MissingExtra: the package `gguf` is not installed.
    """
    package = _package()
    try:
        reader = package.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises many kinds on damaged files
        raise CheckpointError(f"unreadable GGUF file {path}", str(error), "download it again") from None
    settings = _settings(Section(fields, str(path)), {tensor.name: tensor for tensor in reader.tensors})
    heads = settings.read("num_attention_heads", int), settings.read("num_key_value_heads", int)
    template = fields.get("tokenizer.chat_template")
    return GGUF(settings, GGUFTensors(reader, *heads), _tokenizer(fields, str(path)), template)


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise MissingExtra(
            "GGUF files need the package gguf", "it is not installed", "pip install 'g2vlm[gguf]'"
        ) from None


def _settings(fields: Section, tensors: Mapping[str, Any]) -> Section:
    """What transformers' LlamaConfig says of the same model."""
    fields.allow("general.architecture", ARCHITECTURE)
    fields.allow("llama.rope.scaling.type", "none", None)
    fields.allow("llama.expert_count", 0, None)
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"unusable {fields.name}", "token_embd.weight is missing", "download it again")
    heads, width = fields.read("llama.attention.head_count", int), fields.read("llama.embedding_length", int)
    head_dim = fields.read("llama.attention.key_length", int, width // heads)
    fields.allow("llama.rope.dimension_count", head_dim)
    values = {
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": fields.read("llama.feed_forward_length", int),
        "num_hidden_layers": fields.read("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.read("llama.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(fields.read("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(fields.read("llama.rope.freq_base", float, 1e4)),
    }
    return Section(values, fields.name)


def _short(value: float) -> float:
    """The shortest decimal number that rounds to the same float32: what was written before it was stored."""
    return float(str(np.float32(value)))


class GGUFTensors:
    """The tensors of a file in float32, queries and keys with their rows in transformers' order.

    A file counts the axes of a tensor from the last.
    """

    def __init__(self, reader: Any, num_heads: int, num_kv_heads: int):
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
        shapes = {name: tuple(int(size) for size in reversed(t.shape)) for name, t in self._tensors.items()}
        self.specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}

    def load(self, name: str) -> Tensor:
        """The tensor, a copy."""
        stored = self._tensors[name]
        values = _package().quants.dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.specs[name].shape)
        heads = self._heads.get(name.split(".")[-2])
        return tensor if heads is None else _halves_from_pairs(tensor, heads)


def _halves_from_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection whose rotation turns neighbours -> rows whose rotation turns slot i with i + width / 2."""
    pairs = rows.unflatten(0, (num_heads, -1, 2))  # (heads, width / 2, 2, input)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def _tokenizer(fields: Mapping[str, Any], name: str) -> Tokenizer:
    """The byte-level BPE of a file, with its control tokens as special tokens."""
    section = Section(fields, name)
    section.allow("tokenizer.ggml.model", "gpt2")
    section.allow("tokenizer.ggml.pre", "smollm", "gpt-2", "default")
    tokens, merges = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.merges")
    types = fields.get("tokenizer.ggml.token_type")
    if not tokens or merges is None or types is None or len(types) != len(tokens):
        raise CheckpointError(f"unusable {name}", "its tokenizer is incomplete", "download it again")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))  # pyright: ignore[reportArgumentType]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    named = [(AddedToken(token, normalized=False), kind) for token, kind in zip(tokens, types, strict=True)]
    tokenizer.add_special_tokens([token for token, kind in named if kind == CONTROL])
    tokenizer.add_tokens([token for token, kind in named if kind == USER_DEFINED])
    return tokenizer
