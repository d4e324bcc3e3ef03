"""Depth images as 16-bit grey PNG: value = depth * scale, 0 = invalid."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from geometry.arrays import ArrayLike, float64_array
from geometry.io.common import atomic_file

MAX_VALUE = 65535


def depth_png_scale(depth: ArrayLike) -> float:
    """The scale, PNG value per unit of depth, at which the largest finite depth (...,) just fits 16 bits; 1 if none."""
    values = float64_array(depth, "depth")
    values = values[np.isfinite(values) & (values > 0)]
    return MAX_VALUE / float(values.max()) if values.size else 1.0


def write_depth_png(path: str | Path, depth: ArrayLike, scale: float) -> None:
    """Write depth (H, W) as a 16-bit grey PNG of round(depth * scale); the caller records `scale`.

    0 marks invalid pixels: depth that is not positive and finite. Valid depth is at least 1.

    Raises:
        ValueError: not an image, a scale that is not positive, or a depth beyond 65535 / scale.
    """
    values = float64_array(depth, "depth", ("H", "W"))
    _check_scale(scale)
    valid = np.isfinite(values) & (values > 0)
    stored = np.rint(np.where(valid, values, 0) * scale)
    if stored.max(initial=0) > MAX_VALUE:
        raise ValueError(f"scale: {scale} puts depth {values[valid].max()} beyond {MAX_VALUE}")
    stored = np.where(valid, np.maximum(stored, 1), 0).astype(np.uint16)
    with atomic_file(path) as file:
        Image.fromarray(stored).save(file, format="PNG")


def read_depth_png(path: str | Path, scale: float) -> npt.NDArray[np.float32]:
    """Depth (H, W) of a 16-bit grey PNG, value / scale; 0 where invalid.

    Raises:
        ValueError: not a 16-bit grey PNG, an implausibly large one, or a scale that is not positive.
    """
    _check_scale(scale)
    content = Path(path).read_bytes()
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            if not image.mode.startswith("I"):
                raise ValueError(f"expected 16-bit grey, given mode {image.mode}")
            stored = np.asarray(image, dtype=np.float64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a depth PNG: {error}") from error
    return (stored / scale).astype(np.float32)


def _check_scale(scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: must be positive and finite, given {scale}")
