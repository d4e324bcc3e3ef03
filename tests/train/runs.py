"""What the tests of training share: a very small model, and a trainer over it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from g2vlm.config import G2VLMConfig
from g2vlm.data.batch import SceneBatch
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from tests.train.scenes import BoxRooms
from train.config import GeometryConfig, OptimConfig, RunConfig
from train.engine import Engine
from train.loader import StepDataset
from train.objectives.geometry import GeometryObjective, recon_batch_inputs
from train.optim import build_optimizer
from train.sampler import Sampler
from train.step import StepResult, Trainer
from train.trainable import set_trainable

MULTIPLIERS = RunConfig().trainable


def mini_config(**changes: Any) -> G2VLMConfig:
    """The tiny preset with one or two layers everywhere."""
    tiny = G2VLMConfig.tiny()
    return G2VLMConfig.tiny(
        decoder=replace(tiny.decoder, num_layers=2),
        geometry_encoder=replace(tiny.geometry_encoder, num_layers=1, image_size=28),
        semantic_encoder=replace(tiny.semantic_encoder, num_layers=1),
        heads=replace(tiny.heads, depth=1),
        **changes,
    )


def mini_model(**changes: Any) -> G2VLMForConditionalGeneration:
    torch.manual_seed(0)
    return G2VLMForConditionalGeneration(mini_config(**changes))


def mini_batch(step: int = 0, rank: int = 0, world: int = 1, **changes: Any) -> SceneBatch:
    options = {"width": 28, "views": (2, 3), "images_per_step": 6, "scenes_multiple_of": 2, **changes}
    return StepDataset(Sampler((BoxRooms(),), **options), rank, world)[step].batch


def mini_trainer(
    engine: Engine | None = None, multipliers: dict[str, float] | None = None, lr: float = 1e-3, **changes: Any
) -> tuple[Trainer, G2VLMForConditionalGeneration]:
    model, engine = mini_model(**changes), engine or Engine(torch.device("cpu"))
    multipliers = multipliers or MULTIPLIERS
    trained = set_trainable(model, multipliers)
    wrapped = engine.wrap(model)
    optimizer = build_optimizer(model, trained, multipliers, OptimConfig(lr=lr))
    return Trainer(engine, wrapped, optimizer, [GeometryObjective(GeometryConfig())]), model


def train_on(trainer: Trainer, model: Any, batches: Sequence[SceneBatch], **options: Any) -> list[StepResult]:
    """One step per batch."""
    return [trainer.step(recon_batch_inputs(batch, model.config, False, True), batch, **options) for batch in batches]
