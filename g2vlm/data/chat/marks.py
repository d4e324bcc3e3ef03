"""Points and boxes that a question speaks of, drawn on the semantic encoder's copies of the images (SPAR).

Coordinates are in thousandths of the image's width and height. H, W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
RADIUS = THICKNESS = 20  # pixels, whatever the image's size (released data code)
UNITS = 1000


@dataclass(frozen=True)
class Mark:
    """A disc (x, y) or a frame (left, top, right, bottom) of a colour on one image."""

    image: int
    colour: str
    place: tuple[float, ...]


def read_marks(record: Mapping[str, Any], num_images: int) -> list[Mark]:
    """The marks of a SPAR record.

    It has `red_point`: [[x, y]], `red_bbox`: [[left, top, right, bottom]] and so on for each colour, and
    `point_img_idx`, `bbox_img_idx`: [[image of the first such mark, of the second, ...]], absent for a single image.

    Raises:
        ValueError: coordinates or images that do not exist.
    """
    marks = []
    for kind, numbers in (("point", 2), ("bbox", 4)):
        named = [(key.removesuffix(f"_{kind}"), places) for key, places in record.items() if key.endswith(f"_{kind}")]
        named = [(colour, places) for colour, places in named if colour in COLOURS and places is not None]
        images = _flat(record.get(f"{kind}_img_idx"))
        for i, (colour, places) in enumerate(named):
            image = int(images[i]) if i < len(images) else 0
            for place in places:
                if len(place) != numbers or not 0 <= image < num_images:
                    raise ValueError(f"{colour}_{kind} is {place} on image {image} of {num_images}")
                marks.append(Mark(image, colour, tuple(float(value) for value in place)))
    return marks


def draw_marks(images: Sequence[np.ndarray], marks: Sequence[Mark], radius: float = RADIUS) -> tuple[np.ndarray, ...]:
    """Copies of images (H, W, 3) uint8 with their marks; an image without marks is the same object.

    Args:
        images: to be marked.
        marks: on them.
        radius: of a disc, in pixels.
    """
    return tuple(_drawn(image, [mark for mark in marks if mark.image == i], radius) for i, image in enumerate(images))


def _drawn(pixels: np.ndarray, marks: Sequence[Mark], radius: float) -> np.ndarray:
    if not marks:
        return pixels
    picture = Image.fromarray(pixels)
    draw, size = ImageDraw.Draw(picture), picture.size
    for mark in marks:
        place = [value * size[i % 2] / UNITS for i, value in enumerate(mark.place)]
        if len(place) == 2:
            x, y = place
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[mark.colour])
        else:
            left, right = sorted(place[::2])
            top, bottom = sorted(place[1::2])
            draw.rectangle((left, top, right, bottom), outline=COLOURS[mark.colour], width=THICKNESS)
    return np.asarray(picture)


def _flat(values: Any) -> list[Any]:
    """The innermost list's numbers; [[0, 1]], [0, 1] and None are all in use."""
    found = list(values) if values is not None else []
    return list(found[0]) if found and isinstance(found[0], list | tuple) else found
