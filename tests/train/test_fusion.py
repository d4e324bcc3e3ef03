"""Joint training of a model with fusion: it learns, its source does not, and its dropout is resumed to the bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2vlm.checkpoint import load_model
from tests.train.chats import CE, COLOURS, Colours, chat_run, chat_steps, chat_trainer, pack
from tests.train.test_state import equal_runs
from train.config import RunConfig
from train.engine import engine
from train.loop import train
from train.optim import learning_rate, set_learning_rate
from train.packing import ChatMixture


def fused_run(steps: int = 4, dropout: float = 0.1, **runtime) -> RunConfig:
    config = chat_run(steps, {**CE, "fusion": 1.0}, **runtime)
    assert isinstance(config.model, dict)
    return replace(config, model={**config.model, "fusion": {"dropout": dropout}})


def colours(num_samples: int = 40) -> Colours:
    return Colours(views=1, num_samples=num_samples)


def run(config: RunConfig, folder: Path) -> None:
    with engine("ddp", "cpu") as one:
        train(config, one, folder, ChatMixture((colours(),), (1.0,)), ChatMixture((colours(4),), (1.0,)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(fused_run(), folder)
    return folder


def test_overfitting_one_batch_leaves_the_source_alone() -> None:
    config = fused_run(dropout=0.0)
    trainer, model = chat_trainer(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = pack([colours().load(index, index) for index in range(len(COLOURS))])
    steps, results = 60, []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, 3e-3, config.schedule))
        results += chat_steps(trainer, config, [batch])
    assert results[-1].terms["language"] < 0.05 < 3 < results[0].terms["language"]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name.startswith("fusion.")} <= moved
    assert not any(name.startswith(("geometry_", "heads.")) or ".geometric" in name for name in moved)


def test_resumed_is_undisturbed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    run(fused_run(resume="auto"), tmp_path / "run")
    equal_runs(finished, tmp_path / "run", 4)


def test_the_model_of_a_run_keeps_its_fusion(finished: Path) -> None:
    model = load_model(finished / "model")
    assert model.config.fusion is not None
    assert model.config.fusion.dropout == 0.1
    assert "fusion.query.weight" in model.state_dict()
