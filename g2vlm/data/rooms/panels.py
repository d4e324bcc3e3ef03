"""What a sample looks like: pictures of its maps."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.materials import hue
from g2vlm.data.types import SceneSample

NUM_COLOURS = 97  # distinct instance colours before they repeat


def panels(sample: SceneSample) -> dict[str, NDArray[np.uint8]]:
    """Pictures (S, H, W, 3) uint8 of every map that the sample has, by its name.

    Depth is brighter farther away, scaled to the sample's greatest depth; normals have x to the right in red, y upwards
    in green, towards the camera in blue; every instance has a colour of its own.
    """
    shown = {"images": sample.images.permute(0, 2, 3, 1)}
    if sample.depth is not None:
        depth = sample.depth if sample.valid is None else sample.depth * sample.valid
        shown["depth"] = (255 * depth / depth.max()).to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
    if sample.normals is not None:
        axes = torch.tensor([1.0, -1.0, -1.0], device=sample.normals.device)
        shown["normals"] = (127.5 * (1 + axes * sample.normals)).to(torch.uint8)
    if sample.instances is not None:
        colours = _colours().to(sample.instances.device)
        shown["instances"] = colours[sample.instances % NUM_COLOURS]
    return {name: picture.cpu().numpy() for name, picture in shown.items()}


def _colours() -> Tensor:
    """(NUM_COLOURS, 3) uint8."""
    draws = Draws(0)
    rows = [[int(255 * channel) for channel in hue(draws, (0.3, 0.9), (0.4, 1.0))] for _ in range(NUM_COLOURS)]
    return torch.tensor(rows, dtype=torch.uint8)


def contact_sheet(samples: list[SceneSample]) -> NDArray[np.uint8]:
    """One row per sample: all images, then all depths, normals, instances. All samples have one size and view count."""
    rows = [np.concatenate([view for maps in panels(s).values() for view in maps], axis=1) for s in samples]
    return np.concatenate(rows, axis=0)
