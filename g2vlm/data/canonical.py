"""Our own scene folder: `scene_meta.json` beside images, depth and masks. The format is described in docs/data.md.

The reader refuses what it does not know; the writer writes what the reader accepts. h, w pixels of a stored frame.
"""

import difflib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from g2vlm.data.frames import (
    INVALID_CODE,
    Frame,
    FrameSource,
    SceneFacts,
    checked_pose,
    read_stored_depth,
)
from g2vlm.data.types import LicenseClass, Quality
from g2vlm.errors import InputError
from g2vlm.images import natural_key, read_image
from geometry import half_pixel_to_integer_grid
from geometry.io.common import atomic_file

META_NAME = "scene_meta.json"
VERSION = 1
MAX_META_BYTES = 256 * 2**20
MAX_NUMBER = 1e15
DepthEncoding = Literal["uint16_mm", "uint16", "npz"]
CAMERA_KEYS = ("fl_x", "fl_y", "cx", "cy", "w", "h")
REQUIRED = ("version", "camera_convention", "is_metric", "frames")
SCENE_KEYS = (
    *REQUIRED, *CAMERA_KEYS, "scene_name", "dataset_name", "camera_model", "pixel_rule", "depth_encoding",
    "depth_scale", "license_class", "quality", "applied_transform",
)  # fmt: skip
FRAME_KEYS = ("frame_name", "image", "depth", "mask", "transform_matrix", "timestamp", *CAMERA_KEYS)
FIXED = {"version": VERSION, "camera_convention": "opencv", "camera_model": "PINHOLE"}


@dataclass(frozen=True, eq=False)
class FrameMeta:
    """One entry of `frames`, checked; paths are absolute and inside the folder."""

    name: str
    image: Path
    depth: Path | None = None
    mask: Path | None = None
    intrinsics: np.ndarray | None = None
    size: tuple[int, int] | None = None
    cam_to_world: np.ndarray | None = None
    timestamp: float | None = None


@dataclass(frozen=True, eq=False)
class SceneMeta:
    """A checked `scene_meta.json`. `depth_scale` is value per unit of depth of the depth PNGs."""

    facts: SceneFacts
    depth_encoding: DepthEncoding
    depth_scale: float
    frames: tuple[FrameMeta, ...]


class CanonicalSource(FrameSource):
    """Scenes in our own format.

    Args:
        root: a scene folder, or a folder of scene folders (at any depth).
        options: those of FrameSource.
    """

    name = "canonical"

    def __init__(self, root: Path, **options: Any):
        super().__init__(**options)
        self.folders = scene_folders(Path(root))
        self._scenes: dict[int, SceneMeta] = {}

    def __len__(self) -> int:
        return len(self.folders)

    def scene(self, scene: int) -> SceneMeta:
        """Metadata of a scene, read on first use."""
        if scene not in self._scenes:
            self._scenes[scene] = read_scene(self.folders[scene])
        return self._scenes[scene]

    def facts(self, scene: int) -> SceneFacts:
        """As in the file."""
        return self.scene(scene).facts

    def frame_names(self, scene: int) -> Sequence[str]:
        """In the order of the file."""
        return [frame.name for frame in self.scene(scene).frames]

    def read_frame(self, scene: int, index: int) -> Frame:
        """One frame, its mask applied to the depth."""
        return read_frame(self.scene(scene), index)


def scene_folders(root: Path) -> list[Path]:
    """Folders that hold a `scene_meta.json`, in natural order.

    Raises:
        InputError: there is none, or `root` is no folder.
    """
    if not root.is_dir():
        raise InputError(f"missing data folder  {root}", "there is no folder of that name", "check the spelling")
    found = sorted(_walk(root), key=natural_key)
    if not found:
        raise InputError(f"no scenes in  {root}", f"no folder in it has a {META_NAME}", "see docs/data.md")
    return found


def has_scenes(root: Path) -> bool:
    """Whether a scene folder lies at `root` or in it."""
    return any(True for _ in _walk(root))


def _walk(root: Path) -> Iterator[Path]:
    """Scene folders at any depth; the inside of a scene is not searched, links are not followed."""
    for folder, children, files in os.walk(root):
        if META_NAME in files:
            children.clear()
            yield Path(folder)


# ---------------------------------------------------------------------------------------------- metadata


class _Record:
    """A JSON object whose fields are fetched by type; errors name file and field."""

    def __init__(self, folder: Path, where: str, content: Any, allowed: Sequence[str]):
        self.folder, self.where, self.content = folder, where, content
        if not isinstance(content, dict):
            raise self.error("", f"it is {type(content).__name__}, not an object")
        for key in content:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                hint = f"did you mean {near[0]}?" if near else f"known fields are {', '.join(allowed)}"
                raise self.error(key, "unknown field", hint)

    def error(self, field: str, why: str, fix: str = "see docs/data.md") -> InputError:
        """What is wrong with a field."""
        place = ".".join(part for part in (self.where, field) if part)
        return InputError(f"bad scene file  {self.folder / META_NAME}: {place or 'the file'}", why, fix)

    def has(self, field: str) -> bool:
        """Whether the field is there; null counts as absent."""
        return self.content.get(field) is not None

    def number(self, field: str) -> float:
        """A finite number."""
        value = self.content.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
            raise self.error(field, f"given {_short(value)}, expected a finite number")
        return float(value)

    def text(self, field: str, default: str | None = None) -> str:
        """A string that is not empty."""
        value = self.content.get(field, default)
        if not isinstance(value, str) or not value:
            raise self.error(field, f"given {_short(value)}, expected text")
        return value

    def choice(self, field: str, choices: Sequence[str], default: str) -> Any:
        """One of some strings."""
        if (value := self.content.get(field, default)) not in choices:
            raise self.error(field, f"given {_short(value)}, expected one of {', '.join(choices)}")
        return value

    def path(self, field: str) -> Path | None:
        """A file inside the folder; it need not exist yet."""
        if not self.has(field):
            return None
        path = self.folder / self.text(field)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise self.error(field, f"{self.text(field)} lies outside the scene folder", "keep every file inside it")
        return path

    def pose(self, field: str) -> np.ndarray | None:
        """A camera-to-world matrix."""
        return checked_pose(self.content[field], str(self.error(field, "").what)) if self.has(field) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_scene(folder: Path) -> SceneMeta:
    """Read and check `folder/scene_meta.json`.

    Raises:
        InputError: the file and the field at fault, and the nearest known name for an unknown field.
    """
    content = _read_json(folder / META_NAME)
    scene = _Record(folder, "", content, SCENE_KEYS)
    for field in REQUIRED:
        if field not in scene.content:
            raise scene.error(field, "it is missing")
    for field, expected in FIXED.items():
        if (given := scene.content.get(field, expected)) != expected:
            raise scene.error(field, f"given {_short(given)}, expected {expected!r}")
    encoding: DepthEncoding = scene.choice("depth_encoding", get_args(DepthEncoding), "uint16_mm")
    scene.pose("applied_transform")
    entries = scene.content["frames"]
    if not isinstance(entries, list) or not entries:
        raise scene.error("frames", f"given {_short(entries)}, expected a list of frames")
    frames = tuple(_frame(scene, i, entry) for i, entry in enumerate(entries))
    _check_names(scene, frames)
    return SceneMeta(_facts(scene), encoding, _depth_scale(scene, encoding), frames)


def _read_json(path: Path) -> Any:
    what = f"cannot read scene file  {path}"
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise InputError(what, f"it is larger than {MAX_META_BYTES >> 20} MiB", "split the scene")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(what, error.strerror or str(error), "check the file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(what, f"not JSON: {error}", "write it again") from error


def _facts(scene: _Record) -> SceneFacts:
    is_metric = scene.content["is_metric"]
    if not isinstance(is_metric, bool):
        raise scene.error("is_metric", f"given {_short(is_metric)}, expected true or false")
    return SceneFacts(
        name=scene.text("scene_name", scene.folder.resolve().name),
        dataset=scene.text("dataset_name", "canonical"),
        is_metric=is_metric,
        quality=scene.choice("quality", get_args(Quality), "high"),
        license_class=scene.choice("license_class", get_args(LicenseClass), "unknown"),
    )


def _depth_scale(scene: _Record, encoding: DepthEncoding) -> float:
    if encoding != "uint16":
        if scene.has("depth_scale"):
            raise scene.error("depth_scale", f"it has no meaning with depth_encoding {encoding}")
        return 1000.0
    if not (scale := scene.number("depth_scale")) > 0:
        raise scene.error("depth_scale", f"given {scale}, expected a positive number: stored value per unit of depth")
    return scale


def _frame(scene: _Record, index: int, entry: Any) -> FrameMeta:
    frame = _Record(scene.folder, f"frames[{index}]", entry, FRAME_KEYS)
    image = frame.path("image")
    if image is None:
        raise frame.error("image", "it is missing")
    intrinsics, size = _camera(scene, frame)
    depth, mask = frame.path("depth"), frame.path("mask")
    if mask is not None and depth is None:
        raise frame.error("mask", "a mask marks usable depth, and there is no depth")
    return FrameMeta(
        name=frame.text("frame_name", image.stem),
        image=image,
        depth=depth,
        mask=mask,
        intrinsics=intrinsics,
        size=size,
        cam_to_world=frame.pose("transform_matrix"),
        timestamp=frame.number("timestamp") if frame.has("timestamp") else None,
    )


def _camera(scene: _Record, frame: _Record) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """K (3, 3) on the integer grid and (h, w), from the frame or else from the scene."""
    holder = frame if any(frame.has(key) for key in CAMERA_KEYS) else scene
    if not any(holder.has(key) for key in CAMERA_KEYS):
        return None, None
    fx, fy, cx, cy, width, height = (holder.number(key) for key in CAMERA_KEYS)
    for field, value in (("fl_x", fx), ("fl_y", fy), ("w", width), ("h", height)):
        if not value > 0 or (field in "wh" and value % 1):
            raise holder.error(field, f"given {value:g}, expected a positive {'whole ' * (field in 'wh')}number")
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    if scene.choice("pixel_rule", ("integer", "half"), "integer") == "half":
        K = half_pixel_to_integer_grid(K)
    return K.numpy(), (int(height), int(width))


def _check_names(scene: _Record, frames: Sequence[FrameMeta]) -> None:
    seen: set[str] = set()
    for i, frame in enumerate(frames):
        if frame.name in seen:
            raise scene.error(f"frames[{i}].frame_name", f"{frame.name} occurs twice")
        seen.add(frame.name)


# ---------------------------------------------------------------------------------------------- frames


def read_frame(scene: SceneMeta, index: int) -> Frame:
    """Image, masked depth and camera of a frame.

    Raises:
        InputError: a file is missing or damaged, sizes differ, or the depth has values that mean nothing.
    """
    meta = scene.frames[index]
    image = read_image(meta.image).pixels
    if meta.size is not None and meta.size != image.shape[:2]:
        why = f"it has {image.shape[1]} x {image.shape[0]} pixels, w x h say {meta.size[1]} x {meta.size[0]}"
        raise InputError(f"wrong image size  {meta.image}", why, "intrinsics belong to one size")
    depth = None if meta.depth is None else _read_depth(meta.depth, scene)
    if depth is not None and depth.shape != image.shape[:2]:
        why = f"it has {depth.shape[1]} x {depth.shape[0]} pixels, the image {image.shape[1]} x {image.shape[0]}"
        raise InputError(f"wrong depth size  {meta.depth}", why, "image and depth must belong to the same camera")
    if depth is not None and meta.mask is not None:
        depth = np.where(_read_mask(meta.mask, depth.shape), depth, 0)
    return Frame(meta.name, image, depth, meta.intrinsics, meta.cam_to_world)


def _read_depth(path: Path, scene: SceneMeta) -> np.ndarray:
    """(h, w) float32, 0 = invalid."""
    if scene.depth_encoding != "npz":
        stored = read_stored_depth(path)
        return np.where(stored == INVALID_CODE, 0, stored / scene.depth_scale).astype(np.float32)
    depth = _read_npz(path)
    wrong = ~(np.isfinite(depth) & (depth >= 0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        why = f"{wrong.sum():,} values are NaN, infinite or negative, the first at row {row}, column {column}"
        raise InputError(f"bad depth  {path}", why, "write 0 where the depth is unknown")
    return depth.astype(np.float32)


def _read_npz(path: Path) -> np.ndarray:
    what, fix = f"cannot read depth  {path}", "expected an npz with one float array named depth"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            depth = arrays["depth"]
    except OSError as error:
        raise InputError(what, error.strerror or str(error), fix) from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(what, str(error).strip("'\""), fix) from error
    if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating):
        raise InputError(what, f"depth is {depth.dtype} of shape {depth.shape}", fix)
    return depth


def _read_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) bool, True = use."""
    mask = read_image(path).pixels.max(axis=-1) > 0
    if mask.shape != shape:
        why = f"it has {mask.shape[1]} x {mask.shape[0]} pixels, the depth {shape[1]} x {shape[0]}"
        raise InputError(f"wrong mask size  {path}", why, "masks have the size of the depth")
    return mask


# ---------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class SceneWriter:
    """Writes scenes in our format.

    Args:
        folder: of the scene; made if missing.
        facts: of the scene.
        depth_encoding: of all frames; `uint16_mm` takes metres below 65.5.
        depth_scale: stored value per unit of depth, for `uint16`.
    """

    folder: Path
    facts: SceneFacts
    depth_encoding: DepthEncoding = "uint16_mm"
    depth_scale: float = 1000.0

    def write(self, frames: Iterable[Frame], timestamps: Sequence[float] | None = None) -> Path:
        """Write every frame, then `scene_meta.json`, which makes the folder a scene. Returns its path.

        Raises:
            InputError: two frames of one name, a name that is no file name, or depth beyond the encoding.
        """
        records: list[dict[str, Any]] = []
        for frame in frames:
            records.append(self._write_frame(frame, {record["frame_name"] for record in records}))
        if timestamps is not None:
            for record, timestamp in zip(records, timestamps, strict=True):
                record["timestamp"] = timestamp
        path = self.folder / META_NAME
        with atomic_file(path) as file:
            file.write((json.dumps(self._head | {"frames": records}, indent=1, allow_nan=False) + "\n").encode())
        return path

    @property
    def _head(self) -> dict[str, Any]:
        scale = {"depth_scale": self.depth_scale} if self.depth_encoding == "uint16" else {}
        return {
            "version": VERSION,
            "scene_name": self.facts.name,
            "dataset_name": self.facts.dataset,
            "camera_convention": "opencv",
            "camera_model": "PINHOLE",
            "pixel_rule": "integer",
            "is_metric": self.facts.is_metric,
            "depth_encoding": self.depth_encoding,
            **scale,
            "quality": self.facts.quality,
            "license_class": self.facts.license_class,
        }

    def _write_frame(self, frame: Frame, taken: set[str]) -> dict[str, Any]:
        name = frame.name
        if name in taken or not name or Path(name).name != name or name.startswith("."):
            why = "it occurs twice" if name in taken else "it is no plain file name"
            raise InputError(f"cannot write frame  {name}", why, "give every frame a name of its own")
        record: dict[str, Any] = {"frame_name": name, "image": f"images/{name}.png"}
        buffer = io.BytesIO()
        Image.fromarray(frame.image).save(buffer, format="PNG")
        self._save(record["image"], buffer.getvalue())
        if frame.depth is not None:
            suffix = "npz" if self.depth_encoding == "npz" else "png"
            record["depth"] = f"depth/{name}.{suffix}"
            self._save(record["depth"], self._encoded(frame.depth, name))
        if frame.cam_to_world is not None:
            record["transform_matrix"] = frame.cam_to_world.tolist()
        if frame.intrinsics is not None:
            K, (height, width) = frame.intrinsics, frame.image.shape[:2]
            if K[0, 1] != 0:
                raise InputError(f"cannot write frame  {name}", f"its intrinsics have skew {K[0, 1]:g}", "rectify it")
            values = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
            record |= dict(zip(CAMERA_KEYS, (*map(float, values), width, height), strict=True))
        return record

    def _encoded(self, depth: np.ndarray, name: str) -> bytes:
        known = np.where(np.isfinite(depth) & (depth > 0), depth, 0)
        buffer = io.BytesIO()
        if self.depth_encoding == "npz":
            np.savez_compressed(buffer, depth=known.astype(np.float32))
            return buffer.getvalue()
        scale = self.depth_scale if self.depth_encoding == "uint16" else 1000.0
        stored = np.rint(known * scale)
        if stored.max(initial=0) >= INVALID_CODE:
            why = f"depth {known.max():.4g} at {scale:g} values per unit is beyond 16 bits"
            raise InputError(f"cannot write frame  {name}", why, "use the encoding npz, or another depth_scale")
        Image.fromarray(stored.astype(np.uint16)).save(buffer, format="PNG")
        return buffer.getvalue()

    def _save(self, relative: str, content: bytes) -> None:
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
