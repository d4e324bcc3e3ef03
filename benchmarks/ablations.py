"""Train and score what a write-up compares, over several seeds: `python -m benchmarks.ablations stage1`.

Every run is a folder NAME-SEED with `training` and a folder for each score. What is finished is not done again, an
interrupted training goes on, and interrupted scoring starts anew, so the command may be stopped and repeated. At the
end it writes `table.md`, mean and standard deviation over seeds, and `curves.png`, the validation losses.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.experiments import EXPERIMENTS, Column, Experiment
from eval.charts import Series, line_chart

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ((38, 84, 160), (46, 140, 80), (222, 110, 40), (130, 70, 160), (120, 120, 120), (200, 40, 60))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table and the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("experiment", choices=[*EXPERIMENTS])
    parser.add_argument("--output", type=Path, help="default: runs/ablations/EXPERIMENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--limit", type=int, help="only so many held-out rooms, and questions, to score")
    parser.add_argument("options", nargs="*", help="options of training, after --, such as -- --runtime.steps 3000")
    args = parser.parse_intermixed_args(arguments)
    experiment, output = EXPERIMENTS[args.experiment], args.output or Path("runs/ablations") / args.experiment
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    runs = [(name, seed) for seed in range(args.seeds) for name in experiment.configs]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(carry_out, experiment, output, *run, args.options, limit) for run in runs]
        for run in done:
            run.result()
    table = markdown(experiment, output, args.seeds)
    (output / "table.md").write_text(f"{table}\n", encoding="utf-8")
    curves(experiment, output, args.seeds).save(output / "curves.png")
    print(f"{table}\n\n{output / 'table.md'}, {output / 'curves.png'}")


def run_folder(output: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return output / f"{name.replace(' ', '_')}-{seed}"


def carry_out(
    experiment: Experiment, output: Path, name: str, seed: int, options: Sequence[str], limit: Sequence[str]
) -> None:
    """Train and score one run as far as that is not done; its messages go to `log.txt`."""
    folder = run_folder(output, name, seed).resolve()
    training, commands = folder / "training", []
    if not (training / "model").exists():
        files = [part for file in experiment.configs[name] for part in ("--config", file)]
        commands = [["-m", "train.run", *files, *options, "--runtime.seed", str(seed),
                     "--runtime.output", str(training), "--runtime.resume", "auto"]]  # fmt: skip
    for score, command in experiment.scores.items():
        if not (folder / score / "results.json").exists():
            shutil.rmtree(folder / score, ignore_errors=True)
            commands.append([*command, "--model", str(training / "model"), "--output", str(folder / score), *limit])
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands:
        print(f"{name}, seed {seed}: {' '.join(command)}", file=sys.stderr, flush=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run([sys.executable, *command], cwd=ROOT, env=one_thread(), stdout=log, stderr=log, check=True)


def one_thread() -> dict[str, str]:
    """The environment of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def read_scores(run: Path, folder: str) -> dict[str, Any]:
    """`results.json` of a run."""
    return json.loads((run / folder / "results.json").read_text(encoding="utf-8"))


def markdown(experiment: Experiment, output: Path, seeds: int) -> str:
    """Mean and standard deviation over seeds of every metric, and the baselines of the first run."""
    columns, first = experiment.columns, run_folder(output, next(iter(experiment.configs)), 0)
    rows = [["", *columns], ["---", *["---:"] * len(columns)]]
    for name in experiment.configs:
        runs = [run_folder(output, name, seed) for seed in range(seeds)]
        rows.append([name, *(spread(runs, column) for column in columns.values())])
    baselines = {folder: read_scores(first, folder)["baselines"] for folder in experiment.scores}
    for name in dict.fromkeys(name for known in baselines.values() for name in known):
        values = [cell(baselines[column.folder].get(name, {}), column) for column in columns.values()]
        rows.append([f"({name})", *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(metrics: Mapping[str, float], column: Column) -> str:
    """A metric, or a dash where it is unknown."""
    return column.number.format(metrics[column.metric]) if column.metric in metrics else "-"


def spread(runs: Sequence[Path], column: Column) -> str:
    """Mean +- standard deviation of a metric over runs."""
    values = [read_scores(run, column.folder)["metrics"][column.metric] for run in runs]
    mean = column.number.format(statistics.mean(values))
    return f"{mean} +- {column.number.format(statistics.stdev(values))}" if len(values) > 1 else mean


def curves(experiment: Experiment, output: Path, seeds: int) -> Image.Image:
    """The validation losses, mean over seeds, as a picture."""
    lines = []
    for name, colour in zip(experiment.configs, COLOURS[: len(experiment.configs)], strict=True):
        logs = [run_folder(output, name, seed) / "training/log.jsonl" for seed in range(seeds)]
        runs = [validation_losses(log, experiment.curve) for log in logs]
        lines.append(Series(name, np.mean(runs, axis=0), colour))
    return line_chart(f"validation: {experiment.curve}, mean of {seeds} seeds", "step", lines)


def validation_losses(log: Path, term: str = "loss") -> np.ndarray:
    """(N, 2) step and a term of the validation, by default their sum, from a training log."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return np.array([(entry["step"], entry[term]) for entry in entries if entry["kind"] == "validation"])


if __name__ == "__main__":
    main()
