"""Data classes of the package: checked for shape at construction, trusted afterwards.

Shape legend: ... any batch, S views, H W pixels, N points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from geometry.cameras import intrinsics_from_points
from geometry.pointmaps import world_points_from_local
from geometry.transforms import rigid, rotate, small_matmul


def expect_shape(field: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless an optional tensor has exactly this shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{field}: given shape {tuple(tensor.shape)}, expected {shape}")


def expect_bool(field: str, tensor: Tensor | None) -> None:
    """Raise ValueError unless an optional tensor is boolean."""
    if tensor is not None and tensor.dtype != torch.bool:
        raise ValueError(f"{field}: given dtype {tensor.dtype}, expected torch.bool")


def expect_trailing(field: str, tensor: Tensor, trailing: tuple[int | None, ...]) -> None:
    """Raise ValueError unless a tensor's last dimensions match; None stands for any size."""
    given = tensor.shape[-len(trailing) :]
    if len(given) < len(trailing) or any(want not in (None, have) for want, have in zip(trailing, given, strict=True)):
        allowed = ", ".join("*" if size is None else str(size) for size in trailing)
        raise ValueError(f"{field}: given shape {tuple(tensor.shape)}, expected (..., {allowed})")


@dataclass(frozen=True, eq=False)
class TensorFields:
    """Base of data classes whose fields are tensors, None, or plain values."""

    def to(self, target: torch.device | torch.dtype | str) -> Self:
        """Copy with every tensor on a device, or every floating-point tensor in a dtype."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        if isinstance(target, torch.dtype):
            tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        return replace(self, **{name: tensor.to(target) for name, tensor in tensors.items()})

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Consecutive parts of the first axis; fields that are not tensors are repeated."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        parts = zip(*(getattr(self, name).split(list(sizes)) for name in names), strict=True)
        return [replace(self, **dict(zip(names, part, strict=True))) for part in parts]

    @classmethod
    def stack(cls, items: Sequence[Self]) -> Self:
        """One object with a new leading axis, from objects of equal shapes; other fields are the first one's."""
        names = [f.name for f in fields(items[0]) if isinstance(getattr(items[0], f.name), Tensor)]
        return replace(items[0], **{name: torch.stack([getattr(item, name) for item in items]) for name in names})


@dataclass(frozen=True, eq=False)
class Views(TensorFields):
    """Images of one scene and whatever is known of their cameras. Absent means unknown.

    Attributes:
        images: (..., S, 3, H, W) in [0, 1].
        intrinsics: (..., S, 3, 3) in pixels of the images.
        cam_to_world: (..., S, 4, 4), OpenCV axes.
        depth: (..., S, H, W), z along the optical axis.
        valid: (..., S, H, W) bool, True = the depth can be trusted.
        is_metric: whether the unit is the metre; otherwise everything is known up to one scale.
    """

    images: Tensor
    intrinsics: Tensor | None = None
    cam_to_world: Tensor | None = None
    depth: Tensor | None = None
    valid: Tensor | None = None
    is_metric: bool = False

    def __post_init__(self) -> None:
        expect_trailing("images", self.images, (None, 3, None, None))
        *batch, _, height, width = self.images.shape
        expect_shape("intrinsics", self.intrinsics, *batch, 3, 3)
        expect_shape("cam_to_world", self.cam_to_world, *batch, 4, 4)
        expect_shape("depth", self.depth, *batch, height, width)
        expect_shape("valid", self.valid, *batch, height, width)
        expect_bool("valid", self.valid)


@dataclass(frozen=True, eq=False)
class GeometryPrediction(TensorFields):
    """What the geometry heads predict for the views of one scene, up to one scale per scene.

    Attributes:
        local_points: (..., S, H, W, 3), each in its view's camera frame.
        cam_to_world: (..., S, 4, 4); only relative poses are meaningful.
        normals: (..., S, H, W, 3), unit vectors in the camera frame.
        global_points: (..., S, H, W, 3) in the first view's frame, from the head that exists in training.
        confidence: (..., S, H, W), a logit.
    """

    local_points: Tensor
    cam_to_world: Tensor
    normals: Tensor
    global_points: Tensor | None = None
    confidence: Tensor | None = None

    def __post_init__(self) -> None:
        expect_trailing("local_points", self.local_points, (None, None, None, 3))
        shape = self.local_points.shape
        expect_shape("cam_to_world", self.cam_to_world, *shape[:-3], 4, 4)
        expect_shape("normals", self.normals, *shape)
        expect_shape("global_points", self.global_points, *shape)
        expect_shape("confidence", self.confidence, *shape[:-1])

    @property
    def depth(self) -> Tensor:
        """z of the local points (..., S, H, W)."""
        return self.local_points[..., 2]

    @property
    def world_points(self) -> Tensor:
        """Local points moved by `cam_to_world` (..., S, H, W, 3)."""
        return world_points_from_local(self.local_points, self.cam_to_world)

    @property
    def intrinsics(self) -> Tensor:
        """Intrinsics (..., S, 3, 3) estimated from the local points by `cameras.intrinsics_from_points`."""
        return intrinsics_from_points(self.local_points)


@dataclass(frozen=True, eq=False)
class Similarity(TensorFields):
    """A similarity transform `x -> scale * rotation x + translation` (Sim(3)).

    Attributes:
        scale: (...).
        rotation: (..., 3, 3).
        translation: (..., 3).
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    def __post_init__(self) -> None:
        expect_shape("rotation", self.rotation, *self.scale.shape, 3, 3)
        expect_shape("translation", self.translation, *self.scale.shape, 3)

    @property
    def matrix(self) -> Tensor:
        """(..., 4, 4): `[s R, t; 0 1]`."""
        return rigid(self.scale[..., None, None] * self.rotation, self.translation)

    def apply(self, points: Tensor) -> Tensor:
        """Transform points (..., N, 3)."""
        rotated = rotate(self.rotation, points)
        return self.scale[..., None, None] * rotated + self.translation[..., None, :]

    def inverse(self) -> "Similarity":
        """The transform that undoes this one: `x -> (1/s) R' (x - t)`."""
        rotation = self.rotation.mT
        scale = 1 / self.scale
        return Similarity(scale, rotation, -scale[..., None] * rotate(rotation, self.translation))

    def compose(self, first: "Similarity") -> "Similarity":
        """The transform that applies `first` and then this one; batches must agree."""
        moved = self.scale[..., None] * rotate(self.rotation, first.translation)
        rotation = small_matmul(self.rotation, first.rotation)
        return Similarity(self.scale * first.scale, rotation, moved + self.translation)
