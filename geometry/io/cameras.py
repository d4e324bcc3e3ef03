"""`cameras.json`: name, size, intrinsics and pose of every view, in a versioned file that is read strictly."""

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from geometry.arrays import FloatArray, finite_array
from geometry.io.common import CONVENTION, FORMAT_VERSION, UNITS, atomic_file

MAX_BYTES = 1 << 24
RIGID_TOLERANCE = 1e-3  # on the entries of R R^T - I and of constant rows; float32 poses pass

Value = TypeVar("Value")
Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class CameraView:
    """One image and its camera.

    Attributes:
        image: name of the image, a relative path with forward slashes.
        width: pixels.
        height: pixels.
        intrinsics: (3, 3), in pixels of this size.
        cam_to_world: (4, 4) rigid.
    """

    image: str
    width: int
    height: int
    intrinsics: Array
    cam_to_world: Array

    def __post_init__(self) -> None:
        _check_image_name(self.image)
        if self.width < 1 or self.height < 1:
            raise ValueError(f"width, height: must be positive, given {self.width} x {self.height}")
        _check_intrinsics(self.intrinsics)
        _check_rigid(self.cam_to_world)


@dataclass(frozen=True, eq=False)
class CameraFile:
    """Content of `cameras.json`.

    Attributes:
        views: in the order of the input.
        is_metric: whether translations are in metres.
        depth_scale: value per unit of depth of the depth PNGs beside the file, if there are any.
    """

    views: tuple[CameraView, ...]
    is_metric: bool
    depth_scale: float | None = None

    def __post_init__(self) -> None:
        if self.depth_scale is not None and not (self.depth_scale > 0 and math.isfinite(self.depth_scale)):
            raise ValueError(f"depth_scale: must be positive and finite, given {self.depth_scale}")


def write_cameras(path: str | Path, cameras: CameraFile) -> None:
    """Write `cameras.json`: version, convention, units, depth scale, and name, size, K and pose of each view."""
    document = {
        "version": FORMAT_VERSION,
        "convention": CONVENTION,
        "units": UNITS[cameras.is_metric],
        "depth_scale": cameras.depth_scale,
        "views": [
            {
                "image": view.image,
                "width": view.width,
                "height": view.height,
                "intrinsics": view.intrinsics.tolist(),
                "cam_to_world": view.cam_to_world.tolist(),
            }
            for view in cameras.views
        ],
    }
    with atomic_file(path) as file:
        file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def read_cameras(path: str | Path) -> CameraFile:
    """Read `cameras.json`, strictly.

    Raises:
        ValueError: more than `MAX_BYTES`, not JSON, another version or convention, a missing field, or a field
            that is not what `CameraView` describes.
    """
    with _complaints_name(str(path)):
        document = _load_json(Path(path))
        if _member(document, "version", int) != FORMAT_VERSION:
            raise ValueError(f"version: expected {FORMAT_VERSION}, given {document['version']}")
        if _member(document, "convention", str) != CONVENTION:
            raise ValueError(f"convention: expected {CONVENTION!r}, given {document['convention']!r}")
        units = _member(document, "units", str)
        if units not in UNITS.values():
            raise ValueError(f"units: expected one of {list(UNITS.values())}, given {units!r}")
        has_depth = document.get("depth_scale") is not None
        return CameraFile(
            views=tuple(_view(record, k) for k, record in enumerate(_list(document, "views"))),
            is_metric=units == UNITS[True],
            depth_scale=_member(document, "depth_scale", float) if has_depth else None,
        )


# Reading


def _load_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_BYTES`."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    try:
        document = json.loads(content, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError("expected a JSON object")
    return cast("dict[str, Any]", document)


def _bounded_int(digits: str) -> int:
    """An integer that fits a float and a pixel count."""
    if len(digits) > 18:
        raise ValueError(f"an integer of {len(digits)} digits is not allowed")
    return int(digits)


def _member(record: Mapping[str, Any], name: str, kind: type[Value]) -> Value:
    """A required field of the given JSON type; an integer is a float too, a boolean is neither."""
    if name not in record:
        raise ValueError(f"{name}: missing")
    value = record[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}: expected {kind.__name__}, given {type(value).__name__}")
    return value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    return cast("list[Any]", _member(record, name, list))


def _view(record: object, index: int) -> CameraView:
    with _complaints_name(f"views[{index}]"):
        if not isinstance(record, dict):
            raise ValueError("expected an object")
        fields = cast("dict[str, Any]", record)
        return CameraView(
            image=_member(fields, "image", str),
            width=_member(fields, "width", int),
            height=_member(fields, "height", int),
            intrinsics=_matrix(fields, "intrinsics", 3),
            cam_to_world=_matrix(fields, "cam_to_world", 4),
        )


@contextmanager
def _complaints_name(place: str) -> Generator[None, None, None]:
    """Put `place` in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _matrix(record: Mapping[str, Any], name: str, size: int) -> FloatArray:
    """A size x size list of lists of numbers."""
    rows = _list(record, name)
    if len(rows) != size or not all(_is_row(row, size) for row in rows):
        raise ValueError(f"{name}: expected {size} rows of {size} numbers")
    return np.array(rows, dtype=np.float64)


def _is_row(row: object, size: int) -> bool:
    numbers = cast("list[Any]", row) if isinstance(row, list) else []
    return len(numbers) == size and all(type(value) in (int, float) for value in numbers)


# Checks of a view


def _check_image_name(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(mark in name for mark in "\\\0"):
        raise ValueError(f"image: must be a relative path with forward slashes that stays inside, given {name!r}")


def _check_intrinsics(intrinsics: Array) -> None:
    K = finite_array(intrinsics, "intrinsics", (3, 3))
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(f"intrinsics: focal lengths must be positive, given {K[0, 0]} and {K[1, 1]}")
    if np.abs(K[2] - [0, 0, 1]).max() > RIGID_TOLERANCE:
        raise ValueError(f"intrinsics: last row must be 0 0 1, given {K[2].tolist()}")


def _check_rigid(cam_to_world: Array) -> None:
    pose = finite_array(cam_to_world, "cam_to_world", (4, 4))
    rotation = pose[:3, :3]
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > RIGID_TOLERANCE:
        raise ValueError(f"cam_to_world: last row must be 0 0 0 1, given {pose[3].tolist()}")
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > RIGID_TOLERANCE or np.linalg.det(rotation) < 0:
        raise ValueError("cam_to_world: the upper left 3x3 must be a rotation")
