"""Run a student over clips and judge what its layers match; what the numbers are over all clips."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.correspondence_clips import Clip, Points, points_of
from eval.correspondence_scores import (
    AFTER,
    ATTENTION,
    BEFORE,
    COLOUR,
    DISTANCES,
    IDENTITY,
    RANDOM,
    Key,
    Scored,
    calibration,
    score,
    share_by_view,
    share_correct,
)
from eval.evaluate import PROGRESS_SECONDS, Skipped
from eval.student import Seen, Student
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.supervision.backbones import Taps
from geometry.arrays import FloatArray
from geometry.metrics.matching import temporal_robustness

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Watched:
    """A clip as a student sees it: its views at the student's size, its points at the size they were found at."""

    sample: SceneSample
    points: Points
    seen: Seen


@dataclass(frozen=True)
class Outcome:
    """Scores of the clips that could be scored, and why the others could not."""

    clips: Sequence[Scored]
    skipped: Sequence[Skipped]

    @property
    def keys(self) -> list[Key]:
        """Every series and layer, baselines left out."""
        return [key for key in self.clips[0].correct if key.layer is not None] if self.clips else []


def all_layers(student: Student) -> Taps:
    """Everything that is measured."""
    blocks = student.backbone.num_layers
    return Taps(hidden=tuple(range(blocks + 1)), attention=tuple(range(1, blocks + 1)))


def watch(student: Student, clip: Clip, size: int, true_size: int) -> Watched:
    """Show a clip to a student.

    Args:
        student: the model.
        clip: the clip.
        size: width in pixels of the views that it sees.
        true_size: width that the points are found at.

    Raises:
        InputError: a view that cannot be read, or no point to follow.
    """
    exact = clip.load(true_size)
    sample = exact if size == true_size else clip.load(size)
    return Watched(sample, points_of(exact), student.see(sample.images, all_layers(student), with_expert=True))


def run_clips(
    student: Student,
    clips: Sequence[Clip],
    size: int,
    true_size: int,
    keep: Callable[[Scored], None] = lambda scored: None,
) -> Outcome:
    """Score every clip; arguments as of `watch`. `keep` is called with each, so that an interruption loses nothing."""
    scored: list[Scored] = []
    skipped: list[Skipped] = []
    told = time.monotonic()
    for number, clip in enumerate(clips):
        try:
            watched = watch(student, clip, size, true_size)
            scored.append(score(clip.name, watched.seen, watched.points, watched.sample.images))
            keep(scored[-1])
        except (InputError, OSError) as error:
            log.warning("skipped %s: %s", clip.name, " ".join(str(error).split()))
            skipped.append(Skipped(clip.name, " ".join(str(error).split())))
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("%d of %d clips at %d pixels", number + 1, len(clips), size)
    return Outcome(scored, skipped)


# ---------------------------------------------------------------------------------------------- numbers


def pck_name(distance: int) -> str:
    """Of the metric."""
    return f"pck{distance}"


def metrics(outcome: Outcome, prefix: str = "") -> dict[str, float]:
    """Percentages `pckD/SERIES/LAYER`, correlations `confidence_r/SERIES/LAYER`; nothing without a clip."""
    if not outcome.clips:
        return {}
    found: dict[str, float] = {f"{prefix}visible_points": sum(int(clip.visible.sum()) for clip in outcome.clips)}
    for distance in DISTANCES:
        for key in outcome.keys:
            name = f"{prefix}{pck_name(distance)}/{key.series}/{key.layer}"
            found[name] = share_correct(outcome.clips, key, distance)
    for key in outcome.keys:
        if key.series in (AFTER, BEFORE, ATTENTION):
            found[f"{prefix}confidence_r/{key.series}/{key.layer}"] = calibration(outcome.clips, key)
    return found


def baselines(outcome: Outcome, prefix: str = "") -> dict[str, dict[str, float]]:
    """`pckD` of what needs no model."""
    if not outcome.clips:
        return {}
    return {
        name: {f"{prefix}{pck_name(d)}": share_correct(outcome.clips, Key(name), d) for d in DISTANCES}
        for name in (IDENTITY, RANDOM, COLOUR)
    }


def curves(outcome: Outcome) -> dict[str, FloatArray]:
    """PCK in percent by offset from the first frame: of `SERIES/LAYER`, and of each baseline."""
    if not outcome.clips:
        return {}
    found = {f"{key.series}/{key.layer}": share_by_view(outcome.clips, key) for key in outcome.keys}
    return found | {name: share_by_view(outcome.clips, Key(name)) for name in (IDENTITY, RANDOM, COLOUR)}


def visible_by_offset(outcome: Outcome) -> FloatArray:
    """Points that count at every offset."""
    longest = max((len(clip.visible) for clip in outcome.clips), default=0)
    return sum((np.pad(c.visible.sum(-1), (0, longest - len(c.visible))) for c in outcome.clips), np.zeros(longest))


def kept(by_offset: Mapping[str, FloatArray], offsets: Sequence[int]) -> dict[str, float]:
    """Percentages `kept/SERIES/LAYER/OFFSET` of the PCK at offset 1 that are left at others."""
    return {
        f"kept/{name}/{offset}": 100 * float(temporal_robustness(curve)[offset - 1])
        for name, curve in by_offset.items()
        if "/" in name
        for offset in offsets
        if offset <= len(curve)
    }


def best_layer(values: Mapping[str, float], series: str, name: str = pck_name(DISTANCES[0])) -> int | None:
    """The layer of a series with the largest metric, the first of equals; None without any."""
    found = {int(key.rsplit("/", 1)[1]): value for key, value in values.items() if key.startswith(f"{name}/{series}/")}
    return max(found, key=lambda layer: found[layer]) if found else None


def layers_of(values: Mapping[str, float]) -> list[int]:
    """Every layer that some series has."""
    start = f"{pck_name(DISTANCES[0])}/"
    return sorted({int(key.rsplit("/", 1)[1]) for key in values if key.startswith(start)})
