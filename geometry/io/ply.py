"""Binary PLY point clouds by numpy's structured arrays."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from geometry.arrays import ArrayLike, finite_array, float64_array
from geometry.io.common import CONVENTION, FORMAT_VERSION, UNITS, atomic_file, color_array

MAX_HEADER_BYTES = 1 << 16
COLORS = ("red", "green", "blue")

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Points of a PLY file.

    Attributes:
        points: (N, 3) float32.
        colors: (N, 3) uint8 RGB, if stored.
        confidence: (N,) float32, if stored.
        comments: the comment lines of the header.
    """

    points: npt.NDArray[np.float32]
    colors: npt.NDArray[np.uint8] | None
    confidence: npt.NDArray[np.float32] | None
    comments: tuple[str, ...]


PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4", "float": "<f4",
    "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "float32": "<f4",
    "double": "<f8", "float64": "<f8",
}  # fmt: skip
PLY_NAMES = {"<f4": "float", "u1": "uchar"}


def write_ply(
    path: str | Path,
    points: ArrayLike,
    colors: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
    *,
    is_metric: bool,
) -> None:
    """Write a binary little-endian PLY: float x, y, z; uchar red, green, blue; float confidence.

    Args:
        path: file to write.
        points: (N, 3) world points.
        colors: (N, 3) uint8 RGB.
        confidence: (N,).
        is_metric: whether the unit is the metre; written as a comment.

    Raises:
        ValueError: a shape or dtype is wrong, or a point is not finite.
    """
    xyz = finite_array(points, "points", ("N", 3))
    columns: list[tuple[str, str, npt.NDArray[Any]]] = [(axis, "<f4", xyz[:, k]) for k, axis in enumerate("xyz")]
    if colors is not None:
        rgb = color_array(colors, len(xyz))
        columns += [(name, "u1", rgb[:, k]) for k, name in enumerate(COLORS)]
    if confidence is not None:
        columns.append(("confidence", "<f4", float64_array(confidence, "confidence", (len(xyz),))))
    vertices = np.empty(len(xyz), dtype=[(name, kind) for name, kind, _ in columns])
    for name, _, values in columns:
        vertices[name] = values
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment version {FORMAT_VERSION}",
        f"comment units {UNITS[is_metric]}",
        f"comment convention {CONVENTION}",
        f"element vertex {len(xyz)}",
        *(f"property {PLY_NAMES[kind]} {name}" for name, kind, _ in columns),
        "end_header",
    ]
    with atomic_file(path) as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        vertices.tofile(file)


def read_ply(path: str | Path) -> PointCloud:
    """Read the vertices of a binary little-endian PLY; other elements must follow them and are left alone.

    Raises:
        ValueError: another format, a malformed header, a missing coordinate, or fewer bytes than the header promises.
    """
    file_path = Path(path)
    with file_path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
        end = head.find(b"end_header\n")
        if not head.startswith(b"ply\n") or end < 0:
            raise ValueError(f"{path}: header: not a PLY file, or its header exceeds {MAX_HEADER_BYTES} bytes")
        lines = head[:end].decode("ascii", errors="replace").splitlines()[1:]
        count, dtype = _vertex_layout(file_path, lines)
        start = end + len(b"end_header\n")
        available = os.fstat(file.fileno()).st_size - start
        if count * dtype.itemsize > available:
            raise ValueError(f"{path}: element vertex: {count} vertices need more than the {available} bytes present")
        file.seek(start)
        vertices = np.fromfile(file, dtype=dtype, count=count)
    return PointCloud(
        points=_columns(vertices, ("x", "y", "z"), np.float32),
        colors=_optional_columns(vertices, COLORS, np.uint8),
        confidence=vertices["confidence"].astype(np.float32) if "confidence" in (dtype.names or ()) else None,
        comments=tuple(line.removeprefix("comment ") for line in lines if line.startswith("comment ")),
    )


def _vertex_layout(path: Path, lines: Sequence[str]) -> tuple[int, np.dtype[np.void]]:
    """Header lines -> number of vertices and the structure of one."""
    if "format binary_little_endian 1.0" not in lines:
        raise ValueError(f"{path}: format: only binary_little_endian 1.0 is read")
    declarations = [line for line in lines if line.startswith(("element ", "property "))]
    vertex = re.fullmatch("element vertex ([0-9]{1,12})", declarations[0] if declarations else "")
    if vertex is None:
        raise ValueError(f"{path}: element vertex: must come first and state a count")
    fields: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line.startswith("property "), declarations[1:]):
        kind, _, name = line.removeprefix("property ").partition(" ")
        if kind not in PLY_TYPES or name in fields:
            raise ValueError(f"{path}: {line}: vertex properties must be distinct scalars of a known type")
        fields[name] = PLY_TYPES[kind]
    if any(fields.get(name, "u1") != "u1" for name in COLORS):
        raise ValueError(f"{path}: {', '.join(COLORS)}: must be uchar")
    missing = {"x", "y", "z"} - set(fields)
    if missing:
        raise ValueError(f"{path}: element vertex: no property {', '.join(sorted(missing))}")
    return int(vertex[1]), np.dtype(list(fields.items()))


def _columns(vertices: npt.NDArray[np.void], names: Sequence[str], kind: type[Number]) -> npt.NDArray[Number]:
    return np.stack([vertices[name].astype(kind) for name in names], axis=-1)


def _optional_columns(
    vertices: npt.NDArray[np.void], names: Sequence[str], kind: type[Number]
) -> npt.NDArray[Number] | None:
    return _columns(vertices, names, kind) if set(names) <= set(vertices.dtype.names or ()) else None
