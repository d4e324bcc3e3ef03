"""Builders of composites: real sizes in metres, the front towards +y, the back edge of the footprint towards -y."""

from collections.abc import Callable

import g2vlm.data.rooms.materials as materials
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.scene import Material, Part

Parts = tuple[Part, ...]


def block(x: float, y: float, low: float, size: tuple[float, float, float], material: Material) -> Part:
    """A box whose bottom is at height `low`."""
    return Part("box", (x, y, low + size[2] / 2), size, material)


def post(x: float, y: float, low: float, diameter: float, height: float, material: Material) -> Part:
    """An upright cylinder whose bottom is at height `low`."""
    return Part("cylinder", (x, y, low + height / 2), (diameter, diameter, height), material)


def blob(x: float, y: float, z: float, size: tuple[float, float, float], material: Material) -> Part:
    """An ellipsoid about (x, y, z)."""
    return Part("sphere", (x, y, z), size, material)


def legs(width: float, depth: float, height: float, thickness: float, material: Material) -> Parts:
    """Four square legs in the corners of a footprint."""
    x, y = (width - thickness) / 2, (depth - thickness) / 2
    size = (thickness, thickness, height)
    return tuple(block(sx * x, sy * y, 0, size, material) for sx in (-1, 1) for sy in (-1, 1))


def table(draws: Draws) -> Parts:
    """A rectangular table on four legs or a round one on a column."""
    height, wood = draws.uniform(0.68, 0.78), materials.wood(draws)
    top = draws.choice((wood, materials.plastic(draws)))
    if draws.chance(0.4):
        diameter = draws.uniform(0.8, 1.3)
        column = post(0, 0, 0.04, 0.1, height - 0.08, wood)
        return (post(0, 0, 0, 0.55 * diameter, 0.04, wood), column, post(0, 0, height - 0.04, diameter, 0.04, top))
    width, depth = draws.uniform(1.1, 1.8), draws.uniform(0.7, 1.0)
    return (block(0, 0, height - 0.05, (width, depth, 0.05), top), *legs(width, depth, height - 0.05, 0.07, wood))


def desk(draws: Draws) -> Parts:
    """A top on two side panels, with a screen on it."""
    width, depth, height = draws.uniform(1.1, 1.6), draws.uniform(0.6, 0.8), draws.uniform(0.7, 0.76)
    wood = materials.wood(draws)
    sides = (block(sign * (width / 2 - 0.02), 0, 0, (0.04, depth, height - 0.04), wood) for sign in (-1, 1))
    monitor = block(0, -0.1, height + 0.1, (0.55, 0.05, 0.33), materials.screen(draws))
    stand = block(0, -0.1, height, (0.18, 0.12, 0.1), materials.metal(draws))
    return (block(0, 0, height - 0.04, (width, depth, 0.04), wood), *sides, stand, monitor)


def chair(draws: Draws) -> Parts:
    """A seat with a back on four legs."""
    side, seat = draws.uniform(0.42, 0.5), draws.uniform(0.43, 0.48)
    frame, cushion = materials.wood(draws), materials.fabric(draws)
    back = block(0, -side / 2 + 0.025, seat + 0.06, (side, 0.05, draws.uniform(0.38, 0.5)), cushion)
    return (block(0, 0, seat, (side, side, 0.06), cushion), back, *legs(side, side, seat, 0.045, frame))


def stool(draws: Draws) -> Parts:
    """A round seat on a column."""
    height, metal = draws.uniform(0.42, 0.68), materials.metal(draws)
    seat = post(0, 0, height - 0.08, draws.uniform(0.32, 0.42), 0.08, materials.fabric(draws))
    return (post(0, 0, 0, 0.3, 0.03, metal), post(0, 0, 0.03, 0.06, height - 0.11, metal), seat)


def sofa(draws: Draws) -> Parts:
    """A seat between arms before a back."""
    width, depth, seat = draws.uniform(1.5, 2.2), draws.uniform(0.8, 0.95), draws.uniform(0.38, 0.45)
    cloth, cushion = materials.fabric(draws), materials.fabric(draws)
    inner = width - 0.4
    arms = (block(sign * (width / 2 - 0.1), 0, 0, (0.2, depth, seat + 0.2), cloth) for sign in (-1, 1))
    back = block(0, -depth / 2 + 0.11, seat, (inner, 0.22, 0.42), cushion)
    return (block(0, 0, 0, (inner, depth, seat), cloth), back, *arms)


def bed(draws: Draws) -> Parts:
    """A mattress on a frame with headboard and pillows."""
    width, depth, low = draws.uniform(0.95, 1.7), draws.uniform(1.95, 2.1), draws.uniform(0.22, 0.3)
    frame, sheet = materials.wood(draws), materials.fabric(draws)
    head = block(0, -depth / 2 + 0.03, 0, (width, 0.06, draws.uniform(0.8, 1.1)), frame)
    pillow = block(0, -depth / 2 + 0.3, low + 0.22, (0.7 * width, 0.35, 0.1), materials.fabric(draws))
    mattress = block(0, 0.03, low, (width, depth - 0.06, 0.22), sheet)
    return (block(0, 0.03, 0, (width, depth - 0.06, low), frame), mattress, head, pillow)


def bookshelf(draws: Draws) -> Parts:
    """A back and two sides with rows of books on shelves."""
    width, depth, height = draws.uniform(0.7, 1.3), draws.uniform(0.28, 0.38), draws.uniform(1.4, 2.0)
    wood, rows = materials.wood(draws), 4
    sides = (block(sign * (width / 2 - 0.02), 0, 0, (0.04, depth, height), wood) for sign in (-1, 1))
    step = (height - 0.04) / rows
    shelves = (block(0, 0, row * step, (width - 0.08, depth, 0.04), wood) for row in range(rows + 1))
    books = []
    for row in range(rows):
        length, tall = draws.uniform(0.5, 1.0) * (width - 0.1), draws.uniform(0.55, 0.85) * (step - 0.04)
        left = -(width - 0.1 - length) / 2
        books.append(block(left, -0.03, row * step + 0.04, (length, depth - 0.06, tall), _books(draws)))
    return (*sides, *shelves, *books)


def _books(draws: Draws) -> Material:
    colours = (materials.hue(draws, (0.3, 0.9), (0.3, 0.9)), materials.hue(draws, (0.1, 0.7), (0.4, 0.95)))
    return Material("planks", colours, draws.uniform(0.07, 0.12), 0.0, draws.uniform())


def cabinet(draws: Draws) -> Parts:
    """A body with two doors and knobs, on a plinth."""
    width, depth, height = draws.uniform(0.7, 1.3), draws.uniform(0.4, 0.6), draws.uniform(0.8, 1.9)
    body, front = materials.wood(draws), draws.choice((materials.wood, materials.plastic))(draws)
    panel = (width / 2 - 0.03, 0.02, height - 0.16)
    doors = (block(sign * width / 4, depth / 2 - 0.01, 0.1, panel, front) for sign in (-1, 1))
    plinth = block(0, -0.03, 0, (width - 0.06, depth - 0.1, 0.06), body)
    return (plinth, block(0, -0.01, 0.06, (width, depth - 0.02, height - 0.06), body), *doors)


def nightstand(draws: Draws) -> Parts:
    """A small body with a drawer, and a lamp on it."""
    width, depth, height = draws.uniform(0.4, 0.55), draws.uniform(0.38, 0.45), draws.uniform(0.45, 0.6)
    drawer = block(0, depth / 2 - 0.01, 0.55 * height, (width - 0.06, 0.02, 0.35 * height), materials.plastic(draws))
    foot = post(0, 0, height, 0.1, 0.16, materials.metal(draws))
    shade = post(0, 0, height + 0.16, 0.26, 0.2, materials.fabric(draws))
    return (block(0, -0.01, 0, (width, depth - 0.02, height), materials.wood(draws)), drawer, foot, shade)


def refrigerator(draws: Draws) -> Parts:
    """Two doors one above the other, with handles."""
    width, depth, height = draws.uniform(0.6, 0.8), draws.uniform(0.6, 0.7), draws.uniform(1.6, 1.9)
    white, metal = materials.metal(draws), materials.metal(draws)
    split = 0.62 * height
    body = block(0, -0.04, 0, (width, depth - 0.08, height), white)
    lower = block(0, depth / 2 - 0.06, 0.05, (width, 0.04, split - 0.06), metal)
    upper = block(0, depth / 2 - 0.06, split, (width, 0.04, height - split - 0.01), metal)
    handle = post(0.38 * width, depth / 2 - 0.02, split - 0.5, 0.04, 0.4, white)
    return (body, lower, upper, handle)


def tv(draws: Draws) -> Parts:
    """A television on a low board."""
    width, depth, height = draws.uniform(1.1, 1.7), draws.uniform(0.35, 0.45), draws.uniform(0.4, 0.55)
    panel = 0.72 * width
    foot = block(0, 0, height, (0.3, 0.2, 0.06), materials.metal(draws))
    glass = block(0, 0, height + 0.06, (panel, 0.06, 0.56 * panel), materials.screen(draws))
    return (block(0, 0, 0, (width, depth, height), materials.wood(draws)), foot, glass)


def lamp(draws: Draws) -> Parts:
    """A floor lamp."""
    height, metal = draws.uniform(1.4, 1.75), materials.metal(draws)
    shade = post(0, 0, height - 0.3, draws.uniform(0.3, 0.45), 0.3, materials.fabric(draws))
    return (post(0, 0, 0, 0.3, 0.03, metal), post(0, 0, 0.03, 0.04, height - 0.33, metal), shade)


def plant(draws: Draws) -> Parts:
    """A pot with a stem and a crown."""
    pot, trunk, size = draws.uniform(0.28, 0.4), draws.uniform(0.2, 0.5), draws.uniform(0.45, 0.75)
    green = materials.leaves(draws)
    crown = blob(0, 0, pot + trunk + 0.3 * size, (size, size, 0.9 * size), green)
    side = blob(0.2 * size, 0.1 * size, pot + trunk + 0.8 * size, (0.6 * size, 0.6 * size, 0.6 * size), green)
    stem = post(0, 0, pot, 0.06, trunk, materials.wood(draws))
    return (post(0, 0, 0, pot, pot, materials.plastic(draws)), stem, crown, side)


def ball(draws: Draws) -> Parts:
    """A ball on the floor."""
    size = draws.uniform(0.2, 0.6)
    return (blob(0, 0, size / 2, (size, size, size), materials.plastic(draws)),)


def box(draws: Draws) -> Parts:
    """One carton or two, one on the other."""
    width, depth, height = draws.uniform(0.3, 0.7), draws.uniform(0.3, 0.6), draws.uniform(0.25, 0.55)
    lower = block(0, 0, 0, (width, depth, height), materials.plastic(draws))
    if draws.chance(0.6):
        return (lower,)
    size = (0.7 * width, 0.7 * depth, draws.uniform(0.15, 0.35))
    return (lower, block(0.1 * width, -0.1 * depth, height, size, materials.plastic(draws)))


def trash_bin(draws: Draws) -> Parts:
    """A cylinder with a lid."""
    diameter, height = draws.uniform(0.25, 0.38), draws.uniform(0.35, 0.65)
    body = post(0, 0, 0, diameter - 0.03, height - 0.05, materials.plastic(draws))
    return (body, post(0, 0, height - 0.05, diameter, 0.05, materials.metal(draws)))


def rug(draws: Draws) -> Parts:
    """A flat carpet."""
    size = (draws.uniform(1.0, 1.8), draws.uniform(0.7, 1.2), 0.015)
    return (block(0, 0, 0, size, materials.painting(draws)),)


WALL_FURNITURE: dict[str, Callable[[Draws], Parts]] = {
    "bed": bed,
    "bookshelf": bookshelf,
    "cabinet": cabinet,
    "desk": desk,
    "nightstand": nightstand,
    "refrigerator": refrigerator,
    "sofa": sofa,
    "tv": tv,
}
"""Stands with its back to a wall."""

FREE_FURNITURE: dict[str, Callable[[Draws], Parts]] = {
    "ball": ball,
    "bin": trash_bin,
    "box": box,
    "chair": chair,
    "lamp": lamp,
    "plant": plant,
    "rug": rug,
    "stool": stool,
    "table": table,
}
"""Stands anywhere."""


# On the walls; the back is at y = 0.


def door(draws: Draws) -> Parts:
    """A leaf in a frame, with a knob."""
    width, height, frame = draws.uniform(0.8, 0.95), draws.uniform(1.95, 2.1), materials.wood(draws)
    leaf = block(0, 0.01, 0, (width, 0.02, height), draws.choice((materials.wood, materials.plastic))(draws))
    sides = (block(sign * (width / 2 + 0.04), 0.015, 0, (0.08, 0.03, height), frame) for sign in (-1, 1))
    knob = blob(0.4 * width, 0.03, 1.0, (0.06, 0.04, 0.06), materials.metal(draws))
    return (leaf, *sides, block(0, 0.015, height, (width + 0.16, 0.03, 0.08), frame), knob)


def window(draws: Draws) -> Parts:
    """A pane behind two bars in a frame."""
    width, height, low = draws.uniform(0.9, 1.7), draws.uniform(0.9, 1.2), draws.uniform(0.85, 1.0)
    frame = block(0, 0.01, low, (width, 0.02, height), materials.wood(draws))
    half = ((width - 0.2) / 2, 0.01, height - 0.12)
    sky = materials.sky(draws)
    panes = (block(sign * (width / 4 - 0.01), 0.025, low + 0.06, half, sky) for sign in (-1, 1))
    return (frame, *panes)


def picture(draws: Draws) -> Parts:
    """A framed painting."""
    width, height, low = draws.uniform(0.45, 1.0), draws.uniform(0.4, 0.8), draws.uniform(1.15, 1.4)
    frame = block(0, 0.01, low, (width, 0.02, height), materials.wood(draws))
    canvas = (width - 0.1, 0.01, height - 0.1)
    return (frame, block(0, 0.025, low + 0.05, canvas, materials.painting(draws)))


FIXTURES: dict[str, Callable[[Draws], Parts]] = {"door": door, "window": window, "picture": picture}
