"""Tiny stock models of every supported family, as folders that `convert` reads."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from g2vlm.checkpoint import load_model
from g2vlm.convert import convert
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import sequence_builder
from g2vlm.sequence import Sample, Text

VOCABULARY, IMAGE, VIDEO = 64, 5, 6
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
BLOCKS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TURNS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
LATER_TOWER = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 64}
VISION = {
    "qwen2_vl": ("Qwen2VL", BLOCKS, {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}),
    "qwen2_5_vl": ("Qwen2_5_VL", BLOCKS, LATER_TOWER
                   | {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2, "patch_size": 14}),
    "qwen3_vl": ("Qwen3VL", TURNS, LATER_TOWER
                 | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1], "patch_size": 14}),
}  # fmt: skip
TEXT_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def randomise(module: torch.nn.Module) -> Any:
    """Every parameter drawn widely, so that each changes the outputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def vision_model(family: str, tied: bool = False) -> Any:
    """A Qwen-VL of transformers."""
    name, rope, vision = VISION[family]
    text = TEXT | {"rope_parameters": dict(rope), "tie_word_embeddings": tied, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=tied
    )
    model = randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.tie_weights()
    return model


def text_model(family: str, tied: bool = False, **changes: Any) -> Any:
    """A text model of transformers; its heads are wider than width / heads where the family allows that."""
    name = TEXT_FAMILIES[family]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    head = {} if family == "qwen2" else {"head_dim": 20}
    config = getattr(transformers, f"{name}Config")(**(TEXT | rope | head | changes), tie_word_embeddings=tied)
    model = randomise(getattr(transformers, f"{name}ForCausalLM")(config))
    model.tie_weights()
    return model


def write_tokenizer(folder: Path, markers: tuple[str, ...] = MARKERS) -> None:
    """Words; the markers have the first ids."""
    words = ["Reconstruct", "the", "3D", "scene", ".", "?"]
    ids = {token: i for i, token in enumerate(markers)} | {word: i for i, word in enumerate(words, start=10)}
    ids |= {f"w{i}": i for i in range(VOCABULARY) if i not in ids.values()}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens(list(markers))
    tokenizer.save(str(folder / "tokenizer.json"))


def start_from(model: Any, folder: Path, **options: Any) -> G2VLMForConditionalGeneration:
    """Ours, after `convert` of a stock model; the geometry is the tiny preset's."""
    model.save_pretrained(folder / "stock")
    if not (folder / "stock" / "tokenizer.json").is_file():
        write_tokenizer(folder / "stock")
    convert(folder / "stock", folder / "ours", preset="tiny", **options)
    return load_model(folder / "ours")


@torch.no_grad()
def our_logits(model: G2VLMForConditionalGeneration, sample: Sample, **images: torch.Tensor) -> torch.Tensor:
    """(U, vocabulary) after every token of a sample without geometry."""
    sequence = sequence_builder(model.config).build([sample])
    every = torch.arange(sequence.num_tokens)
    logits = model(sequence, logits_at=every, **images).logits
    assert logits is not None
    return logits


def our_greedy(model: G2VLMForConditionalGeneration, sample: Sample, count: int, **images: torch.Tensor) -> list[int]:
    """`count` tokens that continue a sample which ends with text; one full forward each."""
    new: list[int] = []
    for _ in range(count):
        segments = [*sample, Text(tuple(new))] if new else sample
        new.append(int(our_logits(model, segments, **images)[-1].argmax()))
    return new
