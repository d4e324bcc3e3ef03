"""The training runs of `make quickstart`: what they left, told as a table and as charts."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.charts import Series, line_chart, running_mean
from eval.records import RUN, markdown_rows
from g2vlm.errors import CheckFailed, InputError

PALE, BLUE, ORANGE = (196, 210, 232), (38, 84, 160), (222, 110, 40)


@dataclass(frozen=True)
class Training:
    """What a training run left: `run.json`, and the lines of `log.jsonl` and `speed.jsonl`."""

    run: dict[str, Any]
    log: list[dict[str, Any]]
    speed: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Training":
        """Read the folder of a run."""
        return cls(read_json(folder / RUN), read_lines(folder / "log.jsonl"), read_lines(folder / "speed.jsonl"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of the log about steps."""
        return [line for line in self.log if line["kind"] == "step"]

    @property
    def seen(self) -> str:
        """What the model was trained on."""
        if self.run["config"]["data"]["chat"] is None:
            views = sum(line["scenes"] * line["views"] for line in self.steps)
            return f"{views:,} images, {self.run['config']['data']['width']} pixels wide"
        samples, images = (sum(line[name] for line in self.steps) for name in ("samples", "images"))
        return f"{samples:,} conversations about {images:,} images"

    @property
    def seconds(self) -> float:
        """Time of all steps, with data, validation and checkpoints; what was repeated after an interruption not."""
        ends = [line["step"] for line in self.speed]
        counts = np.diff([0, *ends])
        return float(sum(n / line["steps_per_second"] for n, line in zip(counts, self.speed, strict=True)))

    @property
    def time(self) -> str:
        """The same for people."""
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{minutes} min {seconds} s"

    def losses(self, kind: str) -> np.ndarray:
        """(N, 2) step and loss of the lines of a kind."""
        return np.array([(line["step"], line["loss"]) for line in self.log if line["kind"] == kind]).reshape(-1, 2)

    def require_finite(self, name: str) -> None:
        """Raise CheckFailed when the run made no step, or a loss of one is not finite."""
        losses = self.losses("step")
        bad = losses[~np.isfinite(losses[:, 1]), 0]
        if not len(losses):
            raise CheckFailed(f"{name} made no step", "its log has none", "")
        if len(bad):
            raise CheckFailed(f"{name} had losses that are not finite", f"first at step {bad[0]:.0f}", "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; errors as in `read`."""
    return read(path, json.loads)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with one JSON object a line; errors as in `read`."""
    return read(path, lambda text: [json.loads(line) for line in text.splitlines()])


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What a file holds.

    Raises:
        InputError: it is absent or damaged.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", str(error), "make quickstart writes all parts of the report") from None


def loss_chart(training: Training, title: str, held_out: str) -> Any:
    """Losses over the steps: of every step, their running mean, and on what is held out, which the legend names."""
    steps = training.losses("step")
    window = max(1, len(steps) // 40)
    return line_chart(
        title,
        "step",
        [
            Series("training, each step", steps, PALE, width=1),
            Series(f"training, mean of {window}", running_mean(steps, window), BLUE, width=2.5),
            Series(held_out, training.losses("validation"), ORANGE, dots=True),
        ],
    )


def facts(stages: Mapping[str, Training], date: str) -> str:
    """A table of what was run: a column for each stage, then what they share."""
    first = next(iter(stages.values())).run
    commit = first["commit"]
    changed = ", with changed files" if commit and commit["dirty"] else ""
    versions = {"python": first["python"], **first["versions"]}
    columns = [_facts(name.replace(" ", ""), training) for name, training in stages.items()]
    rows = [["", *stages], *([name, *(own[name] for own in columns)] for name in columns[0])]
    shared = [
        f"finished {date}",
        f"commit {commit['hash'][:12]}{changed}" if commit else "commit unknown: not a git checkout",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return f"{markdown_rows(rows, names=len(rows[0]))}\n\n{'; '.join(shared)}."


def _facts(folder: str, training: Training) -> dict[str, str]:
    run, config = training.run, training.run["config"]
    return {
        "command": f"`{shlex.join(run['command'])}`",
        "config": f"`{folder}/config.yaml` holds every value",
        "trained": ", ".join(f"{group}" for group, factor in config["trainable"].items() if factor),
        "steps": f"{len(training.steps):,}",
        "seen": training.seen,
        "time": f"{training.time} on {run['device']}, threads: {run['threads']}",
    }
