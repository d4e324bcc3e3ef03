"""A GGUF file, written here with the package `gguf`, becomes the model that transformers builds of the same tensors."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from g2vlm.checkpoint import load_model
from g2vlm.convert import convert
from g2vlm.convert.gguf import open_gguf
from g2vlm.errors import CheckpointError, MissingExtra
from g2vlm.sequence import Text
from tests.g2vlm.stock import our_logits, text_model

LETTERS = [chr(code) for code in range(33, 127)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġ", "Ċ", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]
SIZES = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "head_dim": None}
WORDS = (20, 33, 47, 21, 60, 20, 35)


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf")


def pairs_from_halves(rows: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order of query and key rows, written element by element."""
    head_dim = rows.shape[0] // num_heads
    order = [
        head * head_dim + half * head_dim // 2 + slot
        for head in range(num_heads)
        for slot in range(head_dim // 2)
        for half in (0, 1)
    ]
    return rows[order]


def stored(model: Any) -> dict[str, Tensor]:
    """A Llama's tensors as a GGUF file holds them."""
    config, base = model.config, model.model
    tensors = {"token_embd.weight": base.embed_tokens.weight, "output_norm.weight": base.norm.weight}
    if not config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    for i, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        tensors |= {
            f"blk.{i}.attn_norm.weight": layer.input_layernorm.weight,
            f"blk.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
            f"blk.{i}.attn_q.weight": pairs_from_halves(attention.q_proj.weight, config.num_attention_heads),
            f"blk.{i}.attn_k.weight": pairs_from_halves(attention.k_proj.weight, config.num_key_value_heads),
            f"blk.{i}.attn_v.weight": attention.v_proj.weight,
            f"blk.{i}.attn_output.weight": attention.o_proj.weight,
            f"blk.{i}.ffn_gate.weight": mlp.gate_proj.weight,
            f"blk.{i}.ffn_up.weight": mlp.up_proj.weight,
            f"blk.{i}.ffn_down.weight": mlp.down_proj.weight,
        }
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write(gguf: Any, path: Path, model: Any, architecture: str = "llama", drop: str = "") -> None:
    """The file; matrices of the second layer are quantised, and the model gets the values that the file then holds."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in stored(model).items():
        values = tensor.numpy()
        if "blk.1." in name and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        elif name != drop:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def quantise(gguf: Any, model: Any) -> None:
    """Round the second layer's matrices as Q8_0 does; row order does not matter to it."""
    for parameter in model.model.layers[1].parameters():
        if parameter.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_logits_of_the_same_tensors(gguf: Any, tmp_path: Path, tied: bool) -> None:
    theirs = text_model("llama", tied, **SIZES)
    quantise(gguf, theirs)
    write(gguf, tmp_path / "model.gguf", theirs)
    result = convert(tmp_path / "model.gguf", tmp_path / "ours", preset="tiny", check=True)
    assert f"{len(stored(theirs))} Llama (GGUF) tensors convert back to equal values" in result.checks
    ours = load_model(tmp_path / "ours")
    decoder = ours.config.decoder
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (1e-6, 5e3)
    assert (decoder.vocab_size, ours.config.tokens.vision_start) == (128, len(TOKENS))
    logits = our_logits(ours, [Text(WORDS)])[:, : len(TOKENS)]
    expected = theirs(input_ids=torch.tensor([WORDS])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)


def test_tokenizer_of_the_file(gguf: Any, tmp_path: Path) -> None:
    write(gguf, tmp_path / "model.gguf", text_model("llama", True, **SIZES))
    convert(tmp_path / "model.gguf", tmp_path / "ours", preset="tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "<|im_start|>ab 12 ab<|vision_start|><|vision_end|>\n<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = [len(TOKENS), len(TOKENS) + 1]
    one, two = (TOKENS.index(digit) for digit in "12")
    pieces = [TOKENS.index(token) for token in ("ab", "Ġ", "Ġab", "Ċ")]
    assert ids == [1, pieces[0], pieces[1], one, two, pieces[2], *marks, pieces[3], 2]
    assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == "{{ messages }}"


def test_another_architecture_and_a_damaged_file(gguf: Any, tmp_path: Path) -> None:
    model = text_model("llama", True, **SIZES)
    write(gguf, tmp_path / "falcon.gguf", model, architecture="falcon")
    write(gguf, tmp_path / "part.gguf", model, drop="blk.0.attn_k.weight")
    (tmp_path / "text.gguf").write_text("not found")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "part.gguf").read_bytes()[:5000])
    for name, words in [("falcon", "falcon"), ("part", "blk.0.attn_k.weight"), ("text", "GGUF"), ("cut", "GGUF")]:
        with pytest.raises(CheckpointError, match=words):
            convert(tmp_path / f"{name}.gguf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"g2vlm\[gguf\]"):
        open_gguf(tmp_path / "model.gguf")
