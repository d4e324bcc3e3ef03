"""Draws the red dots that a question speaks of (SPAR): on copies for the semantic encoder, never for the geometric one.

S views, H, W pixels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from g2vlm.data.qa.question import Mark

RED, RIM = (255, 0, 0), (255, 255, 255)
RADIUS = 0.036  # of a dot, as a share of the image's shorter side
FINE = 8  # times finer than pixels a dot is drawn before it is averaged


def draw_marks(images: NDArray[np.uint8], marks: Sequence[Mark]) -> NDArray[np.uint8]:
    """Copies of images (S, H, W, 3) with every dot on its view; without dots the images themselves."""
    if not marks:
        return images
    drawn = images.copy()
    for mark in marks:
        drawn[mark.view] = _draw(drawn[mark.view], mark)
    return drawn


def _draw(image: NDArray[np.uint8], mark: Mark) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    centre, radius = (mark.x * width * FINE, mark.y * height * FINE), FINE * max(1.2, RADIUS * min(height, width))
    fine = Image.fromarray(image).resize((width * FINE, height * FINE), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(fine)
    pen.circle(centre, radius + 0.7 * FINE, fill=RIM)
    pen.circle(centre, radius, fill=RED)
    return np.asarray(fine.resize((width, height), Image.Resampling.BOX))
