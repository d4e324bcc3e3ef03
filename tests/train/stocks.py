"""Tiny stock Qwen-VLs as folders with processors of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from g2vlm.prompts import EMBEDDED
from g2vlm.semantic_images import SemanticRule
from g2vlm.supervision.backbones import backbone_of
from tests.g2vlm.stock import TEXT, VISION
from tests.train.chats import chat_run
from train.config import OptimConfig, RunConfig
from train.engine import Engine
from train.loop import build_objectives, head_groups
from train.objectives.supervision import supervision_of
from train.optim import build_optimizer
from train.start import starting_student
from train.step import StepResult, Trainer
from train.stock.batch import StockBatch, stock_inputs
from train.stock.layout import StockLayout
from train.stock.model import FAMILIES, image_rule, load_processor, load_stock
from train.trainable import set_trainable

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


def stock_layout(family: str = "qwen2_vl", limits: SemanticRule | None = None) -> StockLayout:
    """Of the folder."""
    processor = load_processor(stock_folder(family), load_stock(stock_folder(family)).config)
    return StockLayout(processor, image_rule(processor, limits))


ALL = {"language_model": 1.0, "embeddings": 1.0, "lm_head": 1.0, "merger": 1.0, "vision_encoder": 1.0}


def stock_run(
    steps: int = 4, family: str = "qwen2_vl", trainable: Mapping[str, float] = ALL, **runtime: Any
) -> RunConfig:
    """A few steps of a tiny stock model on questions, a checkpoint every second step."""
    plain = chat_run(steps, trainable, **runtime)
    assert plain.data.chat is not None
    chat = replace(plain.data.chat, images=None, tokens_per_pack=240)
    more = {"deepstack_mergers": 1.0} if family == "qwen3_vl" and trainable is ALL else {}
    groups = {**trainable, **more}
    return replace(plain, model=str(stock_folder(family)), trainable=groups, data=replace(plain.data, chat=chat))


def stock_trainer(
    config: RunConfig, engine: Engine | None = None, lr: float = 1e-3
) -> tuple[Trainer, Any, dict[str, Any]]:
    """A trainer, the plain model, and its heads by name."""
    student, engine = starting_student(config), engine or Engine(torch.device("cpu"))
    trained = set_trainable(student.model, config.trainable, student.groups)
    backbone = backbone_of(student.model)
    supervision = supervision_of(config, backbone)
    modules = supervision.modules if supervision else {}
    if config.runtime.gradient_checkpointing:
        student.recompute()
    wrapped = engine.wrap(student.whole(backbone, modules))
    heads = head_groups(config, supervision)
    optimizer = build_optimizer(student.model, trained, config.trainable, OptimConfig(lr=lr), heads)
    objectives = [*build_objectives(config), *(supervision.objectives.values() if supervision else ())]
    return Trainer(engine, wrapped, optimizer, objectives), student.model, modules


def stock_steps(trainer: Trainer, batches: Sequence[StockBatch], **options: Any) -> list[StepResult]:
    """One step per batch."""
    return [trainer.step(stock_inputs(batch), batch, **options) for batch in batches]
