"""Random materials by family: what walls, wood, fabric and plastic look like."""

import colorsys
import math
from collections.abc import Callable

from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.scene import Material, Pattern, Vector


def hue(draws: Draws, saturation: tuple[float, float], value: tuple[float, float]) -> Vector:
    """A colour of any hue."""
    red, green, blue = colorsys.hsv_to_rgb(draws.uniform(), draws.uniform(*saturation), draws.uniform(*value))
    return red, green, blue


def shade(colour: Vector, factor: float) -> Vector:
    """A darker (factor < 1) or lighter colour."""
    red, green, blue = (min(1.0, channel * factor) for channel in colour)
    return red, green, blue


def _material(
    draws: Draws, patterns: tuple[Pattern, ...], colours: tuple[Vector, Vector], period: tuple[float, float]
) -> Material:
    angle = draws.choice((0.0, math.pi / 2, math.pi / 4))
    return Material(draws.choice(patterns), colours, draws.uniform(*period), angle, draws.uniform())


def wall(draws: Draws) -> Material:
    """Light wallpaper, tiles or plaster."""
    base = hue(draws, (0.05, 0.45), (0.65, 0.95))
    other = shade(base, draws.uniform(0.6, 0.82)) if draws.chance(0.6) else hue(draws, (0.1, 0.5), (0.5, 0.9))
    return _material(draws, ("stripes", "noise", "dots", "tiles", "checker", "noise"), (base, other), (0.35, 0.9))


def floor(draws: Draws) -> Material:
    """Planks, tiles or carpet."""
    if draws.chance(0.5):
        return wood(draws, (0.12, 0.25))
    base = hue(draws, (0.05, 0.5), (0.35, 0.85))
    return _material(draws, ("checker", "tiles", "noise"), (base, shade(base, draws.uniform(0.5, 0.75))), (0.4, 0.9))


def ceiling(draws: Draws) -> Material:
    """Panels or rough plaster, nearly white."""
    base = hue(draws, (0.0, 0.12), (0.82, 0.95))
    return _material(draws, ("tiles", "noise", "planks"), (base, shade(base, draws.uniform(0.68, 0.82))), (0.5, 0.9))


def wood(draws: Draws, period: tuple[float, float] = (0.08, 0.16)) -> Material:
    """Planks of a brown."""
    red, green, blue = colorsys.hsv_to_rgb(draws.uniform(0.04, 0.11), draws.uniform(0.3, 0.7), draws.uniform(0.4, 0.85))
    base = (red, green, blue)
    return _material(draws, ("planks",), (base, shade(base, draws.uniform(0.45, 0.7))), period)


def fabric(draws: Draws) -> Material:
    """Coloured cloth with a pattern."""
    base = hue(draws, (0.25, 0.8), (0.35, 0.9))
    other = shade(base, draws.uniform(0.45, 0.7)) if draws.chance(0.5) else hue(draws, (0.1, 0.7), (0.4, 0.95))
    return _material(draws, ("stripes", "checker", "dots", "noise"), (base, other), (0.15, 0.35))


def plastic(draws: Draws) -> Material:
    """Strong colours in large patterns."""
    colours = (hue(draws, (0.4, 0.95), (0.45, 0.95)), hue(draws, (0.2, 0.9), (0.3, 0.9)))
    return _material(draws, ("stripes", "checker", "noise", "gradient"), colours, (0.15, 0.4))


def metal(draws: Draws) -> Material:
    """Greys."""
    base = hue(draws, (0.0, 0.12), (0.45, 0.9))
    return _material(draws, ("noise", "gradient", "tiles"), (base, shade(base, draws.uniform(0.55, 0.8))), (0.2, 0.5))


def leaves(draws: Draws) -> Material:
    """Greens."""
    red, green, blue = colorsys.hsv_to_rgb(draws.uniform(0.22, 0.4), draws.uniform(0.5, 0.9), draws.uniform(0.35, 0.75))
    return _material(draws, ("noise", "dots"), ((red, green, blue), shade((red, green, blue), 0.5)), (0.1, 0.2))


def screen(draws: Draws) -> Material:
    """A dark picture with some colour."""
    return _material(
        draws, ("gradient", "noise"), ((0.05, 0.05, 0.08), hue(draws, (0.3, 0.8), (0.15, 0.5))), (0.3, 0.6)
    )


def sky(draws: Draws) -> Material:
    """What is seen through a window."""
    return Material("gradient", ((0.75, 0.87, 1.0), hue(draws, (0.2, 0.5), (0.55, 0.85))), 1.2, 0.0, draws.uniform())


def painting(draws: Draws) -> Material:
    """Two strong colours in any pattern."""
    colours = (hue(draws, (0.3, 0.9), (0.3, 0.95)), hue(draws, (0.2, 0.9), (0.2, 0.95)))
    return _material(draws, ("checker", "stripes", "noise", "dots", "gradient"), colours, (0.15, 0.4))


Family = Callable[[Draws], Material]
