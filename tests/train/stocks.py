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

from g2vlm.data.chat.types import ChatSample
from g2vlm.geometry_tokens import Clip
from g2vlm.prompts import EMBEDDED
from g2vlm.semantic_images import SemanticRule
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.gasp import GASPHeads
from g2vlm.supervision.spatialsv import SpatialSVHeads
from g2vlm.supervision.teachers.base import targets_of
from geometry.correspondence import TrackRule
from tests.g2vlm.stock import TEXT, VISION
from tests.train.chats import chat_run
from tests.train.clips import GEOVR
from train.assemble import Assembled, assemble
from train.config import RunConfig
from train.engine import Engine
from train.objectives.gasp import GASPConfig
from train.objectives.spatialsv import SpatialSVConfig
from train.step import StepResult, Trainer
from train.stock.batch import StockBatch, collate_stock, stock_inputs
from train.stock.layout import StockLayout
from train.stock.model import image_rule, load_processor, load_stock

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


def fresh_layout(family: str = "qwen2_vl", limits: SemanticRule | None = None) -> StockLayout:
    """Of the folder."""
    processor = load_processor(stock_folder(family), load_stock(stock_folder(family)).config)
    return StockLayout(processor, image_rule(processor, limits))


stock_layout = cache(fresh_layout)
"""Made once."""


SMALL = {
    "geovr": GEOVR,
    "gasp": GASPConfig(heads=GASPHeads(embed_dim=8), tracks=TrackRule(grids=((2, 2),))),
    "spatialsv": SpatialSVConfig(
        SpatialSVHeads((1, 2, 2, 3), output_dim=8, widths=DPTWidths((4, 4, 8, 8), 8), distill=False), distill=0.0
    ),
}
"""Heads of geometric supervision that compute in no time."""

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


def supervised_run(config: RunConfig, names: Sequence[str] = tuple(SMALL)) -> RunConfig:
    """With geometric supervision by name, its heads small."""
    chosen = {name: SMALL[name] for name in names}
    return replace(config, objectives=replace(config.objectives, **chosen))


def clip_rows(samples: Sequence[ChatSample], family: str, parts: Assembled) -> StockBatch:
    """As the loop makes it."""
    batch = collate_stock(samples, stock_layout(family))
    if parts.supervision is None:
        return batch
    teachers = parts.supervision.teachers
    return replace(batch, targets=tuple(scene and targets_of(teachers, Clip.of(scene)) for scene in batch.clips))


def stock_parts(config: RunConfig, engine: Engine | None = None) -> Assembled:
    """As the loop puts them together."""
    torch.manual_seed(0)
    return assemble(config, engine or Engine(torch.device("cpu")))


def stock_steps(trainer: Trainer, batches: Sequence[StockBatch], **options: Any) -> list[StepResult]:
    """One step per batch."""
    return [trainer.step(stock_inputs(batch), batch, **options) for batch in batches]
