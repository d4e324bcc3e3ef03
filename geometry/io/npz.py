"""NPZ archives of plain arrays, never pickled."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from geometry.arrays import ArrayLike, to_numpy
from geometry.io.common import atomic_file

MAX_BYTES = 1 << 34


def write_npz(path: str | Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write named arrays, compressed.

    Raises:
        ValueError: an array holds Python objects.
    """
    host = {name: to_numpy(value) for name, value in arrays.items()}
    for name, array in host.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: an array of Python objects cannot be stored")
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in host.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_npz(path: str | Path, max_bytes: int = MAX_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Read every array of an NPZ file, never unpickling.

    Raises:
        ValueError: not an NPZ file, a damaged or pickled member, or more than `max_bytes` once unpacked.
    """
    damaged = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, MemoryError)
    name = "archive"
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > max_bytes:
            raise ValueError(f"unpacks to {size} bytes, the limit is {max_bytes}")
        arrays: dict[str, npt.NDArray[Any]] = {}
        with np.load(path, allow_pickle=False) as data:
            for name in data.files:
                arrays[name] = np.asarray(data[name])
        return arrays
    except damaged as error:
        raise ValueError(f"{path}: {name}: not readable as NPZ: {error}") from error
