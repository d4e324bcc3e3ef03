"""A run from config to trained model: build, resume, step, validate, save, stop."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from g2vlm.checkpoint import load_model
from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.data.types import SceneSource
from g2vlm.errors import InputError, Stopped, TrainingAborted
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.staging import staged_folder, write_errors
from g2vlm.weights import read_json
from train.changes import check_changes
from train.config import DataConfig, RunConfig, plain
from train.engine import Engine
from train.loader import LoadedBatch, StepDataset, batches
from train.log import Console, RunLog, write_run
from train.objectives.geometry import GeometryObjective, recon_batch_inputs
from train.objectives.report import Objective
from train.optim import build_optimizer, learning_rate, set_learning_rate
from train.pictures import save_picture
from train.sampler import Sampler
from train.state import STATE, Checkpoints, load_state, model_state, save_state, write_model
from train.step import Guard, Trainer
from train.trainable import checkpoint_activations, set_trainable

log = logging.getLogger(__name__)

VALIDATION_SEED = 1_000_003


def build_model(model: str | dict[str, Any], seed: int) -> G2VLMForConditionalGeneration:
    """The float32 model that a run starts from.

    Args:
        model: a preset, a checkpoint folder, or {preset: name, key: value, part: {key: value}}.
        seed: of random weights.

    Raises:
        InputError: unknown preset or config key.
        CheckpointError: the folder is unusable.
    """
    if isinstance(model, str):
        return load_model(model, dtype=torch.float32, seed=seed).train()
    config = preset_with(dict(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return G2VLMForConditionalGeneration(config).train()


def preset_with(overrides: dict[str, Any]) -> G2VLMConfig:
    """A preset with some of its values replaced, those of its parts one by one."""
    name = overrides.pop("preset", "tiny")
    if name not in PRESETS:
        raise InputError(f"no preset {name}", f"presets: {', '.join(PRESETS)}", "correct model.preset")
    preset = PRESETS[name]()
    try:
        values = {
            key: _part_with(key, getattr(preset, key), value) if isinstance(value, dict) else value
            for key, value in overrides.items()
        }
        return PRESETS[name](**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError("unusable model config", str(error), "see g2vlm/config.py for the keys of a model") from None


def _part_with(name: str, part: Any, overrides: dict[str, Any]) -> Any:
    for key, value in overrides.items():
        known = getattr(part, key)
        accepted = {float: (int, float), tuple: (list, tuple)}.get(type(known), type(known))
        if not isinstance(value, accepted) or isinstance(value, bool) != isinstance(known, bool):
            raise TypeError(f"{name}.{key} is {value!r}, and should be of the kind of {known!r}")
    return replace(part, **overrides)


def build_sampler(config: DataConfig, source: SceneSource, seed: int, model: G2VLMConfig) -> Sampler:
    """The sampler of a run; the single encoder needs sides that its patch merger divides."""
    patch = model.geometry_encoder.patch_size
    return Sampler(
        sources=(source,),
        seed=seed,
        views=config.views,
        width=config.width,
        aspect=config.aspect,
        images_per_step=config.images_per_step,
        scenes_multiple_of=config.scenes_multiple_of,
        side_multiple_of=patch * model.semantic_encoder.merge_size if model.encoders == "single" else patch,
    )


def train(
    config: RunConfig,
    engine: Engine,
    folder: Path,
    source: SceneSource,
    validation: SceneSource | None = None,
    command: Sequence[str] = (),
) -> None:
    """Carry out a run in a folder, from its newest checkpoint when `runtime.resume` says so.

    Args:
        config: of the run.
        engine: how it trains.
        folder: of the run; made if missing, left as it is when the run cannot start.
        source: of the training scenes.
        validation: of the validation scenes.
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
    """A run under way; `done` counts its finished steps."""

    config: RunConfig
    folder: Path
    model: G2VLMForConditionalGeneration
    trainer: Trainer
    data: StepDataset
    validation: StepDataset | None
    checkpoints: Checkpoints
    guard: Guard
    log: RunLog
    done: int = 0

    @classmethod
    def start(
        cls, config: RunConfig, engine: Engine, folder: Path, source: SceneSource, validation: SceneSource | None
    ) -> "Run":
        """Build everything; go on from the newest checkpoint when `runtime.resume` says so."""
        runtime = config.runtime
        torch.manual_seed(runtime.seed)
        model = build_model(config.model, runtime.seed)
        trained = set_trainable(model, config.trainable)
        if runtime.gradient_checkpointing:
            checkpoint_activations(model)
        trainer = Trainer(
            engine,
            engine.wrap(model),
            build_optimizer(model, trained, config.trainable, config.optim),
            build_objectives(config),
            config.optim.clip,
        )
        checkpoints, guard = Checkpoints(folder / "checkpoints", runtime.keep), Guard(config.guards)
        done = resume(checkpoints, config, trainer, model, guard) if runtime.resume == "auto" else 0
        sampler = build_sampler(config.data, source, runtime.seed, model.config)
        data = StepDataset(sampler, engine.rank, engine.world, config.data.color_augmentation)
        held_out = None
        if validation is not None:
            drawn = build_sampler(config.data, validation, VALIDATION_SEED, model.config)
            held_out = StepDataset(drawn, engine.rank, engine.world)
        return cls(config, folder, model, trainer, data, held_out, checkpoints, guard,
                   RunLog(folder, engine.rank == 0, done, runtime.tensorboard), done)  # fmt: skip

    def train(self, asked: threading.Event) -> None:
        """All remaining steps, then the finished model in `model/`."""
        runtime = self.config.runtime
        console = Console(runtime.steps, runtime.log_every)
        loaded = batches(self.data, range(self.done, runtime.steps), runtime.workers)
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
        batch = loaded.batch.to(self.trainer.engine.device)
        inputs = self._inputs(batch, self.data.sampler.coin(step))
        result = self.trainer.step(inputs, batch, spike, asked, len(loaded.bad))
        self.done += 1
        shape = self.data.sampler.shape(step)
        views = shape.num_scenes * shape.num_views
        self.log.step(self.done, {
            "loss": result.loss, **result.terms, "lr": rate, "grad_norm": result.grad_norm, "dropped": result.dropped,
            "scenes": shape.num_scenes, "views": shape.num_views, "size": list(shape.size),
        })  # fmt: skip
        if rates := console.add(self.done, result, rate, views, waited):
            self.log.speed(self.done, rates)
        self.guard.check_step(self.done, result.dropped)
        self.guard.check_scenes(shape.num_scenes + result.bad, result.bad)
        if self.validation is not None and (_due(self.done, runtime.validate_every) or self.done == runtime.steps):
            self.validate(self.validation)
        return result.stop

    def _inputs(self, batch: Any, coin: bool) -> dict[str, Any]:
        geometry = self.config.objectives.geometry
        return recon_batch_inputs(batch, self.model.config, coin, bool(geometry and geometry.global_points))

    def validate(self, data: StepDataset) -> None:
        """The same batches and picture every time, without augmentation, with global attention where it is mixed."""
        self.trainer.model.eval()
        results = []
        for step in range(self.config.runtime.validation_steps):
            batch = data[step].batch.to(self.trainer.engine.device)
            terms, output = self.trainer.evaluate(self._inputs(batch, False), batch)
            results.append(terms)
            if step == 0 and self.trainer.engine.rank == 0 and output.geometry:
                file = self.folder / "validation" / f"step-{self.done:08d}.png"
                with write_errors(file):
                    save_picture(output.geometry[0].to("cpu"), batch.to("cpu"), file)
        self.trainer.model.train()
        self.log.validation(self.done, {name: sum(r[name] for r in results) / len(results) for name in results[0]})

    def save(self) -> None:
        """A checkpoint of the steps done."""
        rest = {"guard": self.guard.state(), "config": plain(self.config)}
        save_state(self.checkpoints, self.done, self.trainer.engine, self.model, self.trainer.optimizer, rest)

    def export(self) -> None:
        """The model alone, in `model/`."""
        weights = model_state(self.trainer.engine, self.model)
        if self.trainer.engine.rank == 0:
            with staged_folder(self.folder / "model", overwrite=True) as staging:
                write_model(staging, weights, self.model)
            log.info("model in %s", self.folder / "model")


def build_objectives(config: RunConfig) -> list[Objective]:
    """The objectives that are on.

    Raises:
        InputError: none is.
    """
    if config.objectives.geometry is None:
        raise InputError("nothing to minimise", "every objective is null", "give objectives.geometry")
    return [GeometryObjective(config.objectives.geometry)]


def resume(
    checkpoints: Checkpoints,
    config: RunConfig,
    trainer: Trainer,
    model: G2VLMForConditionalGeneration,
    guard: Guard,
) -> int:
    """Load the newest checkpoint that verifies, naming what was refused; returns its step, 0 without any.

    Raises:
        InputError: the checkpoint was made with another config; nothing was changed.
    """
    engine = trainer.engine
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
        return 0
    state = load_state(checkpoints.path(found), engine, model, trainer.optimizer)
    guard.restore(state["guard"])
    log.info("going on from %s", checkpoints.path(found))
    return found


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
