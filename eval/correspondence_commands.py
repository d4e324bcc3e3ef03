"""What `eval/correspondence.py` does, once its arguments are parsed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from eval.correspondence_clips import MAX_CYCLE_ERROR, OFFSETS, QUERY_GRID, RULE, Clip, ClipSet, find_clips
from eval.correspondence_pictures import write_features, write_matches
from eval.correspondence_report import KEPT_AT, LABELS, TRAINED, markdown, table, write_charts
from eval.correspondence_run import (
    Outcome,
    baselines,
    best_layer,
    curves,
    kept,
    metrics,
    run_clips,
    visible_by_offset,
    watch,
)
from eval.correspondence_scores import AFTER, COLOUR, DISTANCES, HIDDEN, Key, Scored, share_correct
from eval.records import ITEMS, append_lines, write_record
from eval.runs import output_folder, require_positive
from eval.sources import evenly, file_name
from eval.student import Student, open_model, require_size
from g2vlm.errors import CheckFailed, InputError
from g2vlm.staging import write_errors

log = logging.getLogger(__name__)
DEFAULTS = {"clips": 32, "views": 8, "paths": 16, "size": 224}
"""Of the protocol; a run with others says so."""


@dataclass(frozen=True)
class Outcomes:
    """What was measured.

    Args:
        clips: at the size of the protocol.
        trained: the same clips at the size that the weights were trained at; None where it is the same or unknown.
        paths: walks, at the size of the protocol.
    """

    clips: Outcome
    trained: Outcome | None
    paths: Outcome


def run(args: Namespace) -> None:
    """Measure; write everything into the output folder; print the table."""
    for name in ("clips", "views"):
        require_positive(name, args[name])
    if args.views < 2:
        raise InputError("--views 1", "points are followed from one view into another", "give at least 2")
    if args.paths < 0:
        raise InputError(f"--paths {args.paths}", "it is a number of walks", "give 0 or more")
    require_size("--size", args.size)
    clips = find_clips(args.dataset, args.data, args.clips, args.views, args.paths)
    output = output_folder(args.output, "correspondence")
    log.info("%s; views of %d pixels (--size); results in %s", clips.about, args.size, output)
    model = open_model(args.model, args.device, args.dtype)
    student_at = lru_cache(lambda size: model.student(size, args.geometry))
    student = student_at(args.size)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        outcomes = measure(student_at, clips, args.size, keeper(output))
        record = results(student, clips, outcomes, args)
        write_record(output, record, markdown(record), args.device)
        if not outcomes.clips.clips:
            first = outcomes.clips.skipped[0] if outcomes.clips.skipped else None
            raise CheckFailed(
                "no clip could be scored", f"{first.item}: {first.reason}" if first else "there is none", ""
            )
        write_charts(record, output)
        draw(student, clips.clips, outcomes.clips, record, output / "pictures", args.pictures)
    print(f"{table(record)}\nresults in {output}", flush=True)


def measure(
    student_at: Callable[[int], Student], clips: ClipSet, size: int, keep: Callable[[str, int, Scored], None]
) -> Outcomes:
    """Run clips at a size and at the trained one, and the walks.

    Args:
        student_at: the model for views of a width.
        clips: what to measure on.
        size: width of the views.
        keep: called with what a score is of, the width, and the score.
    """
    student = student_at(size)
    found = run_clips(student, clips.clips, size, size, lambda scored: keep("clip", size, scored))
    own, trained = student.trained_size, None
    if own is not None and own != size:
        log.info("the same clips at %d pixels, which the weights were trained at", own)
        trained = run_clips(student_at(own), clips.clips, own, size, lambda scored: keep("clip", own, scored))
    paths = run_clips(student, clips.paths, size, size, lambda scored: keep("walk", size, scored))
    return Outcomes(found, trained, paths)


def keeper(output: Path) -> Callable[[str, int, Scored], None]:
    """Writes a line for every scored clip as soon as it exists."""

    def keep(kind: str, size: int, scored: Scored) -> None:
        shares = {_named(key): share_correct([scored], key) for key in scored.correct}
        line = {"kind": kind, "clip": scored.clip, "size": size, "visible_points": int(scored.visible.sum())}
        append_lines(output, [{**line, f"pck{DISTANCES[0]}": shares}])

    return keep


def _named(key: Key) -> str:
    return key.series if key.layer is None else f"{key.series}/{key.layer}"


def results(student: Student, clips: ClipSet, outcomes: Outcomes, args: Namespace) -> dict[str, Any]:
    """What `results.json` holds."""
    by_offset = curves(outcomes.paths)
    found = metrics(outcomes.clips) | kept(by_offset, KEPT_AT)
    compared = baselines(outcomes.clips)
    skipped = [*outcomes.clips.skipped, *outcomes.paths.skipped]
    if outcomes.trained is not None:
        found |= metrics(outcomes.trained, TRAINED)
        extra = baselines(outcomes.trained, TRAINED)
        compared = {name: own | extra.get(name, {}) for name, own in compared.items()}
        skipped += outcomes.trained.skipped
    return {
        "benchmark": clips.name + _modified(args),
        "protocol": protocol(student, clips, outcomes, args),
        "model": student.name,
        "count": len(outcomes.clips.clips),
        "skipped": [asdict(one) for one in skipped],
        "metrics": found,
        "baselines": compared,
        "curves": {
            "offsets": [*range(1, len(visible_by_offset(outcomes.paths)) + 1)],
            "visible_points": visible_by_offset(outcomes.paths).tolist(),
            f"pck{DISTANCES[0]}": {name: curve.tolist() for name, curve in by_offset.items()},
        },
        "per_item": ITEMS,
        "provenance": dict(student.provenance),
    }


def protocol(student: Student, clips: ClipSet, outcomes: Outcomes, args: Namespace) -> dict[str, Any]:
    """Everything that decides whether two numbers can be compared."""
    own = {"": outcomes.clips} | ({} if outcomes.trained is None else {TRAINED: outcomes.trained})
    sizes = {"": args.size, TRAINED: student.trained_size}
    return {
        "name": clips.name,
        "about": clips.about,
        "clips": len(clips.clips),
        "views": args.views,
        "paths": len(outcomes.paths.clips),
        "offsets": OFFSETS,
        "size": args.size,
        "trained_size": student.trained_size,
        "grids": {str(sizes[prefix]): [*o.clips[0].grid] for prefix, o in own.items() if o.clips},
        "geometry": args.geometry,
        "query_grid": [*QUERY_GRID],
        "visibility": asdict(RULE),
        "max_cycle_error": MAX_CYCLE_ERROR,
        "max_distance": [*DISTANCES],
        "query_cell": "the cell that holds the query point",
        "modified": _changes(args),
    }


def _changes(args: Namespace) -> dict[str, int]:
    return {name: args[name] for name, value in DEFAULTS.items() if args[name] != value}


def _modified(args: Namespace) -> str:
    changes = ", ".join(f"{name} {value}" for name, value in _changes(args).items())
    return f" (modified: {changes})" if changes else ""


def draw(
    student: Student, clips: Sequence[Clip], outcome: Outcome, record: Mapping[str, Any], folder: Path, count: int
) -> None:
    """Write pictures of at most `count` clips, evenly chosen."""
    known = {clip.name: clip for clip in clips}
    shown = {
        f"{LABELS[series]}, layer {layer}": Key(series, layer)
        for series in (AFTER, HIDDEN)
        if (layer := best_layer(record["metrics"], series)) is not None
    } | {COLOUR: Key(COLOUR)}
    for scored in evenly(outcome.clips, count):
        folder.mkdir(exist_ok=True)
        watched = watch(student, known[scored.clip], record["protocol"]["size"], record["protocol"]["size"])
        write_matches(scored, watched, shown, folder / file_name(scored.clip, ".matches.png"))
        write_features(scored.clip, watched, folder / file_name(scored.clip, ".features.png"))
