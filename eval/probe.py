"""How much of the depth of a scene a frozen model's layers hold: `python eval/probe.py`, from any directory.

With no arguments a probe is trained on the demo weights with rendered rooms, on the CPU. stdout holds the table, stderr
the log; exit codes are those of g2vlm.errors.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser

if not __package__:  # started as `python eval/probe.py`: the root of the checkout takes the place of this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

EXAMPLE = "python eval/probe.py --models runs/a/model runs/b/model runs/c/model --benchmark rooms_qa -o out/probe"


def build_parser() -> ArgumentParser:
    """Every flag."""
    parser = ArgumentParser(
        prog="eval/probe.py",
        description=f"Train a depth head on a frozen model's layers; table, charts, pictures.\n\nexample: {EXAMPLE}",
    )
    parser.add_argument(
        "-m", "--model", help="folder (ours or a stock Qwen-VL's), hub id or preset; default: demo weights"
    )
    parser.add_argument("--models", nargs="+", default=[], help="several instead: one table, and rank correlation")
    parser.add_argument(
        "--layers", type=int, nargs=4, help="numbered as hidden_states; default: at the depths of GeoVR"
    )
    parser.add_argument("--steps", type=int, default=300, help="of the probe's training")
    parser.add_argument("--rooms", type=int, default=256, help="training rooms")
    parser.add_argument("--channels", type=int, default=32, help="width of the head; 256: as published")
    parser.add_argument("--size", type=int, help="width of the views in pixels; default: as the model was trained")
    parser.add_argument(
        "--geometry", default="on", choices=["on", "off"], help="off: no views for the geometry encoder"
    )
    parser.add_argument("--benchmark", help="rooms_qa: probe the rooms of its questions, and ask them")
    parser.add_argument("--limit", type=int, help="score the first N rooms, or with --benchmark those of N questions")
    parser.add_argument(
        "--answers", type=Path, nargs="+", default=[], help="what eval/vqa.py wrote for each model, instead of asking"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave out the probes of grey and untrained")
    parser.add_argument("--pictures", type=int, default=4, help="draw at most this many rooms")
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
    return cli.guarded(lambda: cli.to_stdout(lambda: import_module("eval.probe_commands").run(args)), args.debug)


if __name__ == "__main__":
    sys.exit(main())
