"""Scenes made of stored frames: what a frame is, which frames a sample gets, and what happens to unreadable ones.

A reader of a layout is a `FrameSource` that lists its scenes and reads one frame; everything else is here.
S views, H, W pixels of a sample; h, w pixels of a stored frame.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from g2vlm.data.transforms import (
    Fit,
    centred_box,
    crop_centre,
    draw_zoom,
    move_intrinsics,
    resize_image,
    resize_nearest,
    whole_box,
)
from g2vlm.data.types import LicenseClass, Quality, SceneSample, ViewRequest
from g2vlm.errors import InputError, TooManyBadFiles
from geometry import rotation_from_9d
from geometry.io import read_depth_png

log = logging.getLogger(__name__)

ROTATION_WARN, ROTATION_FAIL = 1e-3, 1e-2  # largest entry of |R R' - I|; text files of real sets reach 4e-4
UNIFORM_CHANCE, UNIFORM_MIN_VIEWS = 0.1, 16  # over the whole scene instead of a window (G2VLM data code)
INVALID_CODE = 65535
BadFrames = dict[tuple[int, int], InputError]
"""(scene, index) -> why the frame cannot be read."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One view as it is stored, checked but not resized.

    Args:
        name: in its scene.
        image: (h, w, 3) uint8 RGB.
        depth: (h, w) float32 z-depth, 0 = invalid.
        intrinsics: (3, 3) float64, integer grid.
        cam_to_world: (4, 4) float64, its rotation as stored (nearly orthonormal).
    """

    name: str
    image: np.ndarray
    depth: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    cam_to_world: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth.shape != self.image.shape[:2]:
            (height, width), depth = self.image.shape[:2], self.depth
            why = f"image {width} x {height}, depth {depth.shape[1]} x {depth.shape[0]}"
            raise InputError(f"image and depth differ in size  {self.name}", why, "they must belong to the same camera")


@dataclass(frozen=True)
class SceneFacts:
    """What holds for every frame of a scene; fields as in SceneSample."""

    name: str
    dataset: str
    is_metric: bool = False
    quality: Quality = "high"
    license_class: LicenseClass = "unknown"


class FrameSource(ABC):
    """A SceneSource over stored frames.

    Views of a sample are chosen as in the released data code (g2vlm_model section 11): around a random anchor within
    `window` frames per view to either side, half of the time uniformly and half of the time one from each of S equal
    parts; a tenth of the time, when S > 16, over the whole scene. Then they are shuffled. An unreadable frame is logged
    once and another takes its place.

    Args:
        window: frames per view to either side of the anchor.
        focal_jitter: crop each view to 0.9..1 of its largest box.
        max_bad: share of all frames that may be unreadable before `load` gives up.
    """

    name = ""

    def __init__(self, *, window: int = 30, focal_jitter: bool = False, max_bad: float = 0.05):
        if window < 1 or not 0 <= max_bad <= 1:
            raise InputError(f"cannot use  window={window}, max_bad={max_bad}", "", "window >= 1 and 0 <= max_bad <= 1")
        self.window, self.focal_jitter, self.max_bad = window, focal_jitter, max_bad
        self.left_out: BadFrames = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of scenes."""

    @abstractmethod
    def facts(self, scene: int) -> SceneFacts:
        """Name and properties of a scene; may read its metadata."""

    @abstractmethod
    def frame_names(self, scene: int) -> Sequence[str]:
        """Names of the frames of a scene, in order."""

    @abstractmethod
    def read_frame(self, scene: int, index: int) -> Frame:
        """One frame.

        Raises:
            InputError: a file of it is missing, damaged or makes no sense; the message names the file.
        """

    def num_views(self, scene: int) -> int:
        """How many frames a scene has."""
        return len(self.frame_names(scene))

    def load(self, scene: int, request: ViewRequest) -> SceneSample:
        """A random excerpt; see the class and `SceneSource.load`.

        Raises:
            InputError: too few readable frames.
            TooManyBadFiles: more than `max_bad` of all frames turned out to be unreadable.
        """
        rng = np.random.default_rng(request.seed)
        candidates = view_candidates(self.num_views(scene), request.num_views, self.window, rng)
        frames = self._first_readable(scene, candidates, request.num_views)
        zooms = [draw_zoom(rng) if self.focal_jitter else 1.0 for _ in frames]
        return assemble(frames, self.facts(scene), request.size, zooms=zooms)

    def load_first(self, scene: int, indices: Sequence[int], num_views: int, size: tuple[int, int]) -> SceneSample:
        """The first `num_views` readable ones of these frames, in this order; for whoever chooses frames.

        Raises:
            InputError, TooManyBadFiles: as `load`.
        """
        return assemble(self._first_readable(scene, indices, num_views), self.facts(scene), size)

    def load_views(self, scene: int, indices: Sequence[int], size: tuple[int, int], fit: Fit = "crop") -> SceneSample:
        """Exactly these frames in this order, nothing random: for evaluation and pictures.

        Raises:
            InputError: one of them cannot be read.
        """
        return assemble([self.read_frame(scene, index) for index in indices], self.facts(scene), size, fit)

    def _first_readable(self, scene: int, indices: Sequence[int], num_views: int) -> list[Frame]:
        frames: list[Frame] = []
        for index in indices:
            if len(frames) == num_views:
                break
            if (frame := self._read_or_skip(scene, index)) is not None:
                frames.append(frame)
        if len(frames) < num_views:
            raise InputError(
                f"too few views in scene  {self.facts(scene).name}",
                f"{len(frames)} readable of {len(indices)}, {num_views} asked for",
                "ask for fewer views, or leave the scene out",
            )
        return frames

    def _read_or_skip(self, scene: int, index: int) -> Frame | None:
        if (scene, index) in self.left_out:
            return None
        try:
            frame = self.read_frame(scene, index)
            crop_centre((frame.image.shape[0], frame.image.shape[1]), frame.intrinsics, frame.name)
            return frame
        except InputError as error:
            log.warning("left out: %s (%s)", error.what, error.why)
            self.leave_out({(scene, index): error})
        return None

    def leave_out(self, frames: BadFrames) -> None:
        """Take note of unreadable frames, such as those that another process found.

        Raises:
            TooManyBadFiles: more than `max_bad` of all frames are now known to be unreadable.
        """
        self.left_out.update(frames)
        if frames:
            self._check_quota()

    def _known_views(self, scene: int) -> int:
        """None of a scene whose metadata cannot be read."""
        try:
            return self.num_views(scene)
        except InputError:
            return 0

    def _check_quota(self) -> None:
        total = sum(self._known_views(scene) for scene in range(len(self)))
        if len(self.left_out) > self.max_bad * total:
            error = next(reversed(self.left_out.values()))
            raise TooManyBadFiles(
                f"too many unreadable frames in  {self.name}",
                f"{len(self.left_out)} of {total}, more than {self.max_bad:.1%}; the last: {error.what} ({error.why})",
                "run g2vlm data check on it, or raise max_bad",
            )


# ---------------------------------------------------------------------------------------------- choosing views


def view_candidates(count: int, num_views: int, window: int, rng: np.random.Generator) -> list[int]:
    """All frames of a scene as indices: the chosen views first, shuffled, then substitutes, the window's first."""
    chosen, near = _chosen(count, num_views, window, rng)
    rest = np.setdiff1d(near, chosen)
    far = np.setdiff1d(np.arange(count), near)
    return np.concatenate([rng.permutation(part) for part in (chosen, rest, far)]).tolist()


def _chosen(count: int, num_views: int, window: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the views, and of the frames they were chosen among."""
    everywhere = np.arange(count)
    if count <= num_views:
        return everywhere, everywhere
    if num_views > UNIFORM_MIN_VIEWS and rng.random() < UNIFORM_CHANCE:
        return rng.choice(everywhere, num_views, replace=False), everywhere
    anchor, reach = int(rng.integers(count)), window * num_views
    near = np.arange(max(0, anchor - reach), min(count, anchor + reach + 1))
    if len(near) < num_views:
        return rng.choice(everywhere, num_views, replace=False), everywhere
    if rng.random() < 0.5:
        return rng.choice(near, num_views, replace=False), near
    return np.array([rng.choice(part) for part in np.array_split(near, num_views)]), near


# ---------------------------------------------------------------------------------------------- assembling


def assemble(
    frames: Sequence[Frame],
    facts: SceneFacts,
    size: tuple[int, int],
    fit: Fit = "crop",
    zooms: Sequence[float] | None = None,
) -> SceneSample:
    """Frames brought to `size` (H, W) as one sample; rotations become orthonormal.

    A quantity that any frame lacks is absent from the sample.
    """
    zooms = zooms or [1.0] * len(frames)
    parts = [_resized(frame, size, fit, zoom) for frame, zoom in zip(frames, zooms, strict=True)]
    images, depths, intrinsics, poses = (list(column) for column in zip(*parts, strict=True))
    depth = _stacked(depths)
    return SceneSample(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        depth=depth,
        valid=None if depth is None else depth > 0,
        intrinsics=_stacked(intrinsics),
        cam_to_world=_stacked(poses),
        is_metric=facts.is_metric,
        quality=facts.quality,
        dataset=facts.dataset,
        scene=facts.name,
        view_ids=tuple(frame.name for frame in frames),
        license_class=facts.license_class,
    )


def _resized(frame: Frame, size: tuple[int, int], fit: Fit, zoom: float) -> tuple:
    """Image, depth, K and pose of a frame at `size`."""
    stored = frame.image.shape[0], frame.image.shape[1]
    box = whole_box(stored) if fit == "stretch" else centred_box(stored, size, frame.intrinsics, zoom)
    return (
        resize_image(frame.image, box, size),
        None if frame.depth is None else resize_nearest(frame.depth, box, size),
        None if frame.intrinsics is None else move_intrinsics(frame.intrinsics, box, size),
        None if frame.cam_to_world is None else orthonormal(frame.cam_to_world),
    )


def _stacked(arrays: list[np.ndarray | None]) -> torch.Tensor | None:
    present = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(present).astype(np.float32)) if len(present) == len(arrays) else None


# ---------------------------------------------------------------------------------------------- poses and depth


def rotation_error(pose: np.ndarray) -> float:
    """How far the rotation of (4, 4) is from orthonormal: the largest entry of |R R' - I|; infinite when det R <= 0."""
    rotation = pose[:3, :3]
    if not np.linalg.det(rotation) > 0:
        return float("inf")
    return float(np.abs(rotation @ rotation.T - np.eye(3)).max())


def orthonormal(pose: np.ndarray) -> np.ndarray:
    """(4, 4) float64 with the nearest rotation."""
    rotation = rotation_from_9d(torch.from_numpy(pose[:3, :3].reshape(9).astype(np.float64)))
    return np.block([[rotation.numpy(), pose[:3, 3:]], [np.array([[0, 0, 0, 1.0]])]])


def checked_pose(values: object, place: str) -> np.ndarray:
    """`values` as a camera-to-world matrix (4, 4) float64.

    Raises:
        InputError: another shape, not finite, or no rigid transform; `place` names the file and field.
    """
    what, fix = f"not a pose  {place}", "a pose is a rigid 4x4 camera-to-world matrix"
    try:
        pose = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(what, f"not a matrix of numbers: {error}", fix) from error
    if pose.shape != (4, 4):
        raise InputError(what, f"its shape is {pose.shape}, not (4, 4)", fix)
    if not np.isfinite(pose).all():
        raise InputError(what, "it has entries that are not finite (lost tracking?)", "leave the frame out")
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise InputError(what, f"its last row is {pose[3].tolist()}, not 0 0 0 1", fix)
    if (error := rotation_error(pose)) > ROTATION_FAIL:
        why = "its determinant is not positive" if np.isinf(error) else f"|R R' - I| reaches {error:.2g}"
        raise InputError(what, f"the rotation is none: {why}", fix)
    return pose


def read_pose_file(path: Path) -> np.ndarray:
    """A text file of 16 numbers in four rows.

    Raises:
        InputError: missing, not numbers, or as in `checked_pose`.
    """
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        values = [[float(entry) for entry in row] for row in rows]
    except OSError as error:
        raise InputError(f"cannot read pose  {path}", error.strerror or str(error), "check the file") from error
    except ValueError as error:
        raise InputError(f"not a pose  {path}", str(error), "expected four rows of four numbers") from error
    return checked_pose(values, str(path))


def read_stored_depth(path: Path) -> np.ndarray:
    """The values (h, w) uint16 of a 16-bit grey PNG.

    Raises:
        InputError: missing, damaged, or another kind of image.
    """
    try:
        return read_depth_png(path, 1.0).astype(np.uint16)
    except OSError as error:
        raise InputError(f"cannot read depth  {path}", error.strerror or str(error), "check the file") from error
    except ValueError as error:
        raise InputError(f"cannot read depth  {path}", str(error).split(": ", 1)[-1], "replace the file") from error
