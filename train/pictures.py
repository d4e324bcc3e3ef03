"""What the model makes of a validation scene, beside the truth.

Shapes: S views, H W pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from g2vlm.data.batch import SceneBatch
from g2vlm.preview import depth_colours, normal_colours, percentile_range
from geometry import GeometryPrediction, normals_from_points, unproject

MAX_VIEWS = 4
GAP = 4


def save_picture(prediction: GeometryPrediction, batch: SceneBatch, file: Path) -> None:
    """A PNG of the first scene of a batch, a column per view: image, depth and normals, both the true ones first.

    The predicted depth has one factor for the scene, the ratio of the medians. Pixels without truth are black in it.

    Args:
        prediction: of that scene, on the CPU.
        batch: on the CPU.
        file: to write.
    """
    depth, valid = _array(batch.depth[0]), _array(batch.valid[0])
    guess = _array(prediction.depth)
    if valid.any():
        guess = guess * (np.median(depth[valid]) / np.median(guess[valid]))
    shown = percentile_range(depth[valid])
    true_normals = batch.normals
    if true_normals is None:
        true_normals = normals_from_points(unproject(batch.depth, batch.intrinsics), batch.valid)[0]
    rows = [
        np.moveaxis(_array(batch.images[0]), 1, -1),
        depth_colours(depth, shown) * valid[..., None],
        depth_colours(guess, shown),
        normal_colours(_array(true_normals[0])) * valid[..., None],
        normal_colours(_array(prediction.normals)),
    ]  # each (S, H, W, 3)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate([_strip(row[:MAX_VIEWS]) for row in rows]).astype(np.uint8)).save(file)


def _strip(views: np.ndarray) -> np.ndarray:
    """(S, H, W, 3) -> one row of pictures with white gaps."""
    return np.concatenate(np.pad(views, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255), axis=1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
