"""A model's predictions for the views of a sample: made, brought to the size of the truth, kept in files.

S views, H W pixels of the truth.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed
from g2vlm.images import PATCH
from g2vlm.pipeline import Pipeline
from geometry import GeometryPrediction
from geometry.io.common import atomic_file


def predict(pipeline: Pipeline, sample: SceneSample) -> GeometryPrediction:
    """The model's prediction for a sample's views at their size, float32 on the CPU.

    The model sees sides that are multiples of 14: views of another size shrink to the next smaller ones and the
    prediction grows back, both bilinear with antialiasing, as in the published evaluators (512 -> 504 -> 512).

    Raises:
        CheckFailed: a predicted value is NaN or infinite.
    """
    pixels = sample.images.float() / 255
    size = tuple(max(PATCH, side // PATCH * PATCH) for side in sample.size)
    try:
        prediction = pipeline.predict(pixels if size == sample.size else _resized(pixels, size))
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  (the SVD of rotations)
        raise CheckFailed("predicted cameras are not finite", str(error), "check the weights") from error
    for name in ("local_points", "cam_to_world", "normals"):
        if count := int((~getattr(prediction, name).isfinite()).sum()):
            raise CheckFailed(f"{count:,} predicted values of {name} are not finite", "", "check the weights")
    return prediction if size == sample.size else resized(prediction, sample.size)


def resized(prediction: GeometryPrediction, size: tuple[int, ...]) -> GeometryPrediction:
    """The prediction at (H, W): points interpolated, so that depth edges smear as in the published evaluators."""
    normals = normalize(_resized(prediction.normals.movedim(-1, 1), size), dim=1)
    return replace(
        prediction,
        local_points=_resized(prediction.local_points.movedim(-1, 1), size).movedim(1, -1),
        normals=normals.movedim(1, -1),
        global_points=None,
        confidence=None,
    )


def _resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(S, C, h, w) -> (S, C, H, W)."""
    return interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)


def save_prediction(path: Path, prediction: GeometryPrediction, facts: Mapping[str, str]) -> None:
    """Write a prediction as one safetensors file, whole or not at all, with `facts` as its metadata."""
    present = {f.name: value for f in fields(prediction) if (value := getattr(prediction, f.name)) is not None}
    with atomic_file(path) as file:
        file.write(save({name: value.contiguous() for name, value in present.items()}, dict(facts)))


def load_prediction(path: Path) -> GeometryPrediction:
    """What `save_prediction` wrote."""
    return GeometryPrediction(**load(path.read_bytes()))
