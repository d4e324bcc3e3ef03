"""From what supervision heads predict of a clip to a scene that can be looked at.

Shapes: S views, H' W' pixels of the predicted maps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from g2vlm.supervision.base import Supervision
from g2vlm.supervision.geovr import LEAST_TAN, GeoVRPrediction, TermName
from g2vlm.supervision.spatialsv import SpatialSVPrediction, Task
from geometry import apply_rigid, invert_rigid
from geometry.pose_encoding import decode_pose
from geometry.rays import camera_from_rays
from geometry.transforms import small_matmul


@dataclass(frozen=True, eq=False)
class LiftedScene:
    """A scene as heads see it. OpenCV axes.

    Args:
        depth: (S, H', W').
        cam_to_world: (S, 4, 4).
        intrinsics: (S, 3, 3) in pixels of the maps.
        points: (S, H', W', 3) in the world where they were predicted themselves; None: the depth seen from the cameras.
        confidence: (S, H', W'), larger is surer; None without any.
        metres_per_unit: () where the heads say how long a unit is; None: lengths mean nothing but their ratios.
    """

    depth: Tensor
    cam_to_world: Tensor
    intrinsics: Tensor
    points: Tensor | None = None
    confidence: Tensor | None = None
    metres_per_unit: Tensor | None = None


class Lifting(ABC):
    """How one kind of heads becomes a scene.

    Args:
        supervision: of that kind.
    """

    sources: ClassVar[dict[str, str]]
    """What a scene can be made from -> how, in words for people; the first that the heads have is the default."""

    def __init__(self, supervision: Supervision):
        self.supervision = supervision

    @abstractmethod
    def missing(self, source: str) -> tuple[str, ...]:
        """What the heads lack for a scene from `source`, by name."""

    @abstractmethod
    def scene(self, prediction: Any, source: str) -> LiftedScene:
        """The scene of a prediction of the heads."""


class SpatialSVLifting(Lifting):
    """Scenes of the predicted maps (interpretable lifting). Every camera is the one that fits the view's ray map."""

    sources: ClassVar[dict[str, str]] = {
        "depth": "depth seen from the cameras of the ray map",
        "points": "points as predicted, with the cameras of the ray map",
    }
    _tasks: ClassVar[dict[str, tuple[Task, ...]]] = {"depth": ("depth", "ray"), "points": ("point", "ray")}

    def missing(self, source: str) -> tuple[str, ...]:
        """As in `Lifting`: tasks."""
        return tuple(task for task in self._tasks[source] if task not in self.supervision.config.tasks)

    def scene(self, prediction: SpatialSVPrediction, source: str) -> LiftedScene:
        """As in `Lifting`; without a unit, which training does not teach."""
        rays = prediction.maps["ray"]
        cam_to_world, intrinsics = camera_from_rays(rays.values, rays.confidence)
        if source == "depth":
            depth, confidence = prediction.maps["depth"]
            return LiftedScene(depth[..., 0], cam_to_world, intrinsics, confidence=confidence)
        points, confidence = prediction.maps["point"]
        depth = apply_rigid(invert_rigid(cam_to_world), points)[..., 2]
        return LiftedScene(depth, cam_to_world, intrinsics, points, confidence)


class GeoVRLifting(Lifting):
    """Reconstructions as in GeoVR's Fig. 6: the predicted depth, seen from the predicted cameras, in the first one."""

    sources: ClassVar[dict[str, str]] = {"depth": "depth seen from the predicted cameras"}
    _terms: ClassVar[tuple[TermName, ...]] = ("camera", "depth")

    def missing(self, source: str) -> tuple[str, ...]:
        """As in `Lifting`: terms."""
        return tuple(term for term in self._terms if term not in self.supervision.config.terms)

    def scene(self, prediction: GeoVRPrediction, source: str = "depth") -> LiftedScene:
        """As in `Lifting`: the first pose is the identity, and a principal point is (W/2, H/2)."""
        assert prediction.camera is not None
        assert prediction.depth is not None
        height, width = prediction.depth.shape[-2:]
        world_to_cam, intrinsics = decode_pose(prediction.camera, (height, width), least_tan=LEAST_TAN)
        to_first = small_matmul(world_to_cam[0], invert_rigid(world_to_cam[1:]))
        identity = torch.eye(4, dtype=to_first.dtype, device=to_first.device)
        return LiftedScene(
            prediction.depth,
            torch.cat([identity[None], to_first]),
            intrinsics,
            confidence=prediction.confidence,
            metres_per_unit=prediction.scale,
        )


LIFTINGS: dict[str, type[Lifting]] = {"geovr": GeoVRLifting, "spatialsv": SpatialSVLifting}
"""Kind of heads -> what makes scenes of their predictions. Kinds that predict no scene are not here."""
