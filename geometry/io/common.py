"""What every format shares: whole-file writing, the conventions written into headers, colour checks."""

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from geometry.arrays import ArrayLike, check_shape, to_numpy

FORMAT_VERSION = 1
CONVENTION = "OpenCV axes: +x right, +y down, +z forward; cam_to_world; pixel (0,0) has its centre at (0,0)"
UNITS = {True: "metres", False: "up to scale"}  # by is_metric


@contextmanager
def atomic_file(path: str | Path) -> Generator[IO[bytes], None, None]:
    """Open a temporary file beside `path`; on success it takes its place, on failure nothing remains of it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def color_array(colors: ArrayLike, count: int) -> npt.NDArray[np.uint8]:
    """RGB (count, 3) on the host.

    Raises:
        ValueError: another shape or dtype.
    """
    rgb = to_numpy(colors)
    check_shape(rgb, "colors", (count, 3))
    if rgb.dtype != np.uint8:
        raise ValueError(f"colors: expected uint8, given {rgb.dtype}")
    return rgb
