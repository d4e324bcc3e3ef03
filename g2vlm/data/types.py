"""The contract of scene data: what a source gives, whatever it reads or renders.

Shapes: S views, H W pixels. OpenCV axes; pixel (0, 0) has its centre at coordinate (0, 0).
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from geometry import apply_rigid, unproject

Quality = Literal["high", "middle", "low"]
LicenseClass = Literal["permissive", "sharealike", "noncommercial", "agreement", "unknown"]


@dataclass(frozen=True)
class ViewRequest:
    """Which excerpt of a scene is wanted.

    Args:
        num_views: S; a source that has fewer raises InputError.
        size: (H, W) of every view, multiples of 14.
        seed: of everything random in the excerpt: which views, their order, crops. Equal requests give equal samples.
    """

    num_views: int
    size: tuple[int, int]
    seed: int


@dataclass(frozen=True, eq=False)
class SceneSample:
    """Views of one scene at the size asked for. Absent means unknown, never zeros.

    Args:
        images: (S, 3, H, W) uint8 RGB.
        depth: (S, H, W) float32 z-depth; anything where invalid.
        valid: (S, H, W) bool, True = the depth can be trusted.
        intrinsics: (S, 3, 3) float32 in pixels of the H x W grid.
        cam_to_world: (S, 4, 4) float32.
        normals: (S, H, W, 3) float32 unit normals in the camera frame, towards the camera.
        instances: (S, H, W) int32 instance of each pixel, -1 = none.
        categories: (S, H, W) int32 category of each pixel, -1 = none.
        is_metric: lengths are metres.
        quality: of the depth; `low` gets no normal loss.
        dataset, scene: where it comes from.
        view_ids: the views' names in the source, in the order given.
        license_class: what the data may be used for.
    """

    images: Tensor
    depth: Tensor | None = None
    valid: Tensor | None = None
    intrinsics: Tensor | None = None
    cam_to_world: Tensor | None = None
    normals: Tensor | None = None
    instances: Tensor | None = None
    categories: Tensor | None = None
    is_metric: bool = False
    quality: Quality = "high"
    dataset: str = ""
    scene: str = ""
    view_ids: tuple[str, ...] = ()
    license_class: LicenseClass = "unknown"

    def __post_init__(self) -> None:
        num_views, channels, height, width = self.images.shape
        shapes = {
            "images": (num_views, channels, height, width),
            "depth": (num_views, height, width),
            "valid": (num_views, height, width),
            "intrinsics": (num_views, 3, 3),
            "cam_to_world": (num_views, 4, 4),
            "normals": (num_views, height, width, 3),
            "instances": (num_views, height, width),
            "categories": (num_views, height, width),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: given shape {tuple(tensor.shape)}, expected {shape}")
        if self.images.dtype != torch.uint8:
            raise ValueError(f"images: given dtype {self.images.dtype}, expected torch.uint8")

    @property
    def num_views(self) -> int:
        """S."""
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def local_points(self) -> Tensor:
        """(S, H, W, 3) points in each camera's frame; needs depth and intrinsics."""
        assert self.depth is not None
        assert self.intrinsics is not None
        return unproject(self.depth, self.intrinsics)

    @property
    def world_points(self) -> Tensor:
        """(S, H, W, 3) points in the world frame; needs depth, intrinsics and poses."""
        assert self.cam_to_world is not None
        return apply_rigid(self.cam_to_world, self.local_points)

    def views(self, order: Tensor) -> Self:
        """The sample with its views chosen and ordered by index."""
        tensors = {f.name: value[order] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors, view_ids=tuple(self.view_ids[i] for i in order.tolist()))


class SceneSource(Protocol):
    """Scenes that can be excerpted at random, deterministically."""

    name: str
    """As in configs and results."""

    def __len__(self) -> int:
        """Number of scenes; an endless source gives a large number."""
        ...

    def num_views(self, scene: int) -> int:
        """How many views a scene can give."""
        ...

    def load(self, scene: int, request: ViewRequest) -> SceneSample:
        """An excerpt of a scene.

        Raises:
            InputError: the scene cannot be read or has too few views; the message names the file.
        """
        ...
