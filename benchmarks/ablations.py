"""Train and score the stage-1 ablations of G2VLM Fig. 6 over several seeds: `python -m benchmarks.ablations`.

Every run is a folder NAME-SEED with `stage1`, the training, and `scores`, what eval/recon.py says about it. What is
finished is not done again, and an interrupted training goes on, so the command may be stopped and repeated. At the end
it writes `table.md`, mean and standard deviation over seeds, and `curves.png`, the validation losses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.charts import Series, line_chart
from g2vlm.data.rooms import heldout_v1

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "global": "configs/tiny_stage1.yaml",
    "mixed": "configs/ablations/attention_mixed.yaml",
    "frame": "configs/ablations/attention_frame.yaml",
    "single encoder": "configs/ablations/single_encoder.yaml",
}
"""Name in the table -> config; the first is the reference."""
COLOURS = ((38, 84, 160), (46, 140, 80), (222, 110, 40), (130, 70, 160))
METRICS = {
    "AbsRel": ("abs_rel", "{:.4f}"),
    "delta < 1.25": ("delta_1", "{:.3f}"),
    "rotation, median deg": ("rotation_median_deg", "{:.1f}"),
    "RRA @ 15 deg, %": ("rra_15", "{:.1f}"),
    "AUC @ 30 deg, %": ("auc_30", "{:.1f}"),
}
"""Column -> metric of `results.json` and how to print it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the table and the curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--limit", type=int, default=len(heldout_v1.REQUEST_SEEDS), help="held-out rooms to score")
    parser.add_argument("options", nargs="*", help="options of training, after --, such as -- --runtime.steps 3000")
    args = parser.parse_args(arguments)
    runs = [(name, seed) for seed in range(args.seeds) for name in CONFIGS]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(carry_out, args.output, *run, args.options, args.limit) for run in runs]
        for run in done:
            run.result()
    scores = {name: [read_scores(args.output, name, seed) for seed in range(args.seeds)] for name in CONFIGS}
    table = markdown(scores)
    (args.output / "table.md").write_text(f"{table}\n", encoding="utf-8")
    curves(args.output, args.seeds).save(args.output / "curves.png")
    print(f"{table}\n\n{args.output / 'table.md'}, {args.output / 'curves.png'}")


def run_folder(output: Path, name: str, seed: int) -> Path:
    """Where a run lies."""
    return output / f"{name.replace(' ', '_')}-{seed}"


def carry_out(output: Path, name: str, seed: int, options: Sequence[str], limit: int) -> None:
    """Train and score one run unless it is done; its messages go to `log.txt`."""
    folder = run_folder(output, name, seed)
    scores = folder / "scores"
    if (scores / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    training = ["-m", "train.run", "--config", CONFIGS[name], *options, "--runtime.seed", str(seed),
                "--runtime.output", str(folder.resolve() / "stage1"), "--runtime.resume", "auto"]  # fmt: skip
    scoring = ["eval/recon.py", "--model", str(folder.resolve() / "stage1/model"), "--output", str(scores.resolve()),
               "--pictures", "0", "--limit", str(limit)]  # fmt: skip
    for command in (training, scoring):
        print(f"{name}, seed {seed}: {' '.join(command)}", file=sys.stderr, flush=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            subprocess.run([sys.executable, *command], cwd=ROOT, env=one_thread(), stdout=log, stderr=log, check=True)


def one_thread() -> dict[str, str]:
    """The environment of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def read_scores(output: Path, name: str, seed: int) -> dict[str, Any]:
    """`results.json` of a run."""
    return json.loads((run_folder(output, name, seed) / "scores/results.json").read_text(encoding="utf-8"))


def markdown(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of every metric, and the baselines of the first run."""
    reference = next(iter(scores.values()))[0]
    rows = [["", *METRICS], ["---", *["---:"] * len(METRICS)]]
    rows += [[name, *(spread(runs, *METRICS[column]) for column in METRICS)] for name, runs in scores.items()]
    rows += [
        [f"({name})", *(number.format(values[key]) if key in values else "-" for key, number in METRICS.values())]
        for name, values in reference["baselines"].items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(runs: Sequence[Mapping[str, Any]], metric: str, number: str) -> str:
    """Mean +- standard deviation of a metric over runs."""
    values = [run["metrics"][metric] for run in runs]
    mean = number.format(statistics.mean(values))
    return f"{mean} +- {number.format(statistics.stdev(values))}" if len(values) > 1 else mean


def curves(output: Path, seeds: int) -> Image.Image:
    """The validation losses, mean over seeds, as a picture."""
    lines = []
    for name, colour in zip(CONFIGS, COLOURS, strict=True):
        runs = [validation_losses(run_folder(output, name, seed) / "stage1/log.jsonl") for seed in range(seeds)]
        lines.append(Series(name, np.mean(runs, axis=0), colour))
    return line_chart(f"validation loss, mean of {seeds} seeds", "step", lines)


def validation_losses(log: Path) -> np.ndarray:
    """(N, 2) step and validation loss of a training log."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return np.array([(entry["step"], entry["loss"]) for entry in entries if entry["kind"] == "validation"])


if __name__ == "__main__":
    main()
