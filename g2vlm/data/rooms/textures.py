"""Procedural textures, evaluated at hit points with their edges softened to the size of a pixel.

Only +, -, *, / and floor: equal bits on every machine. `width` is the size of a pixel on the surface in periods; where
it exceeds the pattern's details, the pattern fades to its mean instead of flickering.

Shapes: N pixels; every function maps coordinates in periods (N,) to a mixing factor (N,) in [0, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from g2vlm.data.rooms.scene import PATTERNS, Pattern

GOLDEN = 0.6180339887


def wave(x: Tensor) -> Tensor:
    """A wave in [-1, 1] with period 1 made of parabolas."""
    y = x - torch.floor(x) - 0.5
    return 8 * y * (1 - 2 * y.abs())


def band(x: Tensor, width: Tensor) -> Tensor:
    """A square wave between 0 and 1, its edges `width` wide."""
    y = x - torch.floor(x)
    inside = 0.25 - (y - 0.5).abs()  # positive in the middle half of the period
    return _ramp(inside / width, width)


def _ramp(edge: Tensor, width: Tensor) -> Tensor:
    """0.5 + edge clamped to [0, 1], towards the mean where a pixel exceeds half a period."""
    sharp = (0.5 + edge).clamp(0, 1)
    fade = (1.5 - 2 * width).clamp(0, 1)
    return 0.5 + (sharp - 0.5) * fade


def checker(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Squares of half a period."""
    a, b = band(x, width), band(y, width)
    return a + b - 2 * a * b


def stripes(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Bands across x."""
    return band(x, width)


def noise(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Blotches: products of waves, bent by slower ones."""
    bent_x, bent_y = x + 0.6 * wave(0.43 * y + 0.1), y + 0.6 * wave(0.37 * x + 0.3)
    slow, fast = wave(bent_x) * wave(bent_y), wave(2.17 * bent_y + 0.2) * wave(1.83 * bent_x)
    return 0.5 + (0.32 * slow + 0.18 * fast) * (1.5 - width).clamp(0, 1)


def planks(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Boards one period wide, each of its own tone, with grain along them."""
    board = torch.floor(x)
    tone = board * GOLDEN
    tone = tone - torch.floor(tone)
    grain = wave(2.3 * x + 0.4 * wave(0.31 * y + tone) + tone) * (1.0 - 2 * width).clamp(0, 1)
    fade = (1.6 - width).clamp(0, 1)
    return 0.45 + (0.75 * (tone - 0.5) + 0.15 * grain) * fade


def dots(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """A disc in every cell."""
    dx, dy = x - torch.floor(x) - 0.5, y - torch.floor(y) - 0.5
    return _ramp((0.3 - (dx * dx + dy * dy).sqrt()) / width, width)


def gradient(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Soft bands along y."""
    return 0.5 + 0.5 * wave(0.5 * y) * (1.5 - width).clamp(0, 1)


def tiles(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Squares with joints, each of its own tone."""
    column, row = torch.floor(x), torch.floor(y)
    tone = column * GOLDEN + row * 0.7548776662
    tone = tone - torch.floor(tone)
    border = 0.5 - torch.maximum((x - column - 0.5).abs(), (y - row - 0.5).abs())
    joint = _ramp((0.05 - border) / width, width)
    return torch.maximum(0.55 * tone, joint) * (1.6 - width).clamp(0, 1)


EVALUATE: dict[Pattern, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "checker": checker,
    "stripes": stripes,
    "noise": noise,
    "planks": planks,
    "dots": dots,
    "gradient": gradient,
    "tiles": tiles,
}


def mix(pattern: Tensor, x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """The mixing factor (N,) of every pixel's own pattern (N,), an index into `PATTERNS`."""
    result = torch.empty_like(x)
    for index, name in enumerate(PATTERNS):
        (here,) = torch.nonzero(pattern == index, as_tuple=True)
        if here.shape[0]:
            result[here] = EVALUATE[name](x[here], y[here], width[here])
    return result


def grain(u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """A factor about 1 that keeps every surface from being plain: blotches of 0.7 m and of 0.2 m.

    Args:
        u, v: metres on the surface.
        footprint: metres of a pixel on the surface.
    """
    coarse = wave(1.37 * u + 0.4 * wave(0.83 * v)) * wave(1.21 * v + 0.4 * wave(0.71 * u) + 0.25)
    fine = wave(4.9 * u + 0.3 * wave(1.9 * v)) * wave(5.3 * v + 0.3 * wave(1.7 * u))
    return 1 + 0.12 * coarse + 0.10 * fine * (1.5 - 5 * footprint).clamp(0, 1)
