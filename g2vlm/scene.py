"""What a reconstruction gives to its user: points, cameras and images with their names, sizes and units.

S views, H, W pixels at model size. Axes are OpenCV's (x right, y down, z forward); pixel (0, 0) has its centre at
(0, 0).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from g2vlm.errors import CheckFailed, InputError
from g2vlm.export import PointFilter, export
from g2vlm.images import SourceImage
from geometry.cameras import resize_intrinsics
from geometry.io.common import CONVENTION

Units = Literal["relative", "metre"]
VERSION = 1
ARRAYS = ("local_points", "cam_to_world", "normals", "intrinsics", "images", "valid")


@dataclass(frozen=True, eq=False)
class Scene:
    """A reconstructed scene, in numpy.

    Attributes:
        local_points: (S, H, W, 3) float32, in the camera frame of each view.
        cam_to_world: (S, 4, 4) float32, x_world = cam_to_world @ x_camera. The world frame is the model's choice.
        normals: (S, H, W, 3) float32 unit normals in the camera frame, zero where undefined.
        intrinsics: (S, 3, 3) float32 in pixels of the ORIGINAL images; `intrinsics_at` gives them for another size.
        images: (S, H, W, 3) uint8, at model size.
        valid: (S, H, W) bool, True = use.
        original_sizes: (height, width) of each upright original image.
        image_paths: the file of each view, None for images that came from memory.
        units: `relative` (known up to one scale per scene) or `metre`.
        model: name or description of the model, for people.
        confidence: (S, H, W) float32, larger is surer, or None when the model gives none.
        sources: the S images as read, for questions about the scene; None for a scene that was loaded.

    Raises:
        InputError: shapes, types or counts that do not fit together.
        CheckFailed: a value is NaN or infinite.
    """

    local_points: np.ndarray
    cam_to_world: np.ndarray
    normals: np.ndarray
    intrinsics: np.ndarray
    images: np.ndarray
    valid: np.ndarray
    original_sizes: tuple[tuple[int, int], ...]
    image_paths: tuple[Path | None, ...]
    units: Units
    model: str
    confidence: np.ndarray | None = None
    sources: tuple[SourceImage, ...] | None = field(default=None, repr=False)

    def __post_init__(self):
        self._check_shapes()
        for name, array in self._arrays().items():
            _check_finite(name, array)

    @classmethod
    def from_prediction(
        cls,
        local_points: np.ndarray,
        cam_to_world: np.ndarray,
        normals: np.ndarray,
        intrinsics: np.ndarray,
        images: np.ndarray,
        sources: Sequence[SourceImage],
        *,
        units: Units,
        model: str,
        valid: np.ndarray | None = None,
        confidence: np.ndarray | None = None,
    ) -> Self:
        """A scene from what the model gives for S views and the images it was given.

        Args:
            local_points: (S, H, W, 3).
            cam_to_world: (S, 4, 4).
            normals: (S, H, W, 3) in the camera frame.
            intrinsics: (S, 3, 3) in pixels of the MODEL size H, W.
            images: (S, 3, H, W) in [0, 1], the model's input before normalisation.
            sources: the S images as read.
            units: `relative` or `metre`.
            model: name or description.
            valid: (S, H, W) bool; by default every pixel with positive depth.
            confidence: (S, H, W).
        """
        sizes = tuple(source.size for source in sources)
        _expect_count("sources", len(sizes), len(local_points))
        _expect_count("intrinsics", len(intrinsics), len(local_points))
        height, width = local_points.shape[1:3]
        original = [_resized(K, (height, width), size) for K, size in zip(intrinsics, sizes, strict=True)]
        return cls(
            local_points=np.asarray(local_points, dtype=np.float32),
            cam_to_world=np.asarray(cam_to_world, dtype=np.float32),
            normals=np.asarray(normals, dtype=np.float32),
            intrinsics=np.stack(original),
            images=np.round(np.moveaxis(images, 1, -1) * 255).astype(np.uint8),
            valid=local_points[..., 2] > 0 if valid is None else np.asarray(valid),
            original_sizes=sizes,
            image_paths=tuple(source.path for source in sources),
            units=units,
            model=model,
            confidence=None if confidence is None else np.asarray(confidence, dtype=np.float32),
            sources=tuple(sources),
        )

    @property
    def num_views(self) -> int:
        """S."""
        return len(self.local_points)

    @property
    def resized_to(self) -> tuple[int, int]:
        """(H, W), the size every image was stretched to for the model."""
        return self.local_points.shape[1], self.local_points.shape[2]

    @property
    def depth(self) -> np.ndarray:
        """z along the optical axis (S, H, W)."""
        return self.local_points[..., 2]

    @cached_property
    def world_points(self) -> np.ndarray:
        """(S, H, W, 3) float32: local points moved by `cam_to_world`."""
        rotation, translation = self.cam_to_world[:, None, :3, :3], self.cam_to_world[:, None, None, :3, 3]
        return self.local_points @ rotation.swapaxes(-1, -2) + translation

    @cached_property
    def world_to_cam(self) -> np.ndarray:
        """(S, 4, 4) float32, the inverse of `cam_to_world`."""
        return np.linalg.inv(self.cam_to_world.astype(np.float64)).astype(np.float32)

    def intrinsics_at(self, size: tuple[int, int]) -> np.ndarray:
        """(S, 3, 3) intrinsics in pixels of images stretched to (height, width)."""
        pairs = zip(self.intrinsics, self.original_sizes, strict=True)
        return np.stack([_resized(K, original, size) for K, original in pairs])

    def save(self, folder: str | Path, overwrite: bool = False) -> list[Path]:
        """Write `scene.safetensors` and `scene.json`, from which `load` restores the scene exactly.

        Raises:
            InputError: the folder has content and `overwrite` is off, or cannot be written.
            ResourceError: the disk is full.
        """
        return export(self, folder, ("scene",), overwrite=overwrite)

    def export(
        self,
        target: str | Path,
        formats: Sequence[str] | None = None,
        *,
        overwrite: bool = False,
        min_confidence: float | None = None,
        max_points: int | None = None,
    ) -> list[Path]:
        """Write files for other programs; `g2vlm.export.export` describes formats, options and errors."""
        points = PointFilter(min_confidence, max_points)
        return export(self, target, formats, overwrite=overwrite, points=points)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The scene that `save` or `export` wrote into `folder`.

        Raises:
            InputError: no scene there, one of another version, or damaged files.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "scene.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "scene.safetensors")
            if record["version"] != VERSION:
                raise ValueError(f"version {record['version']}, expected {VERSION}")
            views = record["views"]
            return cls(
                **{name: arrays[name] for name in ARRAYS},  # pyright: ignore[reportArgumentType]
                original_sizes=tuple((int(view["height"]), int(view["width"])) for view in views),
                image_paths=tuple(Path(view["image"]) if view["image"] else None for view in views),
                units=record["units"],
                model=record["model"],
                confidence=arrays.get("confidence"),
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckFailed) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"cannot load a scene from  {folder}", why, "run the reconstruction again") from error

    def record(self) -> dict:
        """What `scene.json` holds."""
        paths = [None if path is None else str(path) for path in self.image_paths]
        return {
            "version": VERSION,
            "model": self.model,
            "units": self.units,
            "convention": CONVENTION,
            "resized_to": {"height": self.resized_to[0], "width": self.resized_to[1]},
            "views": [
                {"image": path, "height": height, "width": width}
                for path, (height, width) in zip(paths, self.original_sizes, strict=True)
            ],
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """What `scene.safetensors` holds."""
        return {name: np.ascontiguousarray(array) for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return arrays if self.confidence is None else {**arrays, "confidence": self.confidence}

    def _check_shapes(self) -> None:
        if self.local_points.ndim != 4 or 0 in self.local_points.shape:
            raise _misfit("local_points", self.local_points.shape, "(S, H, W, 3) with at least one view")
        views, height, width = self.local_points.shape[:3]
        maps = (views, height, width)
        expected = {
            "local_points": ((*maps, 3), np.float32),
            "cam_to_world": ((views, 4, 4), np.float32),
            "normals": ((*maps, 3), np.float32),
            "intrinsics": ((views, 3, 3), np.float32),
            "images": ((*maps, 3), np.uint8),
            "valid": (maps, np.bool_),
            "confidence": (maps, np.float32),
        }
        for name, array in self._arrays().items():
            shape, dtype = expected[name]
            if array.shape != shape or array.dtype != dtype:
                raise _misfit(name, f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}")
        _expect_count("original_sizes", len(self.original_sizes), views)
        _expect_count("image_paths", len(self.image_paths), views)
        if self.units not in ("relative", "metre"):
            raise _misfit("units", self.units, "'relative' or 'metre'")


def _resized(K: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """`geometry.cameras.resize_intrinsics` for one (3, 3) numpy matrix, computed in float64."""
    return resize_intrinsics(torch.tensor(K, dtype=torch.float64), old_size, new_size).numpy().astype(np.float32)


def _misfit(name: str, given: object, allowed: object) -> InputError:
    return InputError(f"a scene cannot have this {name}", f"given {given}, allowed {allowed}", "check the arrays")


def _expect_count(name: str, given: int, views: int) -> None:
    if given != views:
        raise _misfit(name, f"{given} entries", f"{views}, one per view")


def _check_finite(name: str, array: np.ndarray) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array).reshape(len(array), -1)
    raise CheckFailed(
        f"the reconstruction is unusable: {bad.sum():,} values of {name} are not finite",
        f"first in view {int(bad.any(1).argmax())} of {len(array)}",
        "check the weights (g2vlm info) and try --dtype float32",
    )
