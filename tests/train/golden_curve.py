"""A recorded loss curve: the tiny preset learns from rendered rooms for a few steps.

    python -m tests.train.golden_curve        records it anew; do so after a change that is meant to change numbers

The same machine and versions give the same bits. Elsewhere the last bits differ: another torch or another processor
adds up in another order, and AdamW with its small eps carries that on from step to step.
"""

import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config import RunConfig, parse, plain
from train.engine import engine
from train.loop import train
from train.run import open_source

FILE = Path(__file__).with_suffix(".json")
STEPS = 8
TOLERANCE, NOISE = 3e-3, 1e-5
"""Largest relative difference on another platform, and the absolute one that is passed over. Measured with one torch
build held to AVX2 or to no vector instructions against AVX-512: losses and terms differ by up to 3e-4 after eight
steps, gradient norms by up to 7e-4, terms of a few pixels by more, of which NOISE takes care."""
CONFIG = (
    *("--runtime.steps", str(STEPS), "--runtime.device", "cpu", "--runtime.log_every", "0"),
    *("--runtime.checkpoint_every", "0", "--runtime.workers", "0", "--data.validation", "null"),
    *("--data.width", "42", "--data.images_per_step", "4", "--data.views", "[2, 3]", "--schedule.warmup", "4"),
)


def config() -> RunConfig:
    """configs/tiny_stage1.yaml with small batches."""
    return parse(CONFIG)[0]


def curve() -> list[dict[str, float]]:
    """Loss, terms and gradient norm of every step of the run, with one thread."""
    with one_thread(), tempfile.TemporaryDirectory() as folder, engine("ddp", "cpu") as alone:
        asked = config()
        train(asked, alone, Path(folder), open_source(asked.data.source))
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    return [{name: value for name, value in line.items() if isinstance(value, float)} for line in steps]


@contextmanager
def one_thread() -> Iterator[None]:
    """More threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fingerprint() -> dict[str, Any]:
    """What the last bits of a curve depend on, besides the code."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "threads": 1,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def record() -> None:
    """Write the file."""
    # through JSON, which writes floats so that they are read back exactly
    content = {"fingerprint": fingerprint(), "config": plain(config()), "steps": curve()}
    FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
