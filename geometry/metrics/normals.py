"""Angular error of surface normals."""

from dataclasses import dataclass

import numpy as np

from geometry.arrays import ArrayLike, FloatArray, bool_array, check_finite, float64_array


@dataclass(frozen=True)
class NormalMetrics:
    """Angles in degrees between predicted and true normals, over `valid_pixels` pixels."""

    mean_deg: float
    median_deg: float
    valid_pixels: int


def normal_metrics(pred: ArrayLike, gt: ArrayLike, valid: ArrayLike) -> NormalMetrics:
    """Angle between oriented normals, atan2(|p x g|, p . g), over a mask.

    Args:
        pred: (..., 3) predicted normals of any length, in the frame of `gt`.
        gt: (..., 3) true normals of any length.
        valid: (...,) bool, pixels to score.

    Raises:
        ValueError: shapes differ, no pixel is valid, or a normal at a valid pixel is zero or not finite.
    """
    target = float64_array(gt, "gt")
    source = float64_array(pred, "pred", target.shape)
    mask = bool_array(valid, "valid", target.shape[:-1])
    if target.shape[-1] != 3:
        raise ValueError(f"gt: expected shape (..., 3), given {target.shape}")
    if not mask.any():
        raise ValueError("valid: no valid pixel")
    p, g = _directions(source[mask], "pred"), _directions(target[mask], "gt")  # (n, 3)
    sine: FloatArray = np.linalg.norm(np.cross(p, g), axis=-1)  # (n,), times both lengths, as the cosine
    angle = np.degrees(np.arctan2(sine, np.sum(p * g, axis=-1)))
    return NormalMetrics(float(np.mean(angle)), float(np.median(angle)), int(np.count_nonzero(mask)))


def _directions(normals: FloatArray, name: str) -> FloatArray:
    check_finite(normals, f"{name} at valid pixels")
    if not np.any(normals, axis=-1).all():
        raise ValueError(f"{name}: a normal at a valid pixel is zero, mask it out")
    return normals
