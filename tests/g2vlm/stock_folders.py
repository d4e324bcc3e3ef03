"""Tiny stock Qwen-VLs as folders with processors of their own."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from g2vlm.prompts import EMBEDDED
from tests.g2vlm.stock import TEXT, VISION

IMAGE, VIDEO, VOCABULARY = 512, 513, 520
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stock_model(family: str, tied: bool = False) -> Any:
    """Random weights; the words are those of the embedded tokenizer."""
    name, rope, vision = VISION[family]
    patch = {"patch_size": 16} if family == "qwen3_vl" else {}
    text = TEXT | {"vocab_size": VOCABULARY, "rope_parameters": dict(rope), "tie_word_embeddings": tied, "head_dim": 16}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision | patch, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=2, vision_end_token_id=3, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for parameter in model.model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that images differ
    return model


def stock_processor(family: str) -> Any:
    """Of parts; images have four tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    side = 16 if family == "qwen3_vl" else 14
    images = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=64 * 64, patch_size=side)
    later = family == "qwen3_vl"
    videos = transformers.Qwen3VLVideoProcessor() if later else transformers.Qwen2VLVideoProcessor()
    kind = getattr(transformers, f"{CLASSES[family]}Processor")
    return kind(images, tokenizer, videos, chat_template=TEMPLATE)


@cache
def stock_folder(family: str = "qwen2_vl", tied: bool = False) -> Path:
    """A checkpoint folder, made once."""
    folder = Path(mkdtemp(prefix=f"{family}-"))
    stock_model(family, tied).save_pretrained(folder)
    stock_processor(family).save_pretrained(folder)
    return folder
