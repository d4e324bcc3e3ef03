"""What a teacher of geometry says about a clip, whichever teacher it is.

Shapes: S views of one scene in order, H W pixels of the teacher's maps, h w cells of its features, C their width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

from geometry import apply_rigid, invert_rigid, unproject
from geometry.pose_encoding import encode_pose
from geometry.transforms import length, small_matmul
from geometry.types import expect_bool, expect_shape

ConfidenceKind = Literal["one_plus_exp", "sigmoid"]


@dataclass(frozen=True)
class TeacherInfo:
    """Where targets come from.

    Attributes:
        teacher, revision: the model, or the data set of ground truth.
        input_size: (H, W) of the images that the teacher saw.
        cell_size: pixels of its input per side of a feature cell: the patch size times any pooling; 0 without features.
        view_ids: names of the views in their source.
        preprocessing: hash of how the images were prepared.
    """

    teacher: str
    revision: str
    input_size: tuple[int, int]
    cell_size: int = 0
    view_ids: tuple[str, ...] = ()
    preprocessing: str = ""


@dataclass(frozen=True, eq=False)
class TeacherTargets:
    """Pseudo-labels of one clip. OpenCV axes; lengths in the teacher's unit; absent means unknown, never zeros.

    Attributes:
        num_views: S.
        size: (H, W) of all maps, and of the image that the intrinsics are for.
        info: where they come from.
        depth: (S, H, W) float32 z-depth.
        confidence: (S, H, W) float32 of the depth, of the kind that `confidence_kind` says.
        valid: (S, H, W) bool: finite, positive, no sky.
        cam_to_world: (S, 4, 4) float32.
        intrinsics: (S, 3, 3) float32 in pixels.
        points: (S, H, W, 3) float32 in the world, if the teacher predicts them apart from the depth.
        features: 0-based block -> (S, h, w, C), patches only.
        features_normed: whether the teacher's final norm was applied to them.
        metric_scale: () float32 metres per unit, NaN where it could not be found.
        confidence_kind: 1 + exp (from 1 upwards) or sigmoid (between 0 and 1).
    """

    num_views: int
    size: tuple[int, int]
    info: TeacherInfo
    depth: Tensor | None = None
    confidence: Tensor | None = None
    valid: Tensor | None = None
    cam_to_world: Tensor | None = None
    intrinsics: Tensor | None = None
    points: Tensor | None = None
    features: Mapping[int, Tensor] | None = None
    features_normed: bool = False
    metric_scale: Tensor | None = None
    confidence_kind: ConfidenceKind = "one_plus_exp"

    def __post_init__(self) -> None:
        views, (height, width) = self.num_views, self.size
        expect_shape("depth", self.depth, views, height, width)
        expect_shape("confidence", self.confidence, views, height, width)
        expect_shape("valid", self.valid, views, height, width)
        expect_bool("valid", self.valid)
        expect_shape("cam_to_world", self.cam_to_world, views, 4, 4)
        expect_shape("intrinsics", self.intrinsics, views, 3, 3)
        expect_shape("points", self.points, views, height, width, 3)
        expect_shape("metric_scale", self.metric_scale)
        rows_columns = [side / max(self.info.cell_size, 1) for side in self.info.input_size]
        for block, tensor in (self.features or {}).items():
            if tensor.dim() != 4 or tensor.shape[0] != views or list(tensor.shape[1:3]) != rows_columns:
                raise ValueError(
                    f"features[{block}]: given shape {tuple(tensor.shape)}, expected ({views}, h, w, C) with cells of "
                    f"{self.info.cell_size} pixels filling the input {self.info.input_size}"
                )

    @property
    def world_to_cam(self) -> Tensor:
        """(S, 4, 4)."""
        return invert_rigid(self._present("cam_to_world"))

    @property
    def pose_encoding(self) -> Tensor:
        """(S, 9) of `world_to_cam` and the intrinsics, by `geometry.encode_pose`."""
        return encode_pose(self.world_to_cam, self._present("intrinsics"), self.size)

    @property
    def world_points(self) -> Tensor:
        """(S, H, W, 3) in the world, from depth, intrinsics and poses."""
        local_points = unproject(self._present("depth"), self._present("intrinsics"))
        return apply_rigid(self._present("cam_to_world"), local_points)

    @property
    def mean_distance(self) -> Tensor:
        """() mean distance of valid finite points from the first camera; 1 without any, or when all are there."""
        points = self.world_points if self.points is None else self.points
        distance = length(points - self._present("cam_to_world")[0, :3, 3])  # (S, H, W)
        valid = self._present("valid") & distance.isfinite()
        mean = torch.where(valid, distance, 0).sum() / valid.sum().clamp_min(1)
        return torch.where(mean > 0, mean, 1)

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """Copy with every tensor on a device, or every floating-point tensor in a dtype."""
        if isinstance(target, torch.dtype):
            return self._map(lambda tensor: tensor.to(target) if tensor.is_floating_point() else tensor)
        return self._map(lambda tensor: tensor.to(target))

    def detached(self) -> Self:
        """Constants for a loss: cut from the teacher's graph, and copied where inference mode made them."""
        return self._map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor.detach())

    def in_first_camera(self) -> Self:
        """The same scene with the first camera as the world: its pose is exactly the identity."""
        cam_to_world = self._present("cam_to_world")
        to_first = invert_rigid(cam_to_world[0])
        identity = torch.eye(4, dtype=cam_to_world.dtype, device=cam_to_world.device)
        moved = torch.cat([identity[None], small_matmul(to_first, cam_to_world[1:])])
        points = None if self.points is None else apply_rigid(to_first, self.points)
        return replace(self, cam_to_world=moved, points=points)

    def scaled(self, factor: float | Tensor) -> Self:
        """The same scene in another unit: depth, translations and points times `factor`, metres per unit divided."""
        cam_to_world = self.cam_to_world
        if cam_to_world is not None:
            cam_to_world = cam_to_world.clone()
            cam_to_world[:, :3, 3] *= factor
        return replace(
            self,
            depth=None if self.depth is None else self.depth * factor,
            points=None if self.points is None else self.points * factor,
            cam_to_world=cam_to_world,
            metric_scale=None if self.metric_scale is None else self.metric_scale / factor,
        )

    def normalised(self) -> Self:
        """Lengths in units of the mean distance, so that losses of different clips compare (VGGT's convention)."""
        return self.scaled(1 / self.mean_distance)

    def _present(self, name: str) -> Tensor:
        """A field that is needed.

        Raises:
            ValueError: it is absent; the message names it and the teacher.
        """
        tensor = getattr(self, name)
        if tensor is None:
            raise ValueError(f"{name}: not among the targets of {self.info.teacher}, but needed")
        return tensor

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Copy with every tensor changed."""
        tensors = {f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        features = self.features and {block: change(tensor) for block, tensor in self.features.items()}
        return replace(self, **tensors, features=features)
