"""The `g2vlm` command. Heavy imports happen inside the commands, so that `--help` answers at once.

stdout holds the result, stderr the log. Exit codes are those of g2vlm.errors.
"""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from g2vlm.errors import G2VLMError

MODULES = {"ask": "g2vlm.chat_commands", "chat": "g2vlm.chat_commands", "lift": "g2vlm.lift_commands"}
"""Where commands are that are not in g2vlm.commands."""
FORMATS = ("scene", "ply", "glb", "depth", "cameras", "preview")


def build_parser() -> ArgumentParser:
    """Every command and flag."""
    parser = ArgumentParser(prog="g2vlm", description="Geometry-grounded vision-language models.")
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("recon", _recon_parser(), help="photos of one scene -> points, depth, normals, cameras")
    commands.add_subcommand("ask", _ask_parser(), help="questions about photos -> answers")
    commands.add_subcommand("chat", _chat_parser(), help="a conversation about photos")
    commands.add_subcommand("lift", _lift_parser(), help="points, depth and cameras out of a VLM's hidden states")
    commands.add_subcommand("convert", _convert_parser(), help="checkpoints between the released layout and ours")
    commands.add_subcommand("info", _info_parser(), help="what a model or a reconstruction holds")
    data = ArgumentParser(description="Check data sets and look at them.")
    commands.add_subcommand("data", data, help="check data sets, look at them")
    _add_data_actions(data)
    commands.add_subcommand("doctor", _doctor_parser(), help="versions, devices, optional parts, self-test")
    return parser


def _parser(description: str, example: str) -> ArgumentParser:
    parser = ArgumentParser(description=f"{description}\n\nexample: {example}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _recon_parser() -> ArgumentParser:
    parser = _parser("Reconstruct one scene from photographs.", "g2vlm recon photos/ -o out/room --model models/g2vlm")
    parser.add_argument("images", nargs="+", help="folders, files or glob patterns; folders in natural order")
    parser.add_argument("-m", "--model", help="model folder, hub id or preset; default: the demo weights")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--width", type=int, help="width in pixels that views are brought to; default: the model's")
    parser.add_argument("--max-views", type=int, help="use at most this many views, evenly chosen")
    parser.add_argument("--skip-bad", action="store_true", help="continue without unreadable images")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--dry-run", action="store_true", help="check the input, say what would be done, stop")
    _add_device(parser)
    return parser


def _ask_parser() -> ArgumentParser:
    parser = _parser("Answer questions about photographs.", 'g2vlm ask photos/ -q "How many chairs are in this room?"')
    parser.add_argument("images", nargs="+", help="folders, files or glob patterns; folders in natural order")
    parser.add_argument("-q", "--question", action="append", type=str, help="may be given several times")
    parser.add_argument("--stdin", action="store_true", help="read one question per line, as text or JSON")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer")
    parser.add_argument("--save-geometry", type=Path, help="folder for the points and cameras of the same pass")
    parser.add_argument("--overwrite", action="store_true", help="save geometry into a folder that is not empty")
    parser.add_argument("--batch-size", type=int, default=8, help="questions that are answered together")
    _add_answering(parser)
    return parser


def _chat_parser() -> ArgumentParser:
    parser = _parser("Talk about photographs; /help lists what else can be typed.", "g2vlm chat photos/")
    parser.add_argument("images", nargs="*", default=[], help="folders, files or glob patterns")
    _add_answering(parser)
    return parser


def _add_answering(parser: ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="model folder, hub id or preset; default: the demo weights")
    parser.add_argument("--geometry", choices=["on", "off"], default="on", help="off: the semantic expert alone")
    parser.add_argument("--width", type=int, help="width in pixels that views are brought to; default: the model's")
    parser.add_argument("--max-views", type=int, help="use at most this many images, evenly chosen")
    parser.add_argument("--skip-bad", action="store_true", help="continue without unreadable images")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="an answer ends after this many tokens")
    parser.add_argument("--max-context", type=int, default=32_768, help="images, questions and answers, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer; above: random ones")
    parser.add_argument("--seed", type=int, default=0, help="of random answers")
    _add_device(parser)


def _lift_parser() -> ArgumentParser:
    parser = _parser(
        "Show what a model knows of a scene: heads that supervised it in training read its hidden states.",
        "g2vlm lift photos/ -m runs/tiny_spatialsv/model --heads runs/tiny_spatialsv/heads/spatialsv -o out/lift",
    )
    parser.add_argument("images", nargs="+", help="folders, files or glob patterns; folders in natural order")
    parser.add_argument("-m", "--model", help="model folder, hub id or preset; default: the demo weights")
    parser.add_argument("--heads", required=True, type=Path, help="FOLDER/NAME of the saved heads")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--from", help="depth or points; default: depth if the heads can place it, else points")
    parser.add_argument("--geometry", choices=["on", "off"], default="off", help="on: the geometric expert looks, too")
    parser.add_argument("--width", type=int, help="width in pixels of what the geometric expert sees")
    parser.add_argument("--max-views", type=int, help="use at most this many images, evenly chosen")
    parser.add_argument("--skip-bad", action="store_true", help="continue without unreadable images")
    parser.add_argument("--max-context", type=int, default=32_768, help="images and prompt, in tokens")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    _add_device(parser)
    return parser


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the first GPU, else the CPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")


def _convert_parser() -> ArgumentParser:
    parser = _parser(
        "Convert a checkpoint: released layout <-> ours, or a stock Qwen-VL or text model -> an initial checkpoint.",
        "g2vlm convert G2VLM-2B-MoT models/g2vlm --check",
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, or a GGUF file")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--check", action="store_true", help="convert back and compare every tensor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="storage precision; default: as in the source")
    parser.add_argument("--geometry-encoder", type=Path, help="DINOv2 weights for an initial checkpoint")
    parser.add_argument("--preset", help="decides what the sources leave open; default: paper_2b, for text models smol")
    parser.add_argument("--dinov2", type=Path, help="public DINOv2 weights to compare the checkpoint's with")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    return parser


def _info_parser() -> ArgumentParser:
    parser = _parser("Describe a model folder, a preset, or a reconstruction.", "g2vlm info paper_2b")
    parser.add_argument("target", nargs="?", help="model or preset (default: demo weights), or what recon wrote")
    return parser


def _add_data_actions(parser: ArgumentParser) -> None:
    """Once `parser` is part of the command: jsonargparse wants the levels in order."""
    actions = parser.add_subcommands(required=True, dest="action")
    actions.add_subcommand("check", _data_check_parser(), help="do depth and cameras of a data set make sense?")
    actions.add_subcommand("preview", _data_preview_parser(), help="a contact sheet of a data set")


def _data_check_parser() -> ArgumentParser:
    parser = _parser("Check every frame of a data set.", "g2vlm data check 7scenes/redkitchen")
    _add_source(parser)
    parser.add_argument("--max-bad", type=float, default=0.05, help="share of frames that may be unusable")
    parser.add_argument("--max-frames", type=int, help="check at most this many frames of a scene, evenly chosen")
    parser.add_argument("--max-scenes", type=int, help="check the first scenes only")
    return parser


def _data_preview_parser() -> ArgumentParser:
    what = "Draw a contact sheet of a data set; rooms_qa stands for the held-out questions about rooms."
    parser = _parser(what, "g2vlm data preview rooms -o rooms.png")
    _add_source(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--views", type=int, default=6, help="views of each scene")
    parser.add_argument("--scenes", type=int, default=3, help="scenes to show")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _add_source(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="folder of the data, or rooms for what the project renders itself")
    parser.add_argument("--dataset", choices=["canonical", "seven_scenes", "images"], help="default: by what is there")
    parser.add_argument("--depth", choices=["proj", "proj_clean", "rawdepth"], help="of 7-Scenes; default: proj_clean")


def _doctor_parser() -> ArgumentParser:
    return _parser("Check the installation.", "g2vlm doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    log_to_stderr()
    args = build_parser().parse_args(arguments)
    name, options = _chosen(args)
    module = MODULES.get(name, "g2vlm.commands")
    return guarded(lambda: to_stdout(lambda: getattr(import_module(module), name)(options)), options.debug)


def log_to_stderr() -> None:
    """Plain lines on stderr; stdout stays for results."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "PIL", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def guarded(work: Callable[[], None], debug: bool = False) -> int:
    """Do the work of a command and return its exit code; a failure is told on stderr.

    Args:
        work: what to do; heavy imports belong inside it.
        debug: show the traceback of an error.
    """
    try:
        work()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except G2VLMError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except Exception as error:
        return _report_bug(error, debug)
    return 0


def to_stdout(work: Callable[[], None]) -> None:
    """Do work whose result goes to stdout; when its reader stops reading, as `head` does, that ends it quietly."""
    try:
        work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _chosen(args: Namespace) -> tuple[str, Namespace]:
    """The function that does the command, and its options; `data check` is done by `data_check`."""
    options = args[args.command]
    if "action" not in options:
        return args.command, options
    return f"{args.command}_{options.action}", options[options.action]


def _report_bug(error: Exception, debug: bool) -> int:
    """One line for the user; the traceback goes to a file."""
    if debug:
        traceback.print_exc()
    with tempfile.NamedTemporaryFile("w", prefix="g2vlm-", suffix=".log", delete=False) as file:
        file.write(traceback.format_exc())
    print(f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
    print(f"  why: this is a bug; the traceback is in {file.name}", file=sys.stderr)
    print("  fix: please report it with that file", file=sys.stderr)
    return G2VLMError.code
