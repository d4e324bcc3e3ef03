"""What the semantic encoder sees of a room that is asked about: in training, evaluation and pictures alike.

S views, H, W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2vlm.data.qa.marks import draw_marks
from g2vlm.data.qa.question import Mark

GREY = 128
"""Every pixel of what a blind model is given in place of an image."""


def shown_views(images: Tensor, marks: Sequence[Mark] = ()) -> NDArray[np.uint8]:
    """Views (S, 3, H, W) uint8 as (S, H, W, 3), with the dots that a question speaks of."""
    views = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    return draw_marks(views, marks)


def blank_views(images: Tensor) -> Tensor:
    """Views of the same shape on which nothing can be seen."""
    return torch.full_like(images, GREY)
