"""All that needs a CUDA device, in calls under nine minutes: tests, attention, precision, data, layer, chat,
training steps, recon.

`python -m benchmarks.gpu` runs the steps in order until its budget is used; the next call goes on where this one
stopped. A step is done when the output folder or benchmarks/results holds its complete result for these sources. No
network and no environment is needed: missing packages come from wheels in `.whl/`, installed into a temporary folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"
DEVICE = "cuda"
NO_DEVICE = 3
"""Exit code without a CUDA device."""


@dataclass(frozen=True)
class Step:
    """One process and the result it writes.

    Args:
        name: of the result.
        command: module and arguments after `python -m`.
        least: seconds that must be left to start it.
        takes_budget: it is told how many seconds it has.
    """

    name: str
    command: tuple[str, ...]
    least: int
    takes_budget: bool = False


STEPS = (
    Step("gpu_tests", ("benchmarks.gpu_tests",), 60),
    Step("attention", ("benchmarks.attention",), 30),
    Step("precision", ("benchmarks.precision",), 30),
    Step("data", ("benchmarks.data",), 30),
    Step("layer", ("benchmarks.layer",), 60),
    Step("generate", ("benchmarks.generate",), 60),
    Step("train_step", ("benchmarks.train_step",), 120),
    Step("recon_224", ("benchmarks.recon", "--sizes", "224", "--name", "recon_224"), 60, takes_budget=True),
    Step("recon_518", ("benchmarks.recon", "--sizes", "518", "--name", "recon_518"), 60, takes_budget=True),
)
MARGIN = 25
"""Seconds of a step for starting Python and writing its result."""


def missing_device() -> str | None:
    """Why nothing can run here; None if it can."""
    try:
        import torch
    except ImportError:
        return f"no CUDA device can be used: {sys.executable} has no torch"
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none; nothing was run"
    return None


def finished(folders: Iterable[Path]) -> set[str]:
    """Names of the steps whose complete result for these sources, from a CUDA device, lies in one of the folders."""
    from benchmarks.common import source_digest

    digest, names = source_digest(), set[str]()
    for path in (path for folder in folders for path in folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["complete"] and result["machine"]["device"] == DEVICE and result["code"]["sources"] == digest:
            names.add(result["benchmark"])
    return names


def install_wheels(target: Path) -> None:
    """Unpack `.whl/*.whl` into a folder, without a registry."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)


def run_step(step: Step, output: Path, site: Path, seconds: float) -> str:
    """Run one step; how it ended."""
    command = [sys.executable, "-m", *step.command, "--device", DEVICE, "--output", str(output)]
    if step.takes_budget:
        command += ["--budget-seconds", str(int(seconds - MARGIN))]
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return "stopped at the budget"
    return "done" if code == 0 else f"failed with exit code {code}"


def run_steps(output: Path, folders: list[Path], budget: float) -> dict[str, str]:
    """Run what is not finished while time is left; how every step stands."""
    deadline = time.monotonic() + budget
    done = finished(folders)
    states = {}
    with tempfile.TemporaryDirectory() as site:
        install_wheels(Path(site))
        for step in STEPS:
            left = deadline - time.monotonic()
            if step.name in done:
                states[step.name] = "done before"
            elif left < step.least + MARGIN:
                states[step.name] = "not run: the budget is used; call again"
            else:
                print(f"== {step.name}, {left:.0f} s left", flush=True)
                states[step.name] = run_step(step, output, Path(site), left)
    return states


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or list the steps; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--output", type=Path, default=default, help="default: $OUT, else benchmarks/results")
    parser.add_argument("--budget-seconds", type=float, default=520)
    parser.add_argument("--list", action="store_true", help="show the steps and which are done, run nothing")
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    folders = [output, ROOT / "benchmarks" / "results"]
    problem = None if args.list else missing_device()
    if problem:
        print(problem)
        return NO_DEVICE
    if args.list:
        done = finished(folders)
        states = {step.name: "done" if step.name in done else "to do" for step in STEPS}
    else:
        states = run_steps(output, folders, args.budget_seconds)
    print("\n".join(f"{name:10} {state}" for name, state in states.items()))
    return int(any("failed" in state for state in states.values()))


if __name__ == "__main__":
    raise SystemExit(main())
