"""Targets from networks that predict points in each camera's own frame, and camera-to-world poses, without intrinsics.

Shapes: S views, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from g2vlm.predictions import usable_intrinsics
from g2vlm.supervision.targets import ConfidenceKind, TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import positive
from geometry import apply_rigid, intrinsics_from_points


@dataclass(frozen=True, eq=False)
class PointMaps:
    """What such a network says about one clip.

    Args:
        local_points: (S, H, W, 3) in each camera's frame.
        cam_to_world: (S, 4, 4).
        confidence: (S, H, W), of the kind that `confidence_kind` says; None without any.
        features: block -> (S, h, w, C).
    """

    local_points: Tensor
    cam_to_world: Tensor
    confidence: Tensor | None = None
    confidence_kind: ConfidenceKind = "one_plus_exp"
    features: Mapping[int, Tensor] | None = None


def targets_from_point_maps(maps: PointMaps, info: TeacherInfo) -> TeacherTargets:
    """Depth is the points' z; intrinsics are those that explain the points best; the first camera is the world."""
    local = maps.local_points.float()
    depth = local[..., 2]
    valid = positive(depth)
    cam_to_world = maps.cam_to_world.float()
    return TeacherTargets(
        num_views=len(local),
        size=info.input_size,
        info=info,
        depth=depth,
        confidence=None if maps.confidence is None else maps.confidence.float(),
        confidence_kind=maps.confidence_kind,
        valid=valid,
        cam_to_world=cam_to_world,
        intrinsics=usable_intrinsics(intrinsics_from_points(local, valid), local.shape[2]),
        points=apply_rigid(cam_to_world, local),
        features=maps.features or None,
    ).in_first_camera()
