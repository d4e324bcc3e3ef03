"""From a stored image to a view of the size asked for, and colour augmentation. Everything that moves pixels moves K.

Boxes are measured from pixel edges, where an image spans 0..W and 0..H and the centre of pixel (0, 0) is at (0.5, 0.5);
K is on the integer grid, as everywhere. S views, H, W pixels.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from g2vlm.errors import InputError
from geometry import crop_intrinsics, resize_intrinsics

Fit = Literal["crop", "stretch"]
MIN_MARGIN = 0.2  # of the image side, from the principal point to the nearest border (released data code)
FOCAL_ZOOM = (0.9, 0.1, 0.5)  # side of the crop: 0.9 + 0.1 Beta(0.5, 0.5) (G2VLM data code)
SHARED_DRAW = 0.7  # how often all views get the same colour change (G2VLM data code)
JITTER_CHANCE, GREY_CHANCE = 0.9, 0.05
BRIGHTNESS = CONTRAST = SATURATION = (0.5, 1.5)
HUE = (-0.1, 0.1)


@dataclass(frozen=True)
class Box:
    """A part of an image: edges and extent in its pixels, fractions allowed."""

    top: float
    left: float
    height: float
    width: float


# ---------------------------------------------------------------------------------------------- crop and resize


def whole_box(size: tuple[int, int]) -> Box:
    """All of an image of `size` (H, W)."""
    return Box(0.0, 0.0, float(size[0]), float(size[1]))


def centred_box(size: tuple[int, int], target: tuple[int, int], K: np.ndarray | None = None, zoom: float = 1.0) -> Box:
    """The largest box of the target's aspect with the principal point in its middle, its sides scaled by `zoom`.

    The box may start between two pixels, so the principal point of the resized view is exactly its centre.

    Args:
        size: (H, W) of the image.
        target: (H, W) the box will be resized to.
        K: (3, 3); without it the image centre is the middle.
        zoom: in (0, 1].

    Raises:
        InputError: the principal point is nearer to a border than a fifth of that side.
    """
    middle_y, middle_x = crop_centre(size, K)
    half_x, half_y = min(middle_x, size[1] - middle_x), min(middle_y, size[0] - middle_y)
    scale = min(half_x / target[1], half_y / target[0]) * zoom
    half_y, half_x = scale * target[0], scale * target[1]
    return Box(middle_y - half_y, middle_x - half_x, 2 * half_y, 2 * half_x)


def crop_centre(size: tuple[int, int], K: np.ndarray | None, name: str = "") -> tuple[float, float]:
    """Where the principal point of an image of `size` is, (y, x) from its edges; without K its middle.

    Raises:
        InputError: it is nearer to a border than a fifth of that side; `name` tells of which view.
    """
    height, width = size
    if K is None:
        return height / 2, width / 2
    y, x = float(K[1, 2]) + 0.5, float(K[0, 2]) + 0.5
    if min(x, width - x) < MIN_MARGIN * width or min(y, height - y) < MIN_MARGIN * height:
        raise InputError(
            f"cannot crop around the principal point  {name}".rstrip(),
            f"it is at ({x - 0.5:.1f}, {y - 0.5:.1f}) of a {width} x {height} image",
            f"it must keep {MIN_MARGIN:.0%} of each side to every border; check the intrinsics",
        )
    return y, x


def resize_image(image: np.ndarray, box: Box, target: tuple[int, int]) -> np.ndarray:
    """A part of (H, W, 3) uint8 as (h, w, 3): Lanczos when it shrinks, bicubic when it grows."""
    shrinks = box.width >= target[1] and box.height >= target[0]
    rule = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    return np.asarray(Image.fromarray(image).resize((target[1], target[0]), rule, box=corners))


def resize_nearest(values: np.ndarray, box: Box, target: tuple[int, int]) -> np.ndarray:
    """A part of (H, W) as (h, w) by the pixel in which each new centre lies; nothing is mixed across depth edges."""
    rows = np.floor(box.top + (np.arange(target[0]) + 0.5) * box.height / target[0]).astype(int)
    columns = np.floor(box.left + (np.arange(target[1]) + 0.5) * box.width / target[1]).astype(int)
    return values[np.ix_(rows.clip(0, values.shape[0] - 1), columns.clip(0, values.shape[1] - 1))]


def move_intrinsics(K: np.ndarray, box: Box, target: tuple[int, int]) -> np.ndarray:
    """K (3, 3) of the part `box` after it is resized to `target`, both axes with their own factor."""
    cropped = crop_intrinsics(torch.from_numpy(np.asarray(K, np.float64)), box.top, box.left)
    return resize_intrinsics(cropped, (box.height, box.width), target).numpy()


def draw_zoom(rng: np.random.Generator) -> float:
    """Focal augmentation: the share of the largest box's side to keep, mostly near 0.9 or 1."""
    low, span, shape = FOCAL_ZOOM
    return low + span * float(rng.beta(shape, shape))


# ---------------------------------------------------------------------------------------------- colour


@dataclass(frozen=True)
class ColourChange:
    """What happens to the colours of a view: four factors applied in `order`, or nothing, then grey or not."""

    jitter: bool
    factors: tuple[float, float, float, float]
    order: tuple[int, ...]
    grey: bool

    def apply(self, image: Tensor) -> Tensor:
        """Images (..., 3, H, W) float in [0, 1] changed; contrast is about each image's own mean."""
        steps = (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation, colour.adjust_hue)
        for i in self.order if self.jitter else ():
            image = steps[i](image, self.factors[i])
        return colour.rgb_to_grayscale(image, num_output_channels=3) if self.grey else image


def draw_colour_change(rng: np.random.Generator) -> ColourChange:
    """A random change: jitter 0.5/0.5/0.5/0.1 with probability 0.9, grey with probability 0.05 (released data code)."""
    jitter, grey = bool(rng.random() < JITTER_CHANCE), bool(rng.random() < GREY_CHANCE)
    ranges = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    brightness, contrast, saturation, hue = (float(rng.uniform(*limits)) for limits in ranges)
    return ColourChange(jitter, (brightness, contrast, saturation, hue), tuple(rng.permutation(4).tolist()), grey)


def augment_colours(images: Tensor, seed: int) -> Tensor:
    """Change the colours of the views of one sample, for the geometry encoder only.

    With probability 0.7 all views get the same change, else each its own. Equal seeds give equal changes.

    Args:
        images: (S, 3, H, W) uint8.
        seed: at least 0.

    Returns:
        (S, 3, H, W) uint8.
    """
    rng = np.random.default_rng(seed)
    shared = bool(rng.random() < SHARED_DRAW)
    groups = (images.float() / 255).split(len(images) if shared else 1)
    changed = torch.cat([draw_colour_change(rng).apply(group) for group in groups])
    return (changed * 255).round().clamp(0, 255).to(torch.uint8)
