"""Writes a scene to files. Every name inside the output folder is made here; none comes from the input.

S views, H, W pixels at model size, N points.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save as to_safetensors

from g2vlm.errors import CheckFailed, InputError
from g2vlm.preview import preview
from g2vlm.staging import write_errors
from geometry import io
from geometry.io.common import atomic_file

if TYPE_CHECKING:
    from g2vlm.scene import Scene

SINGLE_FILES = {".ply": "ply", ".glb": "glb", ".png": "preview"}


@dataclass(frozen=True)
class PointFilter:
    """Which points a point cloud gets.

    Args:
        min_confidence: leave out valid points below it; the scene must have confidence.
        max_points: keep a random subset (always the same one) when there are more.
    """

    min_confidence: float | None = None
    max_points: int | None = None

    def select(self, scene: "Scene") -> np.ndarray:
        """Flat indices (N,) into the S * H * W pixels.

        Raises:
            InputError: no point is left, or the scene has no confidence to filter by.
        """
        keep = scene.valid
        if self.min_confidence is not None:
            if scene.confidence is None:
                why = f"the model ({scene.model}) gives no confidence"
                raise InputError("cannot filter points by confidence", why, "leave the minimum out")
            keep = keep & (scene.confidence >= self.min_confidence)
        index = np.flatnonzero(keep)
        if not len(index):
            why = f"{scene.valid.sum():,} of {scene.valid.size:,} pixels are valid, none passes the filter"
            raise InputError("no points to write", why, "lower the minimum confidence, or leave the point clouds out")
        if self.max_points is not None and len(index) > self.max_points:
            index = np.sort(np.random.default_rng(0).choice(index, self.max_points, replace=False))
        return index


ALL_POINTS = PointFilter()


def export(
    scene: "Scene",
    target: str | Path,
    formats: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
    points: PointFilter = ALL_POINTS,
) -> list[Path]:
    """Write a scene into a folder, or into one file when `target` ends in .ply, .glb or .png (the preview).

    | format | file | content |
    |---|---|---|
    | `scene` | `scene.safetensors`, `scene.json` | everything, for `Scene.load` |
    | `ply` | `points.ply` | world points with colour, and confidence if there is one |
    | `glb` | `points.glb` | the same points and the cameras, for viewers; at most two million points |
    | `depth` | `depth/0000.png`, ... | 16 bit at model size: depth * depth_scale, 0 = invalid |
    | `cameras` | `cameras.json` | poses, intrinsics of the ORIGINAL images, depth_scale |
    | `preview` | `preview.png` | one picture for people |

    Args:
        scene: what to write.
        target: folder or file; missing folders are made.
        formats: for a folder; all by default.
        overwrite: replace files. Without it a file must not exist and a folder must be empty.
        points: which points the point clouds get.

    Returns:
        The files written, in order. Each appears complete or not at all.

    Raises:
        InputError: unknown format, no points, existing output without `overwrite`, or a place that cannot be written.
        CheckFailed: a camera is unusable (asked for `cameras` or `glb`).
        ResourceError: the disk is full.
    """
    target = Path(target)
    content = _Content(scene, points)
    with write_errors(target):
        if target.suffix.lower() in SINGLE_FILES and not target.is_dir():
            return _write_file(content, target, formats, overwrite)
        return _write_folder(content, target, _known(formats), overwrite)


def _write_file(content: "_Content", target: Path, formats: Sequence[str] | None, overwrite: bool) -> list[Path]:
    name = SINGLE_FILES[target.suffix.lower()]
    if formats is not None and list(formats) != [name]:
        raise InputError(f"one file cannot hold {', '.join(formats)}  {target}", f"it gets {name}", "name a folder")
    if target.exists() and not overwrite:
        raise InputError(
            f"the file exists  {target}", "nothing was changed", "choose another name, or pass --overwrite"
        )
    content.check([name])
    target.parent.mkdir(parents=True, exist_ok=True)
    return WRITERS[name](content, target)


def check_output_folder(target: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be written to without losing something, before the work that fills it.

    Raises:
        InputError: a file stands in its place, or it has content and `overwrite` is off.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"not a folder  {target}", "a file of that name exists", "choose another name")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        why = "the output folder is not empty; nothing was changed"
        raise InputError(f"will not overwrite  {target}", why, "choose another folder, or pass --overwrite")


def _write_folder(content: "_Content", target: Path, formats: list[str], overwrite: bool) -> list[Path]:
    check_output_folder(target, overwrite)
    content.check(formats)
    target.mkdir(parents=True, exist_ok=True)
    return [path for name in formats for path in WRITERS[name](content, target / FILES[name])]


def _known(formats: Sequence[str] | None) -> list[str]:
    names = FORMATS if formats is None else formats
    if unknown := [name for name in names if name not in FORMATS]:
        raise InputError(f"unknown format {', '.join(unknown)}", "", f"formats are {', '.join(FORMATS)}")
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------- content


@dataclass(frozen=True, eq=False)
class _Content:
    """What several formats share, computed once."""

    scene: "Scene"
    points: PointFilter

    def check(self, formats: Sequence[str]) -> None:
        """Compute what can be refused, before anything is written."""
        if {"ply", "glb"} & set(formats):
            _ = self.index
        if {"cameras", "glb"} & set(formats):
            _ = self.cameras

    @cached_property
    def index(self) -> np.ndarray:
        return self.points.select(self.scene)

    @property
    def xyz(self) -> np.ndarray:
        return self.scene.world_points.reshape(-1, 3)[self.index]

    @property
    def rgb(self) -> np.ndarray:
        return self.scene.images.reshape(-1, 3)[self.index]

    @property
    def is_metric(self) -> bool:
        return self.scene.units == "metre"

    @cached_property
    def depth_scale(self) -> float:
        return io.depth_png_scale(self.scene.depth[self.scene.valid])

    @cached_property
    def cameras(self) -> tuple[io.CameraView, ...]:
        scene, views = self.scene, []
        names = image_names(scene.image_paths)
        for view, (name, (height, width)) in enumerate(zip(names, scene.original_sizes, strict=True)):
            try:
                views.append(io.CameraView(name, width, height, scene.intrinsics[view], scene.cam_to_world[view]))
            except ValueError as error:
                what, fix = f"the camera of view {view} is unusable", "check the weights, or leave out cameras and glb"
                raise CheckFailed(what, str(error), fix) from error
        return tuple(views)


def image_names(paths: Sequence[Path | None]) -> list[str]:
    """Names for `cameras.json`: relative to the folder that all images share, with forward slashes."""
    known = [os.path.abspath(path) for path in paths if path is not None]
    root = os.path.commonpath([os.path.dirname(path) for path in known]) if known else ""
    names = []
    for view, path in enumerate(paths):
        name = f"view_{view:04d}" if path is None else os.path.relpath(os.path.abspath(path), root)
        names.append(name.replace(os.sep, "/").replace("\\", "_"))
    return names


# ---------------------------------------------------------------------------------------------- formats


def _write_scene(content: _Content, path: Path) -> list[Path]:
    arrays = path.with_name("scene.safetensors")
    with atomic_file(arrays) as file:
        file.write(to_safetensors(content.scene.tensors()))
    with atomic_file(path) as file:
        file.write((json.dumps(content.scene.record(), indent=1) + "\n").encode())
    return [arrays, path]


def _write_ply(content: _Content, path: Path) -> list[Path]:
    scene = content.scene
    confidence = None if scene.confidence is None else scene.confidence.ravel()[content.index]
    io.write_ply(path, content.xyz, content.rgb, confidence, is_metric=content.is_metric)
    return [path]


def _write_glb(content: _Content, path: Path) -> list[Path]:
    io.write_glb(path, content.xyz, content.rgb, content.cameras, is_metric=content.is_metric)
    return [path]


def _write_depth(content: _Content, folder: Path) -> list[Path]:
    scene = content.scene
    _fresh_folder(folder)
    paths = [folder / f"{view:04d}.png" for view in range(scene.num_views)]
    for path, depth, valid in zip(paths, scene.depth, scene.valid, strict=True):
        io.write_depth_png(path, np.where(valid, depth, 0), content.depth_scale)
    return paths


def _fresh_folder(folder: Path) -> None:
    """Make the folder for depth maps, or clear it of an earlier run's, which may have had more views."""
    if folder.is_symlink():
        raise InputError(f"will not follow the link  {folder}", "it may lead out of the output folder", "remove it")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9]{4,}\.png", path.name):
            path.unlink()


def _write_cameras(content: _Content, path: Path) -> list[Path]:
    io.write_cameras(path, io.CameraFile(content.cameras, content.is_metric, content.depth_scale))
    return [path]


def _write_preview(content: _Content, path: Path) -> list[Path]:
    picture = preview(content.scene)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
    return [path]


WRITERS: dict[str, Callable[[_Content, Path], list[Path]]] = {
    "scene": _write_scene,
    "ply": _write_ply,
    "glb": _write_glb,
    "depth": _write_depth,
    "cameras": _write_cameras,
    "preview": _write_preview,
}
FILES = {
    "scene": "scene.json",
    "ply": "points.ply",
    "glb": "points.glb",
    "depth": "depth",
    "cameras": "cameras.json",
    "preview": "preview.png",
}
FORMATS = tuple(WRITERS)
