"""What is scored beside each other: a model, and what a number must beat to mean anything."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch

from eval.predictions import predict
from eval.protocols import Protocol
from eval.truth import ALL_PARTS, Part, Truth
from g2vlm.checkpoint import random_model
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.pipeline import Pipeline
from geometry import GeometryPrediction, unproject
from geometry.metrics.depth import best_constant_depth

CONSTANT, IDENTITY, UNTRAINED = "constant depth", "identity pose", "untrained"
BASELINES = {
    CONSTANT: "one depth per scene, the one of the smallest AbsRel, seen through the true cameras",
    IDENTITY: "every camera at the same place, looking the same way",
    UNTRAINED: "the same architecture with random weights",
}
CONSTANT_PARTS: tuple[Part, ...] = ("depth", "points", "derived normals")
UNTRAINED_SEED = 1


@dataclass(frozen=True)
class System:
    """Something to score.

    Args:
        predict: a prediction for the views of a sample, at their size; may raise InputError or CheckFailed.
        parts: what of it is scored, where the truth allows.
    """

    predict: Callable[[SceneSample], GeometryPrediction]
    parts: tuple[Part, ...] = ALL_PARTS


def model_system(pipeline: Pipeline) -> System:
    """A model."""
    return System(lambda sample: predict(pipeline, sample))


def constant_depth(sample: SceneSample, protocol: Protocol) -> GeometryPrediction:
    """Best constant depth: in every view a plane facing the camera, at one distance per scene.

    The distance is the one of the smallest AbsRel. True intrinsics and poses place the planes, so that its points are
    those of a flat world seen by perfectly known cameras.

    Raises:
        InputError: the sample has no usable depth.
    """
    truth = Truth.of(sample, protocol)
    if truth.depth is None:
        raise InputError(f"no constant depth for {sample.scene}", "it has no true depth", "")
    depth = torch.full_like(truth.depth, best_constant_depth(truth.depth))
    eye = torch.eye(4, dtype=torch.float64).expand(sample.num_views, 4, 4)
    intrinsics = eye[:, :3, :3] if sample.intrinsics is None else sample.intrinsics.double()
    poses = eye if truth.cam_to_world is None else truth.cam_to_world
    local_points = unproject(depth, intrinsics)
    normals = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand_as(local_points)
    return GeometryPrediction(local_points, poses, normals)


def identity_pose(sample: SceneSample) -> GeometryPrediction:
    """Identity poses, and points that mean nothing."""
    eye = torch.eye(4, dtype=torch.float64).expand(sample.num_views, 4, 4)
    nothing = torch.zeros(sample.num_views, *sample.size, 3)
    return GeometryPrediction(nothing, eye, nothing)


def untrained(pipeline: Pipeline) -> Pipeline:
    """The same architecture, device and precision with random weights, seed `UNTRAINED_SEED`."""
    model = random_model(deepcopy(pipeline.model.config), pipeline.model.dtype, UNTRAINED_SEED, UNTRAINED)
    return Pipeline(model.to(pipeline.model.device), UNTRAINED)  # pyright: ignore[reportArgumentType]


def baseline_systems(pipeline: Pipeline, protocol: Protocol) -> dict[str, System]:
    """Every baseline by name, in the order of the table."""
    return {
        CONSTANT: System(lambda sample: constant_depth(sample, protocol), CONSTANT_PARTS),
        IDENTITY: System(identity_pose, ("poses",)),
        UNTRAINED: model_system(untrained(pipeline)),
    }
