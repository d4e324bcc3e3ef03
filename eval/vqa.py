"""Ask a model about scenes and score its replies: `python eval/vqa.py`, from any directory.

With no arguments the demo weights answer the held-out questions about rooms on the CPU. stdout holds the table, stderr
the log; exit codes are those of g2vlm.errors.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

if not __package__:  # started as `python eval/vqa.py`: the root of the checkout takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLE = "python eval/vqa.py --model runs/tiny_stage2/model --geometry shuffled --compare runs/vqa -o out/shuffled"


def build_parser() -> ArgumentParser:
    """Every flag."""
    parser = ArgumentParser(
        prog="eval/vqa.py",
        description=f"Ask about scenes and score the replies beside blind answers.\n\nexample: {EXAMPLE}",
    )
    parser.add_argument("-m", "--model", help="model folder, hub id or preset; default: the demo weights")
    parser.add_argument("--benchmark", default="rooms_qa", help="set of questions; rooms_qa needs no data")
    parser.add_argument(
        "--geometry", default="on", choices=["on", "off", "shuffled"],
        help="views for the geometry encoder: the scene's, none, or another scene's",
    )  # fmt: skip
    parser.add_argument("--images", default="shown", choices=["shown", "blank"], help="blank: both encoders see grey")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], help="folders of earlier runs, as further columns"
    )
    parser.add_argument("--gate", type=float, help="exit 1 unless macro is N points above the best blind baseline")
    parser.add_argument("--pictures", type=int, default=6, help="show at most this many questions with their views")
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
    return cli.guarded(lambda: cli.to_stdout(lambda: import_module("eval.vqa_commands").vqa(args)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
