"""Joint training: what is learned, what stays as it is, and runs that stop and go on."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from g2vlm.data.chat.batch import chat_inputs
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError, TrainingAborted
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs
from g2vlm.weights import read_json
from tests.train.chats import CE, CE_CE, COLOURS, VG_CE, Colours, chat_run, chat_steps, chat_trainer, pack
from tests.train.scenes import BoxRooms
from tests.train.test_state import equal_runs
from train.assemble import build_objectives
from train.config import GeometryConfig, RunConfig
from train.engine import engine
from train.loop import train
from train.optim import learning_rate, set_learning_rate
from train.packing import ChatMixture
from train.trainable import group_of


def run(config: RunConfig, folder: Path, *sources: Colours) -> None:
    sources = sources or (Colours(), Colours(pictures=0, views=0, name="words"))
    with engine("ddp", "cpu") as one:
        mixture = ChatMixture(sources, (1.0,) * len(sources))
        train(config, one, folder, mixture, ChatMixture((Colours(num_samples=4),), (1.0,)))


def test_overfitting_one_batch() -> None:
    """All answers are right and the geometry is learned with them."""
    config = chat_run(trainable=VG_CE, geometry=GeometryConfig(camera=1.0, translation=10.0))
    trainer, _ = chat_trainer(config)
    batch = pack([Colours(views=2).load(index, index) for index in range(len(COLOURS))])
    steps, results = 60, []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, 3e-3, config.schedule))
        results += chat_steps(trainer, config, [batch])
    assert results[-1].terms["language"] < 0.02 < 3 < results[0].terms["language"]
    assert results[-1].terms["points"] < 0.5 * results[0].terms["points"]
    terms, output = trainer.evaluate(chat_inputs(batch, True, True), batch)
    assert output.logits is not None
    assert torch.equal(output.logits.argmax(-1), batch.sequence.labels[batch.supervised])
    assert terms["language"] < 0.02


@pytest.mark.parametrize(("groups", "geometry"), [(CE, None), (CE_CE, None), (VG_CE, GeometryConfig())])
def test_what_a_strategy_trains(groups: dict[str, float], geometry: GeometryConfig | None) -> None:
    """Everything else keeps its bits and has no gradient."""
    config = chat_run(trainable=groups, geometry=geometry)
    trainer, model = chat_trainer(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = pack([Colours().load(0, 0), Colours(depth=False).load(1, 1), Colours(pictures=0, views=0).load(2, 2)])
    gradients: set[str] = set()
    clip = trainer.engine.clip

    def look(parameters: Any, norm: float) -> torch.Tensor:
        gradients.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        return clip(parameters, norm)

    trainer.engine.clip = look
    results = chat_steps(trainer, config, [batch] * 2)
    moved = {group_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(groups)
    assert {group_of(name) for name in gradients} == set(groups)
    assert ("points" in results[0].terms) == (geometry is not None)


def test_a_frozen_geometry_stream_keeps_nothing() -> None:
    """The answers are the same; what the geometric expert computes holds no gradient, whatever the text before it."""
    config = chat_run(trainable=CE)
    _, model = chat_trainer(config)
    batch = pack([Colours().load(0, 0), Colours(pictures=0, views=0).load(1, 1)])
    inputs = chat_inputs(batch, predict_geometry=False)
    output = model(**inputs)
    with torch.no_grad():
        expected = model(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.geometric_hidden, expected.geometric_hidden, rtol=1e-5, atol=1e-6)
    assert output.logits.requires_grad
    assert not output.geometric_hidden.requires_grad
    model.geometry_projection.weight.requires_grad_(True)
    assert model(**inputs).geometric_hidden.requires_grad


@pytest.mark.parametrize("sees", ["views", "everything"])
def test_learning_to_answer_leaves_reconstructions_as_they_are(sees: str) -> None:
    """Bit for bit where views see only each other; words before them are the semantic expert's, which learns."""
    config = chat_run(trainable=CE)
    assert isinstance(config.model, dict)
    config = replace(config, model={**config.model, "geometry_sees": sees})
    trainer, model = chat_trainer(config)
    before = reconstruction(model)
    chat_steps(trainer, config, [pack([Colours().load(0, 0)])] * 2)
    same = [torch.equal(one, other) for one, other in zip(before, reconstruction(model), strict=True)]
    assert all(same) if sees == "views" else not any(same)


@torch.no_grad()
def reconstruction(model: G2VLMForConditionalGeneration) -> list[torch.Tensor]:
    scene = BoxRooms().load(3, ViewRequest(2, (28, 28), 0))
    inputs: dict[str, Any] = recon_inputs(scene.images / 255, model.config, "cpu")
    (found,) = model.eval()(**inputs).geometry
    model.train()
    return [found.local_points, found.cam_to_world, found.normals]


def test_scenes_without_depth_teach_nothing() -> None:
    config = chat_run(trainable=VG_CE, geometry=GeometryConfig())
    known, unknown = Colours().load(0, 0), Colours(depth=False).load(1, 1)
    alone, both = (chat_trainer(config)[0] for _ in range(2))
    (one,), (two,) = chat_steps(alone, config, [pack([known])]), chat_steps(both, config, [pack([known, unknown])])
    for name in one.terms.keys() - {"language"}:
        assert two.terms[name] == pytest.approx(one.terms[name], rel=1e-4), name
    assert two.terms["language"] != one.terms["language"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four steps."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    run(chat_run(), folder)
    return folder


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {"loss", "language", "samples", "tokens", "views", "images"} <= steps[0].keys()
    assert all(line["tokens"] <= 130 for line in steps)
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4]
    processor = read_json(finished / "model/processor_config.json")
    assert processor["semantic_rule"].items() >= {"squash": None, "min_pixels": 3136, "max_pixels": 3192}.items()
    assert (processor["view_width"], processor["views_prompt"]) == (28, "Reconstruct the 3D scene.")
    assert (finished / "checkpoints/step-00000002/tokenizer.json").is_file()
    assert (finished / "model/model.safetensors").is_file()
    assert "tokens_per_second" in (finished / "speed.jsonl").read_text()


def test_resumed_is_undisturbed(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    with caplog.at_level(logging.INFO):
        run(chat_run(resume="auto", workers=2), tmp_path / "run")
    assert "going on from" in caplog.text
    equal_runs(finished, tmp_path / "run", 4)


def test_unreadable_samples_are_named_and_counted(tmp_path: Path) -> None:
    some = Colours(hidden=frozenset({1, 2, 3}), broken=frozenset({5, 6, 7, 9}), num_samples=20)
    run(chat_run(6, validate_every=0, checkpoint_every=0), tmp_path / "some", some)
    told = [json.loads(line) for line in (tmp_path / "some/bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["scene"]: line["reason"] for line in told}
    assert {int(name.split("/")[1]) for name in reasons} <= {1, 2, 3, 5, 6, 7, 9}
    assert any("it is hidden" in reason for reason in reasons.values())
    assert any("it is broken" in reason for reason in reasons.values())
    with pytest.raises(TrainingAborted, match="could not be read"):
        run(chat_run(6), tmp_path / "all", Colours(broken=frozenset(range(40))))


def test_questions_and_their_loss_go_together() -> None:
    config = chat_run()
    with pytest.raises(InputError, match=r"objectives\.language without"):
        build_objectives(replace(config, data=RunConfig().data))
    with pytest.raises(InputError, match=r"data\.chat without"):
        build_objectives(replace(config, objectives=RunConfig().objectives))
