"""Whether a model's layers know which places in two views are the same: `python eval/correspondence.py`.

With no arguments the demo weights look at held-out rooms on the CPU. stdout holds the table, stderr the log; exit codes
are those of g2vlm.errors.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

if not __package__:  # started as `python eval/correspondence.py`: the root of the checkout takes this folder's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLE = "python eval/correspondence.py --model runs/tiny_stage2/model --clips 64 -o out/correspondence"
DATASETS = ("rooms", "seven_scenes", "canonical")


def build_parser() -> ArgumentParser:
    """Every flag."""
    parser = ArgumentParser(
        prog="eval/correspondence.py",
        description=f"Match points between views by a model's layers; table, charts, pictures.\n\nexample: {EXAMPLE}",
    )
    parser.add_argument(
        "-m", "--model", help="folder (ours or a stock Qwen-VL's), hub id or preset; default: demo weights"
    )
    parser.add_argument("--dataset", default="rooms", choices=DATASETS, help="what --data holds; rooms needs no data")
    parser.add_argument("--data", type=Path, help="folder of the dataset")
    parser.add_argument("--clips", type=int, default=32, help="views of so many scenes")
    parser.add_argument("--views", type=int, default=8, help="views of a clip; points are those of the first")
    parser.add_argument("--paths", type=int, default=16, help="walks of 25 frames; 0: none")
    parser.add_argument("--size", type=int, default=224, help="width of the views in pixels, a multiple of 28")
    parser.add_argument(
        "--geometry", default="on", choices=["on", "off"], help="off: no views for the geometry encoder"
    )
    parser.add_argument("--pictures", type=int, default=3, help="draw at most this many clips")
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
    return cli.guarded(
        lambda: cli.to_stdout(lambda: import_module("eval.correspondence_commands").run(args)), args.debug
    )


if __name__ == "__main__":
    sys.exit(main())
