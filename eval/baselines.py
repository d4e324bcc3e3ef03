"""What is scored beside each other: a model, and what a number must beat to mean anything.

A system is a function from a sample to its `Row`.
"""

from collections.abc import Callable
from copy import deepcopy

import torch

from eval.protocols import Protocol
from eval.scoring import Part, Row, Truth, score
from g2vlm.checkpoint import random_model
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed, InputError
from g2vlm.pipeline import Pipeline
from geometry import GeometryPrediction, unproject
from geometry.metrics.depth import best_constant_depth

System = Callable[[SceneSample], Row]
CONSTANT, IDENTITY, UNTRAINED = "constant depth", "identity pose", "untrained"
BASELINES = {
    CONSTANT: "one depth per scene, the one of the smallest AbsRel, seen through the true cameras",
    IDENTITY: "every camera at the same place, looking the same way",
    UNTRAINED: "the same architecture with random weights",
}
CONSTANT_PARTS: tuple[Part, ...] = ("depth", "points", "derived normals")
UNTRAINED_SEED = 1


def predict(pipeline: Pipeline, sample: SceneSample) -> GeometryPrediction:
    """The model's prediction for a sample's views, float32 on the CPU.

    Raises:
        CheckFailed: a predicted value is NaN or infinite.
    """
    try:
        prediction = pipeline.predict(sample.images.float() / 255)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  (the SVD of rotations)
        raise CheckFailed("predicted cameras are not finite", str(error), "check the weights") from error
    for name in ("local_points", "cam_to_world", "normals"):
        if count := int((~getattr(prediction, name).isfinite()).sum()):
            raise CheckFailed(f"{count:,} predicted values of {name} are not finite", "", "check the weights")
    return prediction


def model_system(pipeline: Pipeline, protocol: Protocol) -> System:
    """A model, scored on everything the truth allows."""
    return lambda sample: score(predict(pipeline, sample), sample, protocol)


def constant_depth(sample: SceneSample, protocol: Protocol) -> Row:
    """Best constant depth: in every view a plane facing the camera, at one distance per scene; no poses are scored.

    The distance is the one of the smallest AbsRel. True intrinsics and poses place the planes, so that its points are
    those of a flat world seen by perfectly known cameras.
    """
    truth = Truth.of(sample, protocol.depth.max_depth)
    if truth.depth is None:
        raise InputError(f"no constant depth for {sample.scene}", "it has no true depth", "")
    depth = torch.full_like(truth.depth, best_constant_depth(truth.depth))
    eye = torch.eye(4, dtype=torch.float64).expand(sample.num_views, 4, 4)
    intrinsics = eye[:, :3, :3] if sample.intrinsics is None else sample.intrinsics.double()
    poses = eye if truth.cam_to_world is None else truth.cam_to_world
    local_points = unproject(depth, intrinsics)
    normals = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand_as(local_points)
    return score(GeometryPrediction(local_points, poses, normals), sample, protocol, CONSTANT_PARTS)


def identity_pose(sample: SceneSample, protocol: Protocol) -> Row:
    """Identity poses; only poses are scored."""
    eye = torch.eye(4, dtype=torch.float64).expand(sample.num_views, 4, 4)
    nothing = torch.zeros(sample.num_views, *sample.size, 3)
    return score(GeometryPrediction(nothing, eye, nothing), sample, protocol, ("poses",))


def untrained(pipeline: Pipeline) -> Pipeline:
    """The same architecture, device and precision with random weights, seed `UNTRAINED_SEED`."""
    model = random_model(deepcopy(pipeline.model.config), pipeline.model.dtype, UNTRAINED_SEED, UNTRAINED)
    return Pipeline(model.to(pipeline.model.device), UNTRAINED)  # pyright: ignore[reportArgumentType]


def baseline_systems(pipeline: Pipeline, protocol: Protocol) -> dict[str, System]:
    """Every baseline by name, in the order of the table."""
    return {
        CONSTANT: lambda sample: constant_depth(sample, protocol),
        IDENTITY: lambda sample: identity_pose(sample, protocol),
        UNTRAINED: model_system(untrained(pipeline), protocol),
    }
