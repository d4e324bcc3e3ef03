"""Score reconstructions, or make them: `python eval/recon.py`, from any directory.

With no arguments the default model reconstructs the held-out rooms on the CPU. stdout holds the table, stderr the log;
exit codes are those of g2vlm.errors.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

if not __package__:  # started as `python eval/recon.py`: the root of the checkout takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLE = "python eval/recon.py --model runs/tiny --dataset seven_scenes --data 7scenes --views 8 --output out/7scenes"
DATASETS = ("rooms", "seven_scenes", "canonical", "images")


def build_parser() -> ArgumentParser:
    """Every flag."""
    parser = ArgumentParser(
        prog="eval/recon.py",
        description=f"Reconstruct scenes and score them beside baselines; tables and pictures.\n\nexample: {EXAMPLE}",
    )
    parser.add_argument("-m", "--model", help="model folder, hub id or preset; default: the demo weights")
    parser.add_argument("--dataset", default="rooms", choices=DATASETS, help="what --data holds; rooms needs no data")
    parser.add_argument("--data", type=Path, help="folder of the dataset")
    parser.add_argument(
        "--protocol", help="another than the dataset's first, e.g. 7scenes-pi3-518 (docs/evaluation.md)"
    )
    parser.add_argument("--views", type=int, help="use this many views a scene instead of the protocol's")
    parser.add_argument("--width", type=int, help="width of the views in pixels instead of the protocol's")
    parser.add_argument("--max-points", type=int, help="thin point clouds to this size, for quick looks")
    parser.add_argument("--limit", type=int, help="only the first N scenes")
    parser.add_argument("--no-baselines", action="store_true", help="score the model alone, in less than half the time")
    parser.add_argument("--save-predictions", action="store_true", help="keep each scene's prediction (safetensors)")
    parser.add_argument("--pictures", type=int, default=4, help="draw at most this many scenes")
    parser.add_argument("--gate", type=float, help="exit 1 unless AbsRel <= this share of the best constant depth's")
    parser.add_argument("-o", "--output", type=Path, help="empty folder for the results; default: a new one in runs/")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluation and return its exit code. Heavy imports come after the flags, so that `--help` is quick."""
    args = build_parser().parse_args(arguments)
    cli = import_module("g2vlm.cli")
    cli.log_to_stderr()
    return cli.guarded(lambda: cli.to_stdout(lambda: import_module("eval.commands").recon(args)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
