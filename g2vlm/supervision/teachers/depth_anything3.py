"""Depth-Anything-3 as a teacher, and its metric model as the source of a clip's scale, from a local installation.

Written from the published description, not run with the released weights. The network takes ImageNet-normalised frames
(sides multiples of 14) and gives depth = exp(.), a confidence 1 + exp(.), and cameras in two ways: nine numbers of a
camera-to-world pose from a camera token, or a map of rays, direction first, with its own confidence. Features are
outputs of its blocks after the final norm, without the special token. The metric model gives per frame a raw depth,
metric after multiplication with f / 300, and a probability of sky.

Shapes: S views, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.model.recorder import Recorder
from g2vlm.processing import normalise_views
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import (
    NetworkTeacher,
    Preparation,
    autocast,
    entry,
    fingerprint,
    import_network,
    load_folder,
    patch_features,
    positive,
)
from geometry import resize_intrinsics
from geometry.losses.metric_scale import MetricScaleRule, fit_metric_scale, metric_depth
from geometry.pose_encoding import decode_pose_cam_to_world
from geometry.rays import camera_from_rays, ray_map_from_direction_first

SOURCE = "https://github.com/ByteDance-Seed/Depth-Anything-3"
PATCH = 14
BLOCKS = (18, 26, 32, 38)
LEAST_TAN = 1e-6
Cameras = Literal["token", "rays"]


def load_network(weights: str | None) -> Any:
    """The network inside the package's interface, from a folder with config.json and model.safetensors."""
    interface = import_network("depth_anything_3", "depth_anything_3.api", "DepthAnything3", SOURCE, weights)
    return load_folder(interface, str(weights)).model


class DepthAnything3(NetworkTeacher):
    """A multi-view model of Depth-Anything-3; the defaults are the giant's.

    Args:
        weights: folder with config.json and model.safetensors.
        blocks: whose normed outputs are the features, 0-based.
        width, depth: of those outputs, and how many blocks there are.
        cameras: `token`: as the camera token says; `rays`: as the rays say.
        pool: features are averaged over pool x pool patches.
        long_side: of the input in pixels; by default the clip's.
    """

    def __init__(
        self,
        weights: str | None = None,
        blocks: Sequence[int] = BLOCKS,
        width: int = 1536,
        depth: int = 40,
        cameras: Cameras = "token",
        pool: int = 2,
        long_side: int | None = None,
    ):
        if cameras not in ("token", "rays"):
            raise InputError(f"cameras is {cameras!r}", "", "allowed are token, rays")
        network = load_network(weights)
        self.cameras: Cameras = cameras
        prepare = Preparation(PATCH * pool, long_side, pool)
        features = TeacherFeatures(tuple(blocks), depth, width) if blocks else None
        super().__init__("depth_anything3", network, prepare, features, f"{fingerprint(str(weights))}-{cameras}")

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        blocks = [] if self.features is None else [*self.features.blocks]
        dense: dict[str, Any] = {}  # the head's rays, which the network drops once it has poses

        def keep(module: Any, given: Any, output: Mapping[str, Any]) -> None:
            dense.update(output)

        hook = self.network.head.register_forward_hook(keep)
        with Recorder() as recorder, autocast(images):
            recorder.keep_output(self.network.cam_dec)
            outputs = self.network(normalise_views(images)[None], export_feat_layers=blocks)
        hook.remove()
        if self.cameras == "rays":
            camera = camera_from_da3_rays(entry(dense, "ray"), entry(dense, "ray_conf"), self.info(images).input_size)
        else:
            pose = recorder.output(self.network.cam_dec)[0]  # (S, 9)
            camera = decode_pose_cam_to_world(pose, self.info(images).input_size, least_tan=LEAST_TAN)
        features = {block: outputs["aux"][f"feat_layer_{block}"][0] for block in blocks}
        return targets_from_da3(outputs, camera, features, self.info(images), self.prepare)


def camera_from_da3_rays(rays: Tensor, confidence: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """cam_to_world (S, 4, 4) and intrinsics (S, 3, 3) for maps of `size`, from rays (S, h, w, 6) direction first."""
    cam_to_world, intrinsics = camera_from_rays(ray_map_from_direction_first(rays), confidence)
    height, width = rays.shape[-3:-1]
    return cam_to_world, resize_intrinsics(intrinsics, (height, width), size)


def targets_from_da3(
    outputs: Mapping[str, Any],
    camera: tuple[Tensor, Tensor],
    features: Mapping[int, Tensor],
    info: TeacherInfo,
    prepare: Preparation,
) -> TeacherTargets:
    """What the network said, in this project's conventions.

    Args:
        outputs: of the network: depth and depth_conf (1, S, H, W).
        camera: cam_to_world (S, 4, 4) and intrinsics (S, 3, 3) for H W.
        features: block -> (S, rows, columns, C), normed.
        info, prepare: as of `targets_from_vggt`.
    """
    depth = entry(outputs, "depth")
    return TeacherTargets(
        num_views=len(depth),
        size=info.input_size,
        info=info,
        depth=depth,
        confidence=entry(outputs, "depth_conf"),
        valid=positive(depth),
        cam_to_world=camera[0],
        intrinsics=camera[1],
        features={block: patch_features(maps, prepare) for block, maps in features.items()} or None,
        features_normed=True,
    ).in_first_camera()


class MetricScale:
    """The metric model of Depth-Anything-3: metres per unit of the depth that other teachers gave (GeoVR eq. 4).

    Args:
        weights: folder of the metric model.
        long_side: of its input in pixels; by default the clip's.
    """

    name = "depth_anything3_metric"
    online = True
    features: TeacherFeatures | None = None

    def __init__(self, weights: str | None = None, long_side: int | None = None):
        self.network = load_network(weights).eval().requires_grad_(False)
        self.prepare = Preparation(PATCH, long_side)
        self.revision, self.preprocessing = fingerprint(str(weights)), self.prepare.digest

    @torch.no_grad()
    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        """As in `Teacher`: a scale where none is known and there is depth with intrinsics."""
        known = targets is not None and targets.metric_scale is not None and bool(targets.metric_scale.isfinite())
        if targets is None or known or targets.depth is None or targets.intrinsics is None:
            return targets
        images = self.prepare(clip.images)
        self.network.to(images.device)
        with autocast(images):
            outputs = self.network(normalise_views(images)[:, None])  # every frame a clip of its own
        scale = scale_from_da3(outputs["depth"][:, 0].float(), outputs["sky"][:, 0].float(), targets)
        return replace(targets, metric_scale=scale)


def scale_from_da3(raw_depth: Tensor, sky: Tensor, targets: TeacherTargets) -> Tensor:
    """() metres per unit of the targets' depth, NaN where it cannot be found.

    Args:
        raw_depth, sky: of the metric model, (S, H, W) of its own input.
        targets: with depth and intrinsics; what is not valid counts as sky.
    """
    assert targets.depth is not None
    assert targets.intrinsics is not None
    depth = targets.depth.to(raw_depth.device)
    height, width = raw_depth.shape[-2:]
    metric = metric_depth(raw_depth, resize_intrinsics(targets.intrinsics.to(depth), targets.size, (height, width)))
    metric, sky = (
        F.interpolate(maps[:, None], targets.size, mode="bilinear", align_corners=False)[:, 0] for maps in (metric, sky)
    )
    if targets.valid is not None:
        sky = torch.where(targets.valid.to(sky.device), sky, 1)
    confidence = torch.ones_like(depth) if targets.confidence is None else targets.confidence.to(depth)
    found = fit_metric_scale(depth, confidence, metric, sky, MetricScaleRule())
    return torch.where(found.valid, found.scale, torch.nan)
