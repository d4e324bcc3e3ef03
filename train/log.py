"""What a run leaves to read: config.yaml, run.json, log.jsonl, speed.jsonl, bad_samples.jsonl; and console lines.

log.jsonl holds only what follows from config and seed, so that an interrupted and resumed run has the log of an
undisturbed one; times are in speed.jsonl.
"""

import json
import logging
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from g2vlm.errors import MissingExtra
from g2vlm.model.attention.health import SATURATED, AttentionHealth
from g2vlm.provenance import commit_of
from g2vlm.staging import write_errors
from train.config import RunConfig, plain, save_config
from train.engine import Engine
from train.step import StepResult

log = logging.getLogger(__name__)

SCHEMA = 1
PACKAGES = ("g2vlm", "torch", "transformers", "timm", "numpy", "safetensors")


class RunLog:
    """Writes the files of a run; does nothing on ranks other than 0.

    Args:
        folder: of the run.
        active: whether this is rank 0.
        done: steps of the checkpoint that the run goes on from; what the log says about later ones is removed.
        tensorboard: also write the numbers as TensorBoard events.

    Raises:
        MissingExtra: TensorBoard is wanted and not installed.
        ResourceError: the disk is full, here and whenever something is written.
        InputError: the folder cannot be written, here and later.
    """

    def __init__(self, folder: Path, active: bool = True, done: int = 0, tensorboard: bool = False):
        self.folder, self.active = folder, active
        self._named: set[str] = set()
        self._board = _board(folder, done) if tensorboard and active else None
        if active:
            for name in ("log.jsonl", "speed.jsonl", "bad_samples.jsonl"):
                with write_errors(folder / name):
                    _keep(folder / name, done)

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of log.jsonl."""
        self._append("log.jsonl", {"schema": SCHEMA, "kind": "step", "step": step, **values})
        self._plot("train", step, values)

    def validation(self, step: int, terms: Mapping[str, float]) -> None:
        """One line of log.jsonl and of the console."""
        self._append("log.jsonl", {"schema": SCHEMA, "kind": "validation", "step": step, **terms})
        self._plot("validation", step, terms)
        if self.active:
            log.info("validation at step %d: %s", step, _terms(terms))

    def attention(self, step: int, health: AttentionHealth) -> None:
        """One line of log.jsonl, with every layer; one of the console, with the largest logits of all layers."""
        largest = {pair: [layer.get(pair) for layer in health.largest_logits] for pair in health.largest}
        values = {"largest_logits": largest, "entropy": health.entropy, "uniform_entropy": health.uniform_entropy}
        self._append("log.jsonl", {"schema": SCHEMA, "kind": "attention", "step": step, **values})
        logits = {pair: value for pair, (value, _) in health.largest.items()}
        self._plot("attention", step, {**logits, "relative_entropy": health.relative_entropy})
        if not self.active:
            return
        told = "  ".join(f"{_short(pair)} {value:.1f}" for pair, value in logits.items())
        entropy = health.relative_entropy
        log.info("attention at step %d: largest logits %s; entropy %.2f of its maximum", step, told, entropy)
        for pair, (value, layer) in health.saturated.items():
            log.warning(
                "attention may be saturated: a logit of %s is %.1f in layer %d, above %.0f; if its entropy is low as "
                "well, little gradient passes there, and the experts' keys may need scales of their own",
                _short(pair), value, layer, SATURATED,
            )  # fmt: skip

    def speed(self, step: int, values: Mapping[str, float]) -> None:
        """One line of speed.jsonl."""
        self._append("speed.jsonl", {"schema": SCHEMA, "step": step, **values})

    def bad_sample(self, step: int, scene: str, reason: str) -> None:
        """One line of bad_samples.jsonl, and on the console the first time that the scene is met."""
        self._append("bad_samples.jsonl", {"schema": SCHEMA, "step": step, "scene": scene, "reason": reason})
        if self.active and scene not in self._named:
            self._named.add(scene)
            log.warning("passed over %s: %s", scene, reason.splitlines()[0])

    def _plot(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        if self.active:
            with write_errors(self.folder / name), (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise MissingExtra("TensorBoard is not installed", "", "pip install 'g2vlm[log]'") from None
    return SummaryWriter(folder / "tensorboard", purge_step=done + 1)


def _keep(file: Path, done: int) -> None:
    """Keep the lines up to a step, none of a run that starts anew; a line torn by a kill goes too."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if done else []
    kept = [line for line in lines if _step(line) <= done]
    shorter = file.with_suffix(".partial")
    shorter.write_text("".join(kept), encoding="utf-8")
    shorter.replace(file)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


@dataclass
class Console:
    """Prints a line per interval, with rates since the last line.

    Args:
        steps: length of the run.
        every: interval in steps.
        unit: of the work that a step does: views or tokens.
    """

    steps: int
    every: int
    unit: str = "views"
    waited: float = 0.0
    work: int = 0
    count: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, step: int, result: StepResult, rate: float, work: int, waited: float) -> dict[str, float] | None:
        """Take note of a step (1 is the first); at the end of an interval prints its line and returns its rates."""
        self.work, self.waited, self.count = self.work + work, self.waited + waited, self.count + 1
        if not self.every or (step % self.every and step != self.steps):
            return None
        now = time.perf_counter()
        seconds = now - self.since
        rates = {
            f"{self.unit}_per_second": self.work / seconds,
            "steps_per_second": self.count / seconds,
            "data_wait": self.waited / seconds,
            "peak_memory_gb": _peak_memory(),
        }
        counted = {name: value for name, value in result.terms.items() if result.counts[name]}
        log.info(
            "step %d/%d  loss %.4f  %s  lr %.1e  grad %.2f%s  %.1f %s/s  data %.0f%%  %.1f GB  eta %s",
            step, self.steps, result.loss, _terms(counted), rate, result.grad_norm,
            f"  {result.dropped}: dropped" if result.dropped else "", self.work / seconds, self.unit,
            100 * rates["data_wait"], rates["peak_memory_gb"], _duration((self.steps - step) * seconds / self.count),
        )  # fmt: skip
        self.waited, self.work, self.count, self.since = 0.0, 0, 0, now
        return rates


def _short(pair: str) -> str:
    """geometric_semantic -> geo>sem"""
    return ">".join(expert[:3] for expert in pair.split("_"))


def _terms(terms: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in terms.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def _peak_memory() -> float:
    """Of this process in GB: on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def write_run(folder: Path, config: RunConfig, command: Sequence[str], engine: Engine) -> None:
    """Make the folder, with config.yaml and run.json: everything that says what the run is.

    Raises:
        ResourceError: the disk is full.
        InputError: the folder cannot be written.
    """
    values = {
        "schema": SCHEMA,
        "command": list(command),
        "config": plain(config),
        "commit": commit_of(Path(__file__).resolve().parents[1]),
        "device": str(engine.device),
        "processes": engine.world,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "threads": torch.get_num_threads(),
    }
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        (folder / "run.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
