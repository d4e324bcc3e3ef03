"""A run from config to trained model: build, resume, step, validate, save, stop."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from g2vlm.data.types import SceneSource
from g2vlm.errors import Stopped, TrainingAborted
from g2vlm.model.attention.health import watch_attention
from g2vlm.staging import staged_folder, write_errors
from g2vlm.supervision.base import Supervision
from g2vlm.supervision.saved import write_supervision
from g2vlm.weights import read_json
from train.assemble import Assembled, assemble
from train.changes import check_changes
from train.config import RunConfig, plain
from train.engine import Engine
from train.feed import VALIDATION_SEED, Feed
from train.loader import LoadedBatch
from train.log import Console, RunLog, write_run
from train.lora import split, write_adapters
from train.objectives.supervision import check_needs
from train.optim import learning_rate, set_learning_rate
from train.packing import ChatMixture
from train.pictures import save_picture
from train.state import STATE, Checkpoints, load_state, model_state, save_state
from train.step import Guard, Trainer
from train.student import Student
from train.tokens import check_clips

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    engine: Engine,
    folder: Path,
    source: SceneSource | ChatMixture,
    validation: SceneSource | ChatMixture | None = None,
    command: Sequence[str] = (),
) -> None:
    """Carry out a run in a folder, from its newest checkpoint when `runtime.resume` says so.

    Args:
        config: of the run.
        engine: how it trains.
        folder: of the run; made if missing, left as it is when the run cannot start.
        source: of the training scenes or questions.
        validation: of those of the validation.
        command: that started the run, for run.json.

    Raises:
        InputError: the config, or the checkpoint to go on from has another one.
        Stopped: SIGTERM or SIGINT came; the state is saved.
        TrainingAborted: a guard stopped the run; the state is saved.
    """
    with stop_signals() as asked:
        run = Run.start(config, engine, folder, source, validation)
        if engine.rank == 0:
            write_run(folder, config, command, engine)
        run.train(asked)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first SIGINT set; outside the main thread nothing sets it."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """A run under way; `done` counts its finished steps, and the data of the next one begin at `place`.

    `student` has the plain model, `heads` are the modules of geometric supervision by name, which train with it.
    """

    config: RunConfig
    folder: Path
    student: Student
    heads: nn.ModuleDict | None
    trainer: Trainer
    data: Feed
    validation: Feed | None
    checkpoints: Checkpoints
    guard: Guard
    log: RunLog
    done: int = 0
    place: int = 0

    @classmethod
    def start(
        cls,
        config: RunConfig,
        engine: Engine,
        folder: Path,
        source: SceneSource | ChatMixture,
        validation: SceneSource | ChatMixture | None,
    ) -> "Run":
        """Build everything; go on from the newest checkpoint when `runtime.resume` says so."""
        runtime = config.runtime
        torch.manual_seed(runtime.seed)
        parts = assemble(config, engine)
        student, supervision = parts.student, parts.supervision
        if supervision is not None and isinstance(source, ChatMixture):
            check_needs(source.sources, supervision, engine.device)
        tokens = student.tokens(config, engine.device)
        if tokens is not None and isinstance(source, ChatMixture):
            check_clips(source.sources, tokens, engine.device)
        checkpoints, guard = Checkpoints(folder / "checkpoints", runtime.keep), Guard(config.guards)
        data, held_out = student.feed(config, source, engine, runtime.seed, True, supervision, tokens), None
        if validation is not None:
            held_out = student.feed(config, validation, engine, VALIDATION_SEED, False, supervision, tokens)
        done, place = resume(checkpoints, config, parts, guard) if runtime.resume == "auto" else (0, 0)
        return cls(config, folder, student, parts.heads, parts.trainer, data, held_out, checkpoints, guard,
                   RunLog(folder, engine.rank == 0, done, runtime.tensorboard), done, place)  # fmt: skip

    def train(self, asked: threading.Event) -> None:
        """All remaining steps, then the finished model."""
        runtime = self.config.runtime
        if not self.done:
            self.measure_attention()
        console = Console(runtime.steps, runtime.log_every, self.data.unit)
        loaded = self.data.batches(range(self.done, runtime.steps), self.place, runtime.workers)
        while self.done < runtime.steps:
            before = time.perf_counter()
            batch = next(loaded)
            waited = time.perf_counter() - before
            try:
                stop = self._step(batch, console, waited, asked.is_set())
            except TrainingAborted:
                self.save()
                raise
            if stop and self.done < runtime.steps:
                self.save()
                raise Stopped(f"stopped after step {self.done} as asked", "the state is saved", "--runtime.resume auto")
            if _due(self.done, runtime.checkpoint_every) or self.done == runtime.steps:
                self.save()
        self.export()

    def _step(self, loaded: LoadedBatch, console: Console, waited: float, asked: bool) -> bool:
        """One step and what is written about it; returns whether to stop."""
        runtime, step = self.config.runtime, self.done
        for scene, reason in loaded.bad:
            self.log.bad_sample(step + 1, scene, reason)
        rate = learning_rate(step, runtime.steps, self.config.optim.lr, self.config.schedule)
        set_learning_rate(self.trainer.optimizer, rate)
        spike = self.config.guards.spike if step >= self.config.schedule.warmup else None
        batch = self.data.taught(loaded.batch.to(self.trainer.engine.device))
        seed_generators(runtime.seed, step, self.trainer.engine.rank)
        with self.given(self.data, batch):
            result = self.trainer.step(self.data.inputs(batch, step), batch, spike, asked, len(loaded.bad))
        self.done, self.place = step + 1, loaded.end
        self.log.step(self.done, {
            "loss": result.loss, **result.terms, "lr": rate, "grad_norm": result.grad_norm, "dropped": result.dropped,
            "counts": result.counts, **loaded.facts,
        })  # fmt: skip
        if rates := console.add(self.done, result, rate, loaded.work, waited):
            self.log.speed(self.done, rates)
        self.guard.check_step(self.done, result.dropped)
        self.guard.check_scenes(loaded.asked + result.bad, result.bad)
        if _due(self.done, runtime.validate_every) or self.done == runtime.steps:
            if self.validation is not None:
                self.validate(self.validation)
            self.measure_attention()
        return result.stop

    def given(self, data: Feed, batch: Any) -> AbstractContextManager[None]:
        """Around a forward: its images are fused with the tokens that the batch has, if any are given."""
        tokens = data.given(batch)
        return nullcontext() if tokens is None else self.student.model.given_frames.use(tokens)

    def validate(self, data: Feed) -> None:
        """The same batches and picture every time; each term's mean over the batches that have it."""
        self.trainer.model.eval()
        results: dict[str, list[float]] = {}
        for loaded in data.batches(range(self.config.runtime.validation_steps), 0, workers=0):
            batch = data.taught(loaded.batch.to(self.trainer.engine.device))
            with self.given(data, batch):
                terms, output = self.trainer.evaluate(data.inputs(batch, loaded.step), batch)
            for name, value in terms.items():
                results.setdefault(name, []).append(value)
            truth = data.scenes(batch)
            if loaded.step == 0 and self.trainer.engine.rank == 0 and output.geometry and truth is not None:
                file = self.folder / "validation" / f"step-{self.done:08d}.png"
                with write_errors(file):
                    save_picture(output.geometry[0].to("cpu"), truth.to("cpu"), file)
        self.trainer.model.train()
        self.log.validation(self.done, {name: sum(values) / len(values) for name, values in results.items()})

    @torch.no_grad()
    def measure_attention(self) -> None:
        """Logits and entropy of attention on the first batch of the validation, or of the training without one.

        Those of a stock model are not measured.
        """
        if self.student.watched is None:
            return
        data = self.data if self.validation is None else self.validation
        loaded = next(data.batches(range(1), 0, workers=0))
        self.trainer.model.eval()
        batch = data.taught(loaded.batch.to(self.trainer.engine.device))
        with watch_attention(self.student.watched) as health, self.given(data, batch):
            self.trainer.model(**data.inputs(batch, 0))
        self.trainer.model.train()
        self.log.attention(self.done, health)

    def save(self) -> None:
        """A checkpoint of the steps done."""
        rest = {"guard": self.guard.state(), "config": plain(self.config), "place": self.place}
        files, layout = self.data.write_files, self.student.files
        model, engine, optimizer = self.student.model, self.trainer.engine, self.trainer.optimizer
        save_state(self.checkpoints, self.done, engine, model, optimizer, rest, files, self.heads, layout)

    def export(self) -> None:
        """The model alone, in `model/`; what adapters it has, also in `adapter/`, and heads by name in `heads/`."""
        model = self.student.model
        weights, adapters = split(model, model_state(self.trainer.engine, model))
        if self.trainer.engine.rank == 0:
            with staged_folder(self.folder / "model", overwrite=True) as staging:
                self.student.files.write(staging, weights, model)
                self.data.write_files(staging)
            log.info("model in %s", self.folder / "model")
        if self.trainer.engine.rank == 0 and adapters:
            with staged_folder(self.folder / "adapter", overwrite=True) as staging:
                write_adapters(staging, model, adapters)
        self.export_heads()

    def export_heads(self) -> None:
        """What `g2vlm lift` and the probes of eval/ can use."""
        states = {name: model_state(self.trainer.engine, own) for name, own in (self.heads or {}).items()}
        if self.trainer.engine.rank == 0 and states:
            with staged_folder(self.folder / "heads", overwrite=True) as staging:
                for name, own in states.items():
                    write_supervision(staging, name, cast(Supervision, (self.heads or {})[name]), own)


def seed_generators(seed: int, step: int, rank: int) -> None:
    """What a step draws (dropout) follows from its number, so that no checkpoint holds a generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def resume(checkpoints: Checkpoints, config: RunConfig, parts: Assembled, guard: Guard) -> tuple[int, int]:
    """Load the newest checkpoint that verifies, naming what was refused; returns its step and where its data go on.

    Without any both are 0.

    Raises:
        InputError: the checkpoint was made with another config; nothing was changed.
    """
    trainer, engine = parts.trainer, parts.trainer.engine
    found, refused = checkpoints.newest()
    for reason in refused.values():
        log.warning("%s", reason)
    if found is not None:
        check_changes(checkpoints.path(found), read_json(checkpoints.path(found) / STATE)["config"], config)
    engine.barrier()
    if engine.rank == 0:
        for step in refused:
            checkpoints.set_aside(step)
    if found is None:
        log.info("no checkpoint in %s: starting anew", checkpoints.folder)
        return 0, 0
    student, path = parts.student, checkpoints.path(found)
    state = load_state(path, engine, student.model, trainer.optimizer, parts.heads, student.files)
    guard.restore(state["guard"])
    log.info("going on from %s", checkpoints.path(found))
    return found, state.get("place", found)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
