"""Command line of training: `python -m train.run`, normally through train/stage1_geometry.sh."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from g2vlm.cli import guarded, log_to_stderr
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.registry import build_source
from g2vlm.data.types import SceneSource
from train import engine as engines
from train.config import DEFAULT_CONFIG, ChatConfig, ChatSourceConfig, DataConfig, RunConfig, SourceConfig, parse
from train.loop import train
from train.packing import ChatMixture

log = logging.getLogger("train")

ROOT = DEFAULT_CONFIG.parents[1]


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    log_to_stderr()
    disable_progress_bar()
    return guarded(lambda: carry_out([*arguments]), debug="--debug" in arguments)


def carry_out(arguments: list[str]) -> None:
    """Parse, open the data, train. The arguments may begin with `--default FILE`, for when no `--config` is given."""
    default = DEFAULT_CONFIG
    if arguments[:1] == ["--default"]:
        default, arguments = ROOT / arguments[1], arguments[2:]
    chosen = config_files(arguments)
    if not chosen:
        arguments = ["--config", str(default), *arguments]
    config, _ = parse(arguments)
    files = chosen or [default]
    with engines.engine(config.runtime.engine, config.runtime.device) as engine:
        if engine.rank:
            logging.getLogger().setLevel(logging.ERROR)
        hint = "" if chosen else " (the default; choose another with --config configs/NAME.yaml)"
        log.info("config %s%s", ", ".join(str(_relative(file)) for file in files), hint)
        folder = run_folder(config, files[-1].stem)
        engine.barrier()
        source, validation = open_data(config.data)
        log.info("run in %s", folder)
        train(config, engine, folder, source, validation, ["python", "-m", "train.run", *arguments])


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that `--config` names, in order; later ones count more, and the last one names the run."""
    chosen = []
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            chosen.append(Path(arguments[i + 1]))
        elif argument.startswith("--config="):
            chosen.append(Path(argument.removeprefix("--config=")))
    return chosen


def run_folder(config: RunConfig, name: str) -> Path:
    """The folder of a run: the one asked for when it is free or resumed, else a numbered sibling of it."""
    folder = Path(config.runtime.output or Path("runs") / name)
    if config.runtime.resume is not None:
        return folder
    number, free = 1, folder
    while free.exists() and (not free.is_dir() or any(free.iterdir())):
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def open_data(config: DataConfig) -> tuple[SceneSource | ChatMixture, SceneSource | ChatMixture | None]:
    """What a run trains and validates on."""
    if config.chat is not None:
        held_out = config.chat.validation
        return open_chats(config.chat.sources, config.chat), open_chats(held_out, config.chat) if held_out else None
    return open_source(config.source), None if config.validation is None else open_source(config.validation)


def open_source(config: SourceConfig) -> SceneSource:
    """The source of scenes that a config names."""
    return build_source(config.name, None if config.root is None else Path(config.root), **config.options)


def open_chats(sources: Sequence[ChatSourceConfig], config: ChatConfig) -> ChatMixture:
    """The sources of questions that a config names."""
    opened = [
        build_chat_source(own.name, None if own.root is None else Path(own.root), config.view_size, **own.options)
        for own in sources
    ]
    return ChatMixture(opened, [own.weight for own in sources])


def _relative(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
