"""A small source of questions for tests: pictures of one colour, and the box room for the geometry encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from g2vlm.config import G2VLMConfig
from g2vlm.data.chat.batch import ChatBatch, Filling, chat_inputs, collate_chats
from g2vlm.data.chat.layout import ChatLayout
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.prompts import ChatTokenizer
from g2vlm.semantic_images import SemanticRule
from tests.train.runs import mini_config
from tests.train.scenes import BoxRooms
from train.assemble import build_objectives
from train.config import (
    ChatConfig,
    ChatSourceConfig,
    DataConfig,
    GeometryConfig,
    GuardConfig,
    LanguageConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
)
from train.engine import Engine
from train.optim import build_optimizer
from train.packing import ChatMixture, PackStream
from train.start import starting_model
from train.step import StepResult, Trainer
from train.trainable import set_trainable

CE = {"semantic_expert": 1.0, "embeddings": 1.0, "lm_head": 1.0}
CE_CE = {**CE, "geometric_expert": 1.0, "projection": 1.0}
VG_CE = {**CE_CE, "geometry_heads": 1.0}
EVERYTHING = {**VG_CE, "geometry_encoder": 1.0, "semantic_encoder": 1.0}

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "white": (250, 250, 250)}
RULE = SemanticRule.native(min_pixels=56 * 56, max_pixels=56 * 57)
VIEW_SIZE = (28, 28)


@dataclass(frozen=True)
class Colours:
    """What colour is the picture?

    Args:
        pictures: semantic images of a sample; 0: the colour stands in the question.
        views: of the box room; 0: none.
        depth: whether the room's depth is known.
        clip: whether the room is known as what the pictures show.
        hidden, broken: samples whose shape, or whose pixels cannot be read.
    """

    pictures: int = 1
    views: int = 2
    depth: bool = True
    hidden: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    num_samples: int = 40
    size: tuple[int, int] = (28, 28)
    clip: bool = False
    name: str = field(default="colours")

    def __len__(self) -> int:
        return self.num_samples

    def shape(self, index: int, seed: int) -> ChatShape:
        if index in self.hidden:
            raise InputError(f"cannot find sample {index}", "it is hidden")
        return self._sample(index, seed).shape

    def load(self, index: int, seed: int) -> ChatSample:
        if index in self.broken:
            raise InputError(f"cannot read sample {index}", "it is broken")
        return self._sample(index, seed)

    def _sample(self, index: int, seed: int) -> ChatSample:
        name = [*COLOURS][index % len(COLOURS)]
        picture = np.full((30, 30, 3), COLOURS[name], np.uint8)
        scene = None
        if self.views:
            scene = BoxRooms().load(index % 8, ViewRequest(self.views, self.size, seed))
            scene = scene if self.depth else replace(scene, depth=None)
        parts = [*(ImageAt(i) for i in range(self.pictures)), "What colour?" if self.pictures else f"Say {name}."]
        images = (picture,) * self.pictures
        clip = scene if self.clip else None
        return ChatSample(tuple(parts), name, images, scene, f"{self.name}/{index}", "colour", clip=clip)


def chat_config(**changes: Any) -> G2VLMConfig:
    """The smallest model with the embedded tokenizer's vocabulary."""
    mini, tiny = mini_config(), G2VLMConfig.tiny()
    decoder = replace(mini.decoder, vocab_size=tiny.decoder.vocab_size)
    parts = {"geometry_encoder": mini.geometry_encoder, "semantic_encoder": mini.semantic_encoder, "heads": mini.heads}
    return G2VLMConfig.tiny(**{"decoder": decoder, **parts, **changes})


def layout(config: G2VLMConfig | None = None, **changes: Any) -> ChatLayout:
    return ChatLayout(ChatTokenizer.embedded(), config or chat_config(), RULE, **changes)


def stream(*sources: Colours, weights: tuple[float, ...] = (), **changes: Any) -> PackStream:
    sources = sources or (Colours(),)
    mixture = ChatMixture(sources, weights or (1.0,) * len(sources))
    return PackStream(mixture, layout(), **{"tokens_per_pack": 400, "view_size": VIEW_SIZE, **changes})


def chat_run(
    steps: int = 4, trainable: Mapping[str, float] = CE, geometry: GeometryConfig | None = None, **runtime: Any
) -> RunConfig:
    """A few steps of the smallest model on questions, a checkpoint every second step."""
    parts = ("decoder", "geometry_encoder", "semantic_encoder", "heads")
    chat = ChatConfig((ChatSourceConfig("colours"),), (), tokens_per_pack=130, view_size=VIEW_SIZE, images=RULE)
    defaults = {
        "steps": steps,
        "workers": 0,
        "checkpoint_every": 2,
        "validate_every": 2,
        "validation_steps": 2,
        "keep": 9,
    }
    return RunConfig(
        model={"preset": "tiny", **{part: asdict(getattr(chat_config(), part)) for part in parts}},
        trainable=dict(trainable),
        objectives=ObjectivesConfig(geometry, LanguageConfig()),
        data=DataConfig(chat=chat),
        schedule=ScheduleConfig(warmup=2),
        guards=GuardConfig(spike=None, max_bad_scenes_share=0.4),
        runtime=RuntimeConfig(**{**defaults, **runtime}),
    )


def chat_trainer(
    config: RunConfig, engine: Engine | None = None, lr: float = 1e-3
) -> tuple[Trainer, G2VLMForConditionalGeneration]:
    model, engine = starting_model(config), engine or Engine(torch.device("cpu"))
    trained = set_trainable(model, config.trainable)
    wrapped = engine.wrap(model)
    optimizer = build_optimizer(model, trained, config.trainable, OptimConfig(lr=lr))
    return Trainer(engine, wrapped, optimizer, build_objectives(config)), model


def pack(samples: Sequence[ChatSample], filling: Filling | None = None) -> ChatBatch:
    return collate_chats(samples, layout(), filling)


def chat_steps(trainer: Trainer, config: RunConfig, batches: Sequence[ChatBatch], **options: Any) -> list[StepResult]:
    """One step per batch."""
    geometry = config.objectives.geometry is not None
    return [trainer.step(chat_inputs(batch, geometry, geometry), batch, **options) for batch in batches]
