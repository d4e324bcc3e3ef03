"""What must hold for data before anything is trained or evaluated on it (geometry_data section 4).

Every frame is read. Per frame: pose finite and rigid, focal lengths positive, principal point in the middle 60% of each
axis, enough valid depth. Per scene: depth, intrinsics and poses of views spread over it fit each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from g2vlm.data.frames import ROTATION_FAIL, ROTATION_WARN, Frame, FrameSource, orthonormal, rotation_error
from g2vlm.data.reprojection import Agreement, PosedDepth, agreement, diagnose, is_ambiguous
from g2vlm.data.transforms import MIN_MARGIN
from g2vlm.data.types import SceneSample, SceneSource, ViewRequest
from g2vlm.errors import InputError

MAX_ERROR = 0.03  # median relative depth error between covisible views
COMPARED_VIEWS = 12  # spread over the scene; all their pairs are compared
RENDERED = ViewRequest(num_views=4, size=(84, 112), seed=0)  # what is asked of sources without stored frames
MAX_LISTED = 20


@dataclass(frozen=True)
class CheckRules:
    """What a check accepts.

    Args:
        max_bad: share of all frames that may be unreadable or fail a check of their own.
        min_depth: share of valid depth pixels that a frame with depth must have.
        max_frames: per scene, evenly chosen; None = all.
        max_scenes: the first ones; None = all, or 8 of a source that renders.
    """

    max_bad: float = 0.05
    min_depth: float = 0.01
    max_frames: int | None = None
    max_scenes: int | None = None

    def __post_init__(self) -> None:
        wrong = not (0 <= self.max_bad <= 1 and 0 <= self.min_depth <= 1)
        if wrong or any(n is not None and n < 1 for n in (self.max_frames, self.max_scenes)):
            raise InputError("cannot check with these limits", f"{self}", "shares lie in 0..1, counts are at least 1")


@dataclass
class SceneReport:
    """What was found in one scene. `bad` holds a line for each frame that cannot be used."""

    name: str
    views: int = 0
    bad: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rotation: float | None = None
    valid_depth: float | None = None
    agreement: Agreement | None = None
    sizes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def verdict(self) -> str:
        """FAIL, warn or ok."""
        return "FAIL" if self.failures else "warn" if self.warnings or self.bad else "ok"


@dataclass(frozen=True)
class Report:
    """Every scene of a source."""

    scenes: tuple[SceneReport, ...]
    rules: CheckRules

    @property
    def failures(self) -> list[str]:
        """Everything that makes the check fail, the quota included."""
        lines = [f"{scene.name}: {failure}" for scene in self.scenes for failure in scene.failures]
        bad, views = sum(len(scene.bad) for scene in self.scenes), sum(scene.views for scene in self.scenes)
        if bad > self.rules.max_bad * views:
            lines.append(f"{bad} of {views} frames are bad, more than {self.rules.max_bad:.1%}")
        return lines

    def table(self) -> str:
        """For people: a row per scene, then what was found."""
        rows = [("scene", "views", "bad", "size", "rotation", "depth", "reprojection", "pairs", "result")]
        rows += [_row(scene) for scene in self.scenes]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        for scene in self.scenes:
            lines += [f"warn  {scene.name}: {warning}" for warning in scene.warnings]
        lines += _listed("bad ", [line for scene in self.scenes for line in scene.bad])
        return "\n".join(lines + _listed("FAIL", self.failures))


def _row(scene: SceneReport) -> tuple[str, ...]:
    found = scene.agreement
    return (
        scene.name,
        str(scene.views),
        str(len(scene.bad)),
        ", ".join(f"{width}x{height}" for height, width in sorted(scene.sizes)[:2]) or "-",
        "-" if scene.rotation is None else f"{scene.rotation:.1e}",
        "-" if scene.valid_depth is None else f"{scene.valid_depth:.0%}",
        f"{found.error:.2%}" if found and found.pairs else "-",
        str(found.pairs) if found else "-",
        scene.verdict,
    )


def _listed(mark: str, lines: list[str]) -> list[str]:
    more = len(lines) - MAX_LISTED
    return [f"{mark}  {line}" for line in lines[:MAX_LISTED]] + ([f"{mark}  ... and {more} more"] if more > 0 else [])


# ---------------------------------------------------------------------------------------------- checking


def check_source(source: SceneSource, rules: CheckRules | None = None) -> Report:
    """Check every scene of a source; files that cannot be read are reported, not raised."""
    rules = rules or CheckRules()
    limit = rules.max_scenes or (len(source) if isinstance(source, FrameSource) else 8)
    return Report(tuple(_check_scene(source, scene, rules) for scene in range(min(limit, len(source)))), rules)


def _check_scene(source: SceneSource, scene: int, rules: CheckRules) -> SceneReport:
    report = SceneReport(f"{source.name} {scene}")
    try:
        compared = _check_frames(report, _frames(source, scene, report, rules), rules)
    except InputError as error:
        report.failures.append(_line(error))
        return report
    _check_agreement(report, compared)
    return report


def _frames(
    source: SceneSource, scene: int, report: SceneReport, rules: CheckRules
) -> Iterator[tuple[Frame | InputError, bool]]:
    """What a scene holds, frame by frame, and whether the frame is one of those to compare; names the report."""
    if isinstance(source, FrameSource):
        report.name = source.facts(scene).name
        count = source.num_views(scene)
        indices = _evenly(count, rules.max_frames or count)
        entries = _read(source, scene, indices)
    else:
        sample = source.load(scene, RENDERED)
        report.name = sample.scene or report.name
        indices, entries = range(sample.num_views), iter(frames_of(sample))
    compared = set(_evenly(len(indices), COMPARED_VIEWS))
    for i, entry in enumerate(entries):
        yield entry, i in compared


def _evenly(count: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist() if count else []


def _read(source: FrameSource, scene: int, indices: Sequence[int]) -> Iterator[Frame | InputError]:
    for index in indices:
        try:
            yield source.read_frame(scene, index)
        except InputError as error:
            yield error


def frames_of(sample: SceneSample) -> list[Frame]:
    """The views of a sample, which may live on any device, as frames; its invalid depth becomes 0."""
    frames = []
    for view in range(sample.num_views):
        depth = None
        if sample.depth is not None:
            known = sample.depth[view]
            depth = (known if sample.valid is None else torch.where(sample.valid[view], known, 0)).cpu().numpy()
        K = None if sample.intrinsics is None else sample.intrinsics[view].double().cpu().numpy()
        pose = None if sample.cam_to_world is None else sample.cam_to_world[view].double().cpu().numpy()
        name = sample.view_ids[view] if sample.view_ids else f"view {view}"
        frames.append(Frame(name, sample.images[view].permute(1, 2, 0).cpu().numpy(), depth, K, pose))
    return frames


def _check_frames(
    report: SceneReport, entries: Iterator[tuple[Frame | InputError, bool]], rules: CheckRules
) -> list[PosedDepth]:
    """Fill the report, frame by frame; return the views to compare. Images are not kept."""
    compared: list[PosedDepth] = []
    shares: list[float] = []
    for entry, wanted in entries:
        report.views += 1
        if isinstance(entry, InputError):
            report.bad.append(_line(entry))
            continue
        report.sizes.add((entry.image.shape[0], entry.image.shape[1]))
        shares += [] if entry.depth is None else [float((entry.depth > 0).mean())]
        if faults := camera_faults(entry) + depth_faults(entry, rules.min_depth):
            report.bad.append(f"{report.name}/{entry.name}: {'; '.join(faults)}")
            continue
        if entry.cam_to_world is not None:
            report.rotation = max(report.rotation or 0.0, rotation_error(entry.cam_to_world))
        if wanted and (posed := _posed(entry)):
            compared.append(posed)
    report.valid_depth = float(np.median(shares)) if shares else None
    if report.views == 0:
        report.failures.append("it has no frames")
    if report.rotation is not None and report.rotation > ROTATION_WARN:
        report.warnings.append(f"rotations are orthonormal to {report.rotation:.1e} only; they are made orthonormal")
    return compared


def _posed(frame: Frame) -> PosedDepth | None:
    if frame.depth is None or frame.intrinsics is None or frame.cam_to_world is None:
        return None
    return PosedDepth(frame.depth, frame.intrinsics, orthonormal(frame.cam_to_world))


def camera_faults(frame: Frame) -> list[str]:
    """What is wrong with the camera of a frame."""
    faults = []
    if frame.cam_to_world is not None:
        if not np.isfinite(frame.cam_to_world).all():
            faults.append("the pose is not finite")
        elif (error := rotation_error(frame.cam_to_world)) > ROTATION_FAIL:
            faults.append(f"the rotation is off by {error:.1e}")
    if frame.intrinsics is not None:
        faults += intrinsics_faults(frame.intrinsics, (frame.image.shape[0], frame.image.shape[1]))
    return faults


def intrinsics_faults(K: np.ndarray, size: tuple[int, int]) -> list[str]:
    """What is wrong with K (3, 3) of an image of `size` (H, W)."""
    if not np.isfinite(K).all():
        return ["the intrinsics are not finite"]
    if not (K[0, 0] > 0 and K[1, 1] > 0):
        return [f"focal lengths {K[0, 0]:.4g}, {K[1, 1]:.4g} are not positive"]
    place = (K[0, 2] + 0.5) / size[1], (K[1, 2] + 0.5) / size[0]
    if not all(MIN_MARGIN <= share <= 1 - MIN_MARGIN for share in place):
        return [f"the principal point is at {place[0]:.0%}, {place[1]:.0%} of the image, outside its middle 60%"]
    return []


def depth_faults(frame: Frame, min_share: float) -> list[str]:
    """What is wrong with the depth of a frame of which `min_share` should be valid."""
    if frame.depth is None:
        return []
    if not np.isfinite(frame.depth).all():
        return [f"{int((~np.isfinite(frame.depth)).sum()):,} depth values are not finite"]
    share = float((frame.depth > 0).mean())
    return [f"only {share:.2%} of its depth is valid"] if share < min_share else []


def _check_agreement(report: SceneReport, compared: list[PosedDepth]) -> None:
    if len(compared) < 2:
        return
    report.agreement = given = agreement(compared)
    if given.pairs and given.error < MAX_ERROR:
        if is_ambiguous(compared, given, MAX_ERROR):
            report.warnings.append("the views hardly move: inverted poses would pass as well")
        return
    guess = diagnose(compared, given, MAX_ERROR)
    if given.pairs or guess:
        what = f"depth differs by {given.error:.1%} between views" if given.pairs else "no two views see the same place"
        report.failures.append(f"{what}; {guess or 'poses, intrinsics and depth do not fit'}")
    else:
        report.warnings.append("no two of the compared views see the same place; the poses are unchecked")


def _line(error: InputError) -> str:
    return " ".join(f"{error.what}: {error.why}".split())
