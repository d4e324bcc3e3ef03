"""A small training run, in this process or in one of its own that may be killed."""

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from g2vlm.errors import G2VLMError
from tests.train.runs import mini_config
from tests.train.scenes import BoxRooms
from train.config import DataConfig, GuardConfig, RunConfig, RuntimeConfig, ScheduleConfig
from train.engine import engine
from train.loop import train
from train.state import Checkpoints

VALIDATE_EVERY = 3


def mini_run(steps: int = 6, **runtime) -> RunConfig:
    """A few steps of the smallest model, checkpoints every second step."""
    parts = ("decoder", "geometry_encoder", "semantic_encoder", "heads")
    return RunConfig(
        model={"preset": "tiny", **{part: asdict(getattr(mini_config(), part)) for part in parts}},
        data=DataConfig(views=(2, 3), width=28, images_per_step=4, color_augmentation=True),
        schedule=ScheduleConfig(warmup=2),
        guards=GuardConfig(spike=1000),
        runtime=RuntimeConfig(
            **{
                "steps": steps,
                "workers": 0,
                "log_every": 1,
                "checkpoint_every": 2,
                "validate_every": VALIDATE_EVERY,
                "validation_steps": 1,
                **runtime,
            }
        ),
    )


def run(config: RunConfig, folder: Path, **source) -> None:
    """Train in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with engine("ddp", "cpu") as one:
        train(config, one, folder, BoxRooms(**source), BoxRooms(num_scenes=1))


# ---- in its own process ---------------------------------------------------------------------------------------------

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
SAVING = ".step-"
"""In the path of everything that is written before a checkpoint appears, and of what is removed after it."""


@dataclass(frozen=True)
class Death:
    """The process kills itself right before the `operation`th operation on a file whose path has `word` in it."""

    operation: int
    word: str = SAVING


def start(folder: Path, steps: int, death: Death | None = None) -> BaseProcess:
    """Train in a new process, going on from the newest checkpoint; a failure exits with its code.

    The process is forked from a server that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_train, args=(folder, steps, death))
    process.start()
    return process


def told(folder: Path) -> str:
    """What the processes of a run wrote to stderr."""
    return folder.with_suffix(".stderr").read_text()


def _train(folder: Path, steps: int, death: Death | None) -> None:
    torch.set_num_threads(1)
    sys.stderr = folder.with_suffix(".stderr").open("a", buffering=1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if death is not None:
        _die(death)
    try:
        run(mini_run(steps, resume="auto", keep=100), folder)
    except G2VLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)


def _die(death: Death) -> None:
    left = death.operation

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in FILE_EVENTS and any(death.word in str(argument) for argument in arguments[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)


def wait_for_steps(folder: Path, process: BaseProcess, steps: int, old_log: int | None = None) -> None:
    """Return when the log of the process has this many lines; `old_log` is the inode of the log before it started."""
    log = folder / "log.jsonl"
    while process.is_alive() and not (inode(log) not in (None, old_log) and log.read_bytes().count(b"\n") >= steps):
        time.sleep(0.002)


def inode(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None


def kill_at_random(folder: Path, steps: int, moments: random.Random) -> None:
    """Go on with a run and kill it three to five steps later, at any moment of a step."""
    before, done = inode(folder / "log.jsonl"), max(Checkpoints(folder / "checkpoints").steps(), default=0)
    process = start(folder, steps)
    lines = 1 + done + 2 * sum(step % VALIDATE_EVERY == 0 for step in range(1, done + 1))  # with those about attention
    wait_for_steps(folder, process, lines + moments.randint(3, 5), before)
    time.sleep(moments.random() * 0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, told(folder)


def kill_while_saving(folder: Path, steps: int, operation: int) -> None:
    """Go on with a run and kill it before a file operation of its next save."""
    process = start(folder, steps, Death(operation))
    process.join()
    assert process.exitcode == -signal.SIGKILL, told(folder)


def finish(folder: Path, steps: int) -> None:
    """Go on with a run to its end."""
    process = start(folder, steps)
    process.join()
    assert process.exitcode == 0, told(folder)
