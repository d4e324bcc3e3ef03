"""Two gloo processes against one: the joined batch's loss and gradients, and agreement about bad batches."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from g2vlm.errors import G2VLMError, TrainingAborted
from g2vlm.weights import read_json
from tests.train.gradients import kept_gradients
from tests.train.runs import mini_batch, mini_trainer, train_on
from tests.train.scenes import BoxRooms
from tests.train.worker import mini_run
from train import assemble, loop
from train import engine as engines
from train.config import GeometryConfig, GuardConfig
from train.objectives.geometry import GeometryObjective
from train.optim import set_learning_rate
from train.state import (
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoints,
    load_state,
    model_state,
    optimizer_state,
    save_state,
    verify,
)

pytestmark = pytest.mark.xdist_group("test_ranks")  # what the two processes report is made once

WORLD = 2
STEPS = 2
ENGINES = ("ddp", "fsdp2")


def gradients(trainer: Any, model: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Gradients of one step, before clipping; nothing is changed."""
    with kept_gradients(trainer, model) as kept:
        train_on(trainer, model, [batch])
    return kept


def run(trainer: Any, model: Any, rank: int, world: int) -> dict[str, Any]:
    """What a process reports: gradients, then losses of a few steps, then the weights."""
    grads = gradients(trainer, model, mini_batch(0, rank, world))
    results = train_on(trainer, model, [mini_batch(step, rank, world) for step in range(STEPS)])
    weights = {name: trainer.engine.whole(parameter) for name, parameter in model.named_parameters()}
    return {"gradients": grads, "losses": [result.loss for result in results], "weights": weights}


class PoisonedGradient(GeometryObjective):
    """The geometry loss with a gradient that is not a number."""

    def __init__(self) -> None:
        super().__init__(GeometryConfig())

    def __call__(self, output: Any, batch: Any) -> Any:
        output.geometry[0].local_points.register_hook(lambda gradient: gradient * torch.nan)
        return super().__call__(output, batch)


def on_bad_batches(trainer: Any, model: Any, rank: int) -> dict[str, Any]:
    """Only one rank is bad, or wants to stop; and ranks with different view counts."""
    batch = mini_batch(0, rank, WORLD)
    if rank == 1:
        batch.depth[0, 0, 3, 3] = torch.nan
    (nan,) = train_on(trainer, model, [batch])
    good = trainer.objectives
    if rank == 0:
        trainer.objectives = [PoisonedGradient()]
    (gradient,) = train_on(trainer, model, [mini_batch(0, rank, WORLD)])
    trainer.objectives = good
    (stop,) = train_on(trainer, model, [mini_batch(0, rank, WORLD)], stop=rank == 1)
    (uneven,) = train_on(trainer, model, [mini_batch(0, rank, WORLD, views=(2 + rank, 2 + rank))])
    return {"dropped": [nan.dropped, gradient.dropped, uneven.dropped], "stop": stop.stop, "loss": uneven.loss}


def saved_and_resumed(engine: Any, trainer: Any, model: Any, folder: Path) -> list[float]:
    """The losses of a step after resuming from a checkpoint, and of the same step without."""
    checkpoints = Checkpoints(folder)
    save_state(checkpoints, 7, engine, model, trainer.optimizer, {"guard": 1})
    verify(checkpoints.path(7))
    other, twin = mini_trainer(engine, lr=1e-2)
    train_on(other, twin, [mini_batch(3, engine.rank, WORLD)])
    assert load_state(checkpoints.path(7), engine, twin, other.optimizer)["guard"] == 1
    steps = [mini_batch(step, engine.rank, WORLD) for step in (4, 5)]
    set_learning_rate(other.optimizer, 1e-3)
    return [train_on(*pair, steps)[1].loss for pair in ((other, twin), (trainer, model))]


POISON = {2: ("loss", 1), 4: ("gradient", 0), 6: ("sample", 1), 8: ("loss", 0), 9: ("gradient", 1), 10: ("sample", 0)}
"""Step -> what is not a number in it, and on which rank."""


class PoisonedRun(GeometryObjective):
    """The geometry loss of a run, with POISON."""

    def __init__(self, rank: int):
        super().__init__(GeometryConfig())
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "step", 0)

    def __call__(self, output: Any, batch: Any) -> Any:
        object.__setattr__(self, "step", self.step + 1)
        kind, rank = POISON.get(self.step, ("", -1))
        if rank != self.rank:
            return super().__call__(output, batch)
        if kind == "sample":
            batch.depth[0, 0, 3, 3] = torch.nan
        if kind == "gradient":
            output.geometry[0].local_points.register_hook(lambda gradient: gradient * torch.nan)
        report = super().__call__(output, batch)
        if kind == "loss":
            report["points"] = replace(report["points"], value=report["points"].value * torch.nan)
        return report


def poisoned_run(rank: int, folder: Path) -> dict[str, Any]:
    """How a run with POISON ends on a rank; it saves before the last three steps, and when it stops."""
    config = mini_run(20, checkpoint_every=7, validate_every=0, keep=9)
    config = replace(
        config,
        data=replace(config.data, scenes_multiple_of=WORLD),
        guards=GuardConfig(spike=1000, max_dropped_in_a_row=2),
    )
    assemble.build_objectives = lambda config: [PoisonedRun(rank)]
    with engines.engine("ddp", "cpu") as engine:
        try:
            loop.train(config, engine, folder, BoxRooms())
        except G2VLMError as error:
            return {"code": error.code, "told": str(error)}
    return {"code": 0, "told": ""}


def logged_run(engine: Any, folder: Path) -> None:
    """A run of two steps with a validation and a checkpoint."""
    config = mini_run(2)
    loop.train(
        replace(config, data=replace(config.data, scenes_multiple_of=WORLD)),
        engine, folder, BoxRooms(), BoxRooms(num_scenes=2),
    )  # fmt: skip


def process(rank: int, ports: dict[str, int], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    for name, port in ports.items():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (folder / name).mkdir(exist_ok=True)
        if name == "guard":
            torch.save(poisoned_run(rank, folder / name / "run"), folder / name / f"{rank}.pt")
        else:
            train_with(name, rank, folder / name)


def train_with(name: str, rank: int, folder: Path) -> None:
    with engines.engine(name, "cpu") as engine:
        trainer, model = mini_trainer(engine)
        report = run(trainer, model, rank, WORLD)
        report["resumed"] = saved_and_resumed(engine, trainer, model, folder / "checkpoints")
        trainer, model = mini_trainer(engine)
        report |= on_bad_batches(trainer, model, rank)
        logged_run(engine, folder / "run")
        state = trainer.optimizer.state
        report["sharded"] = any(isinstance(p, DTensor) for p in state)
        torch.save(report, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that try the engines, and a run that is stopped, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = {name: free_port() for name in (*ENGINES, "guard")}
    spawned: Any = mp.spawn(process, (ports, folder), nprocs=WORLD, join=False)
    while not spawned.join(timeout=60):
        pass
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank reports, for every engine and for the stopped run."""
    return {
        name: [torch.load(folder / name / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for name in (*ENGINES, "guard")
    }


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_are_one(name: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    alone, joined = run(*mini_trainer(), 0, 1), reports[name]
    for report in joined:
        assert report["sharded"] == (name == "fsdp2")
        assert report["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert report["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5)
        assert report["gradients"].keys() == alone["gradients"].keys()
        for key, gradient in alone["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(report["gradients"][key], gradient, rtol=0, atol=max(1e-5 * scale, 1e-5))
        assert report["dropped"] == ["nonfinite", "nonfinite", None]
        assert report["stop"]
        assert report["resumed"][0] == report["resumed"][1]
    assert joined[0]["loss"] == joined[1]["loss"]
    for key in joined[0]["weights"]:
        assert torch.equal(joined[0]["weights"][key], joined[1]["weights"][key]), key


def test_attention_is_logged_once_and_alike(folder: Path, reports: dict[str, Any], tmp_path: Path) -> None:
    """By rank 0, about its own batch, which is one of two scenes."""
    with engines.engine("ddp", "cpu") as alone:
        logged_run(alone, tmp_path)
    logs = [
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        for place in (tmp_path, *(folder / name / "run" for name in ENGINES))
    ]
    for log in logs:
        assert [(line["kind"], line["step"]) for line in log] == [
            ("attention", 0), ("step", 1), ("step", 2), ("validation", 2), ("attention", 2),
        ]  # fmt: skip
    whole, *halves = ([line for line in log if line["kind"] == "attention"] for log in logs)
    for one, other, both in zip(*halves, whole, strict=True):
        assert one["entropy"] == pytest.approx(other["entropy"], rel=1e-4)
        for pair, values in both["largest_logits"].items():
            assert one["largest_logits"][pair] == pytest.approx(other["largest_logits"][pair], rel=1e-4)
            assert all(a <= b * 1.0001 for a, b in zip(one["largest_logits"][pair], values, strict=True))


def test_bad_numbers_are_skipped_on_all_ranks_and_end_the_run(folder: Path, reports: dict[str, Any]) -> None:
    """In a loss, a gradient or a sample, of either rank."""
    for report in reports["guard"]:
        assert report["code"] == TrainingAborted.code == 6
        assert "training stopped at step 10: 6 of the last 10 steps were dropped, 3 in a row" in report["told"]
    log = [json.loads(line) for line in (folder / "guard/run/log.jsonl").read_text().splitlines()]
    assert {line["step"]: line["dropped"] for line in log if line["kind"] == "step"} == {
        step: "nonfinite" if step in POISON else None for step in range(1, 11)
    }
    checkpoints = Checkpoints(folder / "guard/run/checkpoints")
    assert checkpoints.newest() == (10, {})
    assert read_json(checkpoints.path(10) / STATE)["guard"]["dropped"] == 6
    for name in (MODEL, OPTIMIZER):  # the last three steps changed nothing
        assert (checkpoints.path(10) / name).read_bytes() == (checkpoints.path(7) / name).read_bytes(), name


def test_sharded_checkpoints_fit_one_process(tmp_path: Path) -> None:
    """Without torchrun: a group of one; its checkpoint is that of a single process."""
    batches = [mini_batch(step) for step in range(3)]
    with engines.engine("fsdp2", "cpu") as engine:
        trainer, model = mini_trainer(engine)
        train_on(trainer, model, batches[:2])
        save_state(Checkpoints(tmp_path), 2, engine, model, trainer.optimizer, {})
        weights, moments = model_state(engine, model), optimizer_state(engine, model, trainer.optimizer)
        (expected,) = train_on(trainer, model, batches[2:])
    alone, plain = mini_trainer()
    load_state(Checkpoints(tmp_path).path(2), alone.engine, plain, alone.optimizer)
    for name, tensor in model_state(alone.engine, plain).items():
        assert torch.equal(tensor, weights[name]), name
    for name, tensor in optimizer_state(alone.engine, plain, alone.optimizer).items():
        assert torch.equal(tensor, moments[name]), name
    assert train_on(alone, plain, batches[2:])[0].loss == pytest.approx(expected.loss, rel=1e-5)
