"""Runs a small training in its own process: `python -m tests.train.worker FOLDER STEPS [slow]`."""

import logging
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from g2vlm.errors import G2VLMError
from tests.train.runs import mini_config
from tests.train.scenes import BoxRooms
from train.config import DataConfig, GuardConfig, RunConfig, RuntimeConfig, ScheduleConfig
from train.engine import engine
from train.loop import train


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
                "log_every": 1,
                "checkpoint_every": 2,
                "validate_every": 3,
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    try:
        run(replace(mini_run(int(sys.argv[2]), resume="auto", keep=100)), Path(sys.argv[1]))
    except G2VLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
