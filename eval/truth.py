"""The ground truth of one item, and what is made from it once for every system that is scored against it.

S views, H W pixels. Masks come from the ground truth alone.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from eval.protocols import NormalRule, Protocol
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from geometry import apply_rigid, normals_from_points, unproject
from geometry.metrics.points import thin_mask
from geometry.registration import Cloud

Part = Literal["depth", "points", "derived normals", "output normals", "poses"]
ALL_PARTS: tuple[Part, ...] = ("depth", "points", "derived normals", "output normals", "poses")


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth of an item in float64; absent parts are None.

    Attributes:
        sample: where it comes from.
        protocol: which of it counts.
        valid: (S, H, W) bool, pixels with finite positive depth below the protocol's limit.
        depth: (S, H, W), zero where invalid.
        cam_to_world: (S, 4, 4).
    """

    sample: SceneSample
    protocol: Protocol
    valid: Tensor
    depth: Tensor | None
    cam_to_world: Tensor | None

    @classmethod
    def of(cls, sample: SceneSample, protocol: Protocol) -> "Truth":
        """The truth that a sample holds.

        Raises:
            InputError: neither depth nor poses, no valid pixel, or a pose that is not finite.
        """
        valid, depth = _valid_depth(sample, protocol.depth.max_depth)
        poses = None if sample.cam_to_world is None else sample.cam_to_world.double()
        if poses is not None and not poses.isfinite().all():
            raise InputError(f"cannot score {sample.scene}", "a true pose is not finite", "check the scene's poses")
        if depth is None and poses is None:
            raise InputError(f"cannot score {sample.scene}", "it has neither depth nor poses", "use --dataset images")
        return cls(sample, protocol, valid, depth, poses)

    @cached_property
    def local_points(self) -> Tensor | None:
        """(S, H, W, 3); needs intrinsics."""
        if self.depth is None or self.sample.intrinsics is None:
            return None
        return unproject(self.depth, self.sample.intrinsics.double())

    @cached_property
    def world_points(self) -> Tensor | None:
        """(S, H, W, 3); needs intrinsics and poses."""
        if self.local_points is None or self.cam_to_world is None:
            return None
        return apply_rigid(self.cam_to_world, self.local_points)

    @property
    def parts(self) -> set[Part]:
        """What can be scored against it."""
        has: dict[Part, object] = {
            "depth": self.depth,
            "points": self.world_points,
            "derived normals": self.local_points,
            "output normals": self.local_points,
            "poses": self.cam_to_world,
        }
        return {part for part, value in has.items() if value is not None}

    @cached_property
    def scored_points(self) -> tuple[Tensor, Cloud]:
        """(S, H, W) bool, the pixels whose points are compared, and their N world points."""
        assert self.world_points is not None
        limit = self.protocol.points.max_points
        mask = self.valid if limit is None else torch.from_numpy(thin_mask(self.valid, limit))
        return mask, Cloud.of(self.world_points[mask], "true points")

    @cached_property
    def derived_normals(self) -> tuple[Tensor, Tensor]:
        """Normals of the local points (S, H, W, 3), and where they exist away from steps of the depth (S, H, W)."""
        assert self.local_points is not None
        normals, exists = normals_from_points(self.local_points, self.valid)
        return normals, exists & self._smooth(self.protocol.normals)

    @cached_property
    def output_normals(self) -> tuple[Tensor, Tensor]:
        """What a model's own normals are compared with, and where: those given with the data, or else derived ones."""
        if self.sample.normals is None:
            return self.derived_normals
        normals = self.sample.normals.double()
        return normals, self.valid & (normals.norm(dim=-1) > 0)

    def _smooth(self, rule: NormalRule) -> Tensor:
        """(S, H, W) bool: valid pixels away from steps of the depth, and from holes, by the protocol's rule."""
        assert self.depth is not None
        inverse = torch.where(self.valid, 1 / self.depth, 0)
        bend = torch.maximum(_second_difference(inverse), _second_difference(inverse.mT).mT)
        return self.valid & (bend <= rule.max_bend * inverse)


def _second_difference(values: Tensor) -> Tensor:
    """|v[i-1] - 2 v[i] + v[i+1]| along the last axis; 0 at its two ends."""
    inner = (values[..., :-2] - 2 * values[..., 1:-1] + values[..., 2:]).abs()
    return pad(inner, (1, 1))


def _valid_depth(sample: SceneSample, max_depth: float | None) -> tuple[Tensor, Tensor | None]:
    if sample.depth is None:
        return torch.zeros(sample.num_views, *sample.size, dtype=torch.bool), None
    depth = sample.depth.double()
    valid = depth.isfinite() & (depth > 0) & (depth < (math.inf if max_depth is None else max_depth))
    if sample.valid is not None:
        valid = valid & sample.valid
    if not valid.any():
        raise InputError(f"cannot score {sample.scene}", "no pixel has valid depth", "check the scene's depth maps")
    return valid, torch.where(valid, depth, 0)
