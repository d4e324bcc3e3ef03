"""Scenes of equal view count and size, stacked: what a training or evaluation step takes.

Shapes: B scenes, S views, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2vlm.data.types import SceneSample
from geometry import GeometryTargets, apply_rigid, unproject
from geometry.types import TensorFields


@dataclass(frozen=True, eq=False)
class SceneBatch(TensorFields):
    """Raw tensors of B scenes; views and targets are computed from them on the device where they lie.

    Args:
        images: (B, S, 3, H, W) uint8 RGB.
        depth: (B, S, H, W) float32 z-depth; finite everywhere, positive where valid.
        valid: (B, S, H, W) bool; False throughout a scene without depth, intrinsics or poses.
        intrinsics: (B, S, 3, 3).
        cam_to_world: (B, S, 4, 4).
        normal_enabled: (B,) bool, whether the depth is good enough for normal terms.
        normals: (B, S, H, W, 3) exact normals in the camera frame; None unless every scene has them.
        names: "dataset/scene" of each scene.
    """

    images: Tensor
    depth: Tensor
    valid: Tensor
    intrinsics: Tensor
    cam_to_world: Tensor
    normal_enabled: Tensor
    normals: Tensor | None
    names: tuple[str, ...]

    @property
    def views(self) -> Tensor:
        """(B, S, 3, H, W) float32 in [0, 1]."""
        return self.images.float() / 255

    @property
    def targets(self) -> GeometryTargets:
        """The ground truth of the geometry loss; world points are computed here, on the batch's device."""
        return GeometryTargets(
            world_points=apply_rigid(self.cam_to_world, unproject(self.depth, self.intrinsics)),
            cam_to_world=self.cam_to_world,
            valid=self.valid,
            normal_enabled=self.normal_enabled,
            normals=self.normals,
        )

    def groups(self) -> list[tuple[list[int], "SceneBatch"]]:
        """The scenes of equal shape together: all."""
        return [([*range(len(self.names))], self)]


def collate(samples: Sequence[SceneSample]) -> SceneBatch:
    """Stack samples.

    Depth that is not finite and positive is invalid; a scene with a pose or intrinsics that
    are not finite has no valid pixel.

    Raises:
        ValueError: no samples, or samples of different view counts or sizes.
    """
    shapes = {(sample.num_views, *sample.size) for sample in samples}
    if len(shapes) != 1:
        raise ValueError(f"samples of one batch need one view count and size; given (S, H, W) {sorted(shapes)}")
    truths = [_truth(sample) for sample in samples]
    normals = [sample.normals for sample in samples if sample.normals is not None]
    return SceneBatch(
        images=torch.stack([sample.images for sample in samples]),
        depth=torch.stack([truth[0] for truth in truths]),
        valid=torch.stack([truth[1] for truth in truths]),
        intrinsics=torch.stack([truth[2] for truth in truths]),
        cam_to_world=torch.stack([truth[3] for truth in truths]),
        normal_enabled=torch.tensor([sample.quality != "low" for sample in samples]),
        normals=torch.stack(normals) if len(normals) == len(samples) else None,
        names=tuple(f"{sample.dataset}/{sample.scene}" for sample in samples),
    )


def _truth(sample: SceneSample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth, validity, intrinsics and poses of one scene, finite everywhere."""
    num_views, (height, width) = sample.num_views, sample.size
    depth, intrinsics, poses = sample.depth, sample.intrinsics, sample.cam_to_world
    if depth is None or intrinsics is None or poses is None:
        eyes = torch.eye(3).repeat(num_views, 1, 1), torch.eye(4).repeat(num_views, 1, 1)
        return torch.ones(num_views, height, width), torch.zeros(num_views, height, width, dtype=torch.bool), *eyes
    valid = depth.isfinite() & (depth > 0)
    if sample.valid is not None:
        valid = valid & sample.valid
    usable = intrinsics.isfinite().all() & poses.isfinite().all()
    return (
        torch.where(depth.isfinite(), depth, 0),
        valid & usable,
        torch.where(usable, intrinsics, torch.eye(3)),
        torch.where(usable, poses, torch.eye(4)),
    )
