"""From RGB images to what the semantic encoder takes, by the two rules of image size, with numpy and PIL alone.

H, W are pixels of an image; N images; p side of a patch; gh, gw patches; n those of all images. Sizes are (height,
width).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from g2vlm.config import CLIP_MEAN, CLIP_STD, VisionTowerConfig
from g2vlm.errors import InputError
from g2vlm.images import PATCH, resize

MERGE, FRAMES = 2, 2
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
MAX_ASPECT = 200


@dataclass(frozen=True)
class SemanticRule:
    """How images are prepared for the semantic encoder: sides in multiples of two patches, an area within limits.

    Args:
        squash: side of the square that images are first stretched to, whatever their aspect ratio; None keeps it.
        min_pixels, max_pixels: limits of the area (Qwen2-VL's dynamic resolution).
        patch_size: side of a patch in pixels.
        mean, std: normalisation of red, green and blue in [0, 1].

    Raises:
        InputError: a side or limits that no image can be brought to.
    """

    squash: int | None = None
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    patch_size: int = PATCH
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        sides = (self.patch_size,) if self.squash is None else (self.patch_size, self.squash)
        if not all(type(value) is int and value > 0 for value in (*sides, self.min_pixels, self.max_pixels)):
            raise InputError("unusable rule for semantic images", str(self), "give whole positive numbers of pixels")
        if not max(self.min_pixels, self.unit**2) <= self.max_pixels:
            raise InputError(
                "unusable rule for semantic images",
                f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels} or a token's {self.unit**2}",
                "raise max_pixels",
            )
        for name in ("mean", "std"):
            object.__setattr__(self, name, _colour(name, getattr(self, name)))
        if min(self.std) <= 0:
            raise InputError("unusable rule for semantic images", f"std is {self.std}", "give positive numbers")

    @property
    def unit(self) -> int:
        """Side of a merged token in pixels."""
        return self.patch_size * MERGE

    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "mean": [*self.mean], "std": [*self.std]}

    def for_tower(self, tower: VisionTowerConfig) -> "SemanticRule":
        """The same sizes with the patches and the normalisation of a vision tower."""
        return replace(self, patch_size=tower.patch_size, mean=tower.image_mean, std=tower.image_std)

    @classmethod
    def official(cls, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> "SemanticRule":
        """As the released code: squashed to 768 x 768; with the default limits always 756 x 756, 729 tokens."""
        return cls(768, min_pixels, max_pixels)

    @classmethod
    def native(cls, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> "SemanticRule":
        """As Qwen2-VL: the image's own size within the limits, its aspect ratio kept as well as multiples allow."""
        return cls(None, min_pixels, max_pixels)


def _colour(name: str, values: object) -> tuple[float, ...]:
    numbers = tuple(values) if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(value, int | float) for value in numbers):
        raise InputError("unusable rule for semantic images", f"{name} is {values}", "give three numbers")
    return numbers


def smart_size(size: tuple[int, int], min_pixels: int, max_pixels: int, unit: int) -> tuple[int, int]:
    """Qwen2-VL's dynamic resolution: (height, width) in multiples of `unit`, an area within [min_pixels, max_pixels].

    The aspect ratio is kept as well as the multiples allow.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    height, width = size
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(
            "an image is too narrow",
            f"{width} x {height} is beyond the aspect ratio {MAX_ASPECT}:1 of the semantic encoder",
            "crop it",
        )
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / unit)) for side in size)
    elif rows * columns * unit**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / unit) for side in size)
    return rows * unit, columns * unit


def semantic_grid(size: tuple[int, int], rule: SemanticRule) -> tuple[int, int]:
    """Rows and columns of patches that an image of `size` (height, width) gets; 2 x 2 patches become one token.

    Raises:
        InputError: one side is more than 200 times the other, and the rule does not squash.
    """
    squashed = size if rule.squash is None else (rule.squash, rule.squash)
    height, width = smart_size(squashed, rule.min_pixels, rule.max_pixels, rule.unit)
    return height // rule.patch_size, width // rule.patch_size


def semantic_pixels(images: Sequence[np.ndarray], rule: SemanticRule) -> tuple[np.ndarray, np.ndarray]:
    """The patches of images (H, W, 3), uint8 RGB: `pixel_values` (n, 6 p^2) float32, `image_grid_thw` (N, 3) int64.

    Resizing is PIL's bicubic, squash and final size one after the other as in the released code. A patch holds
    (channel, time, row, col) with the still image twice in time; patches come image after image, merge block by merge
    block (row-major), the 2 x 2 patches of a block together.

    Raises:
        InputError: as in `semantic_grid`.
    """
    grids = [semantic_grid((image.shape[0], image.shape[1]), rule) for image in images]
    patches = [_patches(_scaled(image, grid, rule), rule.patch_size) for image, grid in zip(images, grids, strict=True)]
    grid_thw = np.array([(1, *grid) for grid in grids], dtype=np.int64).reshape(-1, 3)
    none = np.zeros((0, 3 * FRAMES * rule.patch_size**2), np.float32)
    return np.concatenate([none, *patches]), grid_thw


def _scaled(pixels: np.ndarray, grid: tuple[int, int], rule: SemanticRule) -> np.ndarray:
    """(H, W, 3) uint8 -> (p gh, p gw, 3) float32, normalised."""
    if rule.squash is not None:
        pixels = resize(pixels, (rule.squash, rule.squash), Image.Resampling.BICUBIC)
    resized = resize(pixels, (grid[0] * rule.patch_size, grid[1] * rule.patch_size), Image.Resampling.BICUBIC)
    return ((resized.astype(np.float64) / 255 - np.array(rule.mean)) / np.array(rule.std)).astype(np.float32)


def _patches(pixels: np.ndarray, size: int) -> np.ndarray:
    """Cut (H, W, 3) into (gh * gw, 3 * 2 * p * p) patches of side p = `size` in merge-block order."""
    height, width, channels = pixels.shape
    blocks = pixels.reshape(height // size // MERGE, MERGE, size, width // size // MERGE, MERGE, size, channels)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # (block row, block col, row, col, channel, y, x)
    frames = np.repeat(blocks[..., None, :, :], FRAMES, axis=-3)  # (..., channel, time, y, x)
    return frames.reshape(-1, channels * FRAMES * size**2)
