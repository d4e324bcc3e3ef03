"""Ask a teacher once about everything that a run will see, and keep what it says:

    python -m train.cache_teacher --config RUN.yaml --teacher vggt --output DIR [--processes 4]

A training run draws its samples at random, and most sources draw the frames of a sample at random too. What a teacher
says holds for exactly the frames that it saw, in their order. So every source of the run must be a finite list
(`FixedSamples`: the options fixed_samples and fixed_seed of any source of questions), in which sample i always has the
same frames; the teacher is asked about every sample of every source, training and validation. A run with the same
sources and `teachers: [{name: cache, root: DIR}]` then finds every clip. A run whose frames differ finds another name,
size or picture, and stops with an error that says so; so does one whose sources are longer than the cache.

A teacher is a name, or a mapping in one line as in a run's `teachers`: --teacher '{name: vggt, options: {weights: W}}'.
Given several times, they complete each other, such as a network and the one that gives the metric scale. Whatever else
is given overrides the run's config. Stop it at any time and start it again: it makes what is missing.
"""

import argparse
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from g2vlm.cli import guarded, log_to_stderr
from g2vlm.data.chat.batch import shown_clip
from g2vlm.data.chat.fixed import FixedSamples
from g2vlm.errors import InputError, ResourceError, TooManyBadFiles
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.teachers.base import Teacher
from g2vlm.supervision.teachers.cache_format import DEFAULT_FIELDS
from g2vlm.supervision.teachers.cache_writer import (
    CacheWriter,
    Counts,
    Identity,
    prepare_folder,
    write_clips,
    write_manifest,
)
from g2vlm.supervision.teachers.registry import build_teacher
from train.config import DataConfig, TeacherConfig, parse
from train.packing import ChatMixture
from train.run import open_data

log = logging.getLogger("train.cache_teacher")

START = "spawn"
"""How processes start: a forked one can neither use a GPU nor be sure of its threads."""
_TOLD_EVERY = 100


@dataclass(frozen=True)
class Share:
    """What one process does.

    Args:
        arguments: of the run's config.
        teachers: asked in order.
        folder: of the cache, prepared.
        fields: that are kept.
        clips_per_shard: a shard is written when it has so many.
        start, stop: of its samples, in the order of the sources.
        number: of the process; -1: alone, in the process that was started.
    """

    arguments: tuple[str, ...]
    teachers: tuple[TeacherConfig, ...]
    folder: Path
    fields: tuple[str, ...]
    clips_per_shard: int
    start: int = 0
    stop: int = 0
    number: int = -1


def main(arguments: Sequence[str]) -> int:
    """Fill a cache; returns the exit code."""
    log_to_stderr()
    return guarded(lambda: print(carry_out(arguments)), debug="--debug" in arguments)


def carry_out(arguments: Sequence[str]) -> str:
    """Fill a cache; returns the line that says what is in it.

    Raises:
        InputError: sources that are no finite lists, an unknown teacher, or a folder that holds something else.
    """
    given, rest = _parser().parse_known_args([*arguments])
    share = Share(
        arguments=("--config", given.config, *(entry for entry in rest if entry != "--debug")),
        teachers=tuple(_teacher_config(text) for text in given.teacher),
        folder=Path(given.output),
        fields=tuple(given.fields),
        clips_per_shard=given.clips_per_shard,
    )
    sources = _sources(parse([*share.arguments])[0].data)
    total = sum(map(len, sources))
    teachers = _build(share.teachers)
    identity = Identity.of(teachers, share.fields)
    prepare_folder(share.folder, identity)
    log.info("%d samples of %s for %s", total, ", ".join(own.name for own in sources), identity.teacher)
    if given.processes == 1:
        counts, unusable = _fill(replace(share, stop=total), sources, teachers, identity)
    else:
        del teachers  # every process has its own
        counts, unusable = _fill_together(share, total, given.processes)
    manifest = write_manifest(share.folder, identity)
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return (
        f"{share.folder}: {manifest['count']} clips of {identity.teacher} ({counts.made} new, {counts.without} of them "
        f"without targets), {unusable} samples without a clip or unreadable, {len(manifest['shards'])} shards, "
        f"{size / 1e6:.1f} MB"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.cache_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--teacher", required=True, action="append", help="a name, or {name: ..., options: {...}}")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument("--processes", type=int, default=1, help="how many ask the teacher, each with its own copy")
    parser.add_argument(
        "--fields", nargs="+", default=list(DEFAULT_FIELDS), help="what is kept; also: points, features"
    )
    parser.add_argument("--clips-per-shard", type=int, default=64, help="at most; what a stop can lose")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _teacher_config(text: str) -> TeacherConfig:
    """From a name, or a mapping in YAML.

    Raises:
        InputError: it is neither.
    """
    try:
        values: Any = yaml.safe_load(text)
        return TeacherConfig(**values) if isinstance(values, dict) else TeacherConfig(str(values))
    except (yaml.YAMLError, TypeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"cannot read the teacher {text}", why, "give a name, or {name: N, options: {...}}") from None


def _build(teachers: Sequence[TeacherConfig]) -> list[Teacher]:
    return [build_teacher(own.name, own.root, **own.options) for own in teachers]


def _sources(data: DataConfig) -> list[FixedSamples]:
    """All sources of a run, those of its validation at the end.

    Raises:
        InputError: it trains on scenes, or a source is no finite list.
    """
    found: list[FixedSamples] = []
    for mixture in open_data(data):
        if mixture is None:
            continue
        if not isinstance(mixture, ChatMixture):
            why = "scenes bring their own truth, and no teacher is asked about them"
            raise InputError("the run trains on scenes", why, "give a run with data.chat.sources")
        for source in mixture.sources:
            if not isinstance(source, FixedSamples):
                raise InputError(
                    f"the source {source.name} draws other frames every time",
                    "a teacher's targets hold for the frames that it saw",
                    "give the source options such as {fixed_samples: 1000, fixed_seed: 0}, in the training run too",
                )
            found.append(source)
    return found


def _fill_together(share: Share, total: int, processes: int) -> tuple[Counts, int]:
    """Fill a cache by several processes, each with consecutive samples; errors of any are raised here."""
    bounds = [round(total * i / processes) for i in range(processes + 1)]
    shares = [replace(share, start=bounds[i], stop=bounds[i + 1], number=i) for i in range(processes)]
    context = multiprocessing.get_context(START)
    try:
        with ProcessPoolExecutor(processes, context) as pool:
            results = list(pool.map(_fill_share, shares, [os.getpid()] * processes))
    except BrokenProcessPool:
        why = "it was killed, perhaps for want of memory"
        raise ResourceError("a process that asked the teacher is gone", why, "use fewer --processes") from None
    return sum((counts for counts, _ in results), Counts()), sum(unusable for _, unusable in results)


def _fill_share(share: Share, parent: int) -> tuple[Counts, int]:
    """One process's part of a cache."""
    log_to_stderr()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(share.number % torch.cuda.device_count())
    sources = _sources(parse([*share.arguments])[0].data)
    teachers = _build(share.teachers)
    return _fill(share, sources, teachers, Identity.of(teachers, share.fields), parent)


def _fill(
    share: Share, sources: Sequence[FixedSamples], teachers: Sequence[Teacher], identity: Identity, parent: int = 0
) -> tuple[Counts, int]:
    """Ask about a share's samples; returns what became of the clips, and how many samples have none to ask about."""
    writer = CacheWriter(share.folder, identity, share.clips_per_shard)
    usable = [0]

    def told() -> Iterator[Clip]:
        for clip in _clips(share, sources):
            usable[0] += 1
            if parent and os.getppid() != parent:
                raise SystemExit  # whoever wanted the cache is gone
            yield clip

    counts = write_clips(writer, teachers, told())
    return counts, share.stop - share.start - usable[0]


def _clips(share: Share, sources: Sequence[FixedSamples]) -> Iterator[Clip]:
    """The clips of a share's samples, on the device of the teachers; a sample that cannot be read is left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = [(source, index) for source in sources for index in range(len(source))]
    for number, (source, index) in enumerate(places[share.start : share.stop], 1):
        try:
            scene = shown_clip(source.load(index, 0))
        except TooManyBadFiles:
            raise
        except InputError as error:
            log.warning("%s/%d is left out: %s", source.name, index, error.what)
            continue
        if scene is not None:
            yield Clip.of(scene).to(device)
        if number % _TOLD_EVERY == 0:
            log.info("%d of %d samples", number, share.stop - share.start)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
