"""Pictures of a few evaluated scenes, as `g2vlm recon` draws them: the prediction, and the truth beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eval.predictions import predict
from eval.protocols import Protocol
from eval.scoring import score
from eval.sources import Item, file_name
from eval.truth import Truth
from g2vlm.data.types import SceneSample
from g2vlm.images import from_memory
from g2vlm.pipeline import Pipeline
from g2vlm.predictions import usable_intrinsics
from g2vlm.preview import preview
from g2vlm.scene import Scene
from geometry import GeometryPrediction, normals_from_points
from geometry.io.common import atomic_file


def draw(items: Sequence[Item], pipeline: Pipeline, protocol: Protocol, folder: Path) -> list[Path]:
    """Write `NAME.png`, and `NAME.truth.png` where the truth is known, for each item.

    A predicted scene is brought to the scale of the truth first, so that the two depth legends can be compared.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for item in items:
        sample = item.load()
        prediction = predict(pipeline, sample)
        scale = score(prediction, sample, protocol, ("depth",)).depth_scale
        paths.append(_save(predicted_scene(prediction, sample, scale, pipeline.name), folder, item.name))
        if sample.intrinsics is not None and sample.cam_to_world is not None:
            paths.append(_save(true_scene(sample, protocol), folder, f"{item.name}.truth"))
    return paths


def predicted_scene(prediction: GeometryPrediction, sample: SceneSample, scale: float, model: str) -> Scene:
    """A prediction as a scene, in units of the truth when `scale` is finite."""
    known = np.isfinite(scale) and scale > 0
    factor = scale if known else 1.0
    poses = prediction.cam_to_world.clone()
    poses[:, :3, 3] *= factor
    return Scene.from_prediction(
        (prediction.local_points * factor).numpy(),
        poses.numpy(),
        prediction.normals.numpy(),
        usable_intrinsics(prediction.intrinsics, sample.size[1]).numpy(),
        (sample.images.float() / 255).numpy(),
        _originals(sample),
        units="metre" if known and sample.is_metric else "relative",
        model=model,
    )


def true_scene(sample: SceneSample, protocol: Protocol) -> Scene:
    """The ground truth as a scene; needs depth, intrinsics and poses."""
    truth = Truth.of(sample, protocol)
    assert truth.local_points is not None
    assert truth.cam_to_world is not None
    assert sample.intrinsics is not None
    normals = sample.normals
    if normals is None:
        normals, _ = normals_from_points(truth.local_points, truth.valid)
    return Scene.from_prediction(
        truth.local_points.numpy(),
        truth.cam_to_world.numpy(),
        torch.where(truth.valid[..., None], normals, 0).numpy(),
        sample.intrinsics.numpy(),
        (sample.images.float() / 255).numpy(),
        _originals(sample),
        units="metre" if sample.is_metric else "relative",
        model="ground truth",
        valid=truth.valid.numpy(),
    )


def _originals(sample: SceneSample) -> list:
    return [from_memory(image.permute(1, 2, 0).numpy()) for image in sample.images]


def _save(scene: Scene, folder: Path, name: str) -> Path:
    path = folder / file_name(name, ".png")
    picture = preview(scene)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
    return path
