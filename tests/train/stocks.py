"""Runs of tiny stock Qwen-VLs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from g2vlm.data.chat.types import ChatSample
from g2vlm.geometry_tokens import Clip
from g2vlm.semantic_images import SemanticRule
from g2vlm.stock.layout import StockLayout
from g2vlm.stock.model import image_rule, load_processor, load_stock
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.gasp import GASPHeads
from g2vlm.supervision.spatialsv import SpatialSVHeads
from g2vlm.supervision.teachers.base import targets_of
from geometry.correspondence import TrackRule
from tests.g2vlm.stock_folders import stock_folder
from tests.train.chats import chat_run
from tests.train.clips import GEOVR
from train.assemble import Assembled, assemble
from train.config import RunConfig
from train.engine import Engine
from train.objectives.gasp import GASPConfig
from train.objectives.spatialsv import SpatialSVConfig
from train.step import StepResult, Trainer
from train.stock.batch import StockBatch, collate_stock, stock_inputs


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
