"""An analytic scene of planes and boxes, a teacher that knows it, and packages that say of it what the published
networks would."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import roma
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from g2vlm.data.types import SceneSample
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from geometry import apply_rigid, invert_rigid, unproject
from geometry.pose_encoding import encode_pose
from geometry.rays import make_ray_map, ray_map_to_direction_first
from tests.g2vlm.rooms import camera, look

VIEWS = 3


@dataclass(frozen=True)
class AnalyticScene:
    """Exact depth (S, H, W) and cameras of the box room; the world is not the first camera's.

    Args:
        corner: the principal point is (W/2, H/2), else ((W-1)/2, (H-1)/2).
        unit: how many units a metre has.
    """

    size: tuple[int, int]
    corner: bool
    unit: float = 1.0
    views: int = VIEWS

    @property
    def intrinsics(self) -> Tensor:
        height, width = self.size
        centre = (width / 2, height / 2) if self.corner else ((width - 1) / 2, (height - 1) / 2)
        K = torch.tensor([[0.8 * width, 0, centre[0]], [0, 0.75 * width, centre[1]], [0, 0, 1]])
        return K.expand(self.views, 3, 3).contiguous()

    @property
    def cam_to_world(self) -> Tensor:
        poses = torch.from_numpy(np.stack([camera(view, self.views) for view in range(self.views)])).float()
        poses[:, :3, 3] *= self.unit
        return poses

    @property
    def depth(self) -> Tensor:
        K = self.intrinsics[0].double().numpy()
        local = [look(camera(view, self.views), K, self.size)[0] for view in range(self.views)]
        return torch.from_numpy(np.stack(local)[..., 2]).float() * self.unit

    @property
    def images(self) -> Tensor:
        """(S, 3, H, W) uint8."""
        K = self.intrinsics[0].double().numpy()
        colours = [look(camera(view, self.views), K, self.size)[2] for view in range(self.views)]
        return torch.from_numpy(np.stack(colours)).permute(0, 3, 1, 2).contiguous()

    @property
    def points(self) -> Tensor:
        """(S, H, W, 3) in the first camera."""
        local = unproject(self.depth, self.intrinsics)
        return apply_rigid(invert_rigid(self.cam_to_world[0]), apply_rigid(self.cam_to_world, local))

    def sample(self, name: str = "box room") -> SceneSample:
        return SceneSample(
            self.images,
            self.depth,
            torch.ones_like(self.depth, dtype=torch.bool),
            self.intrinsics,
            self.cam_to_world,
            is_metric=self.unit == 1.0,
            dataset="analytic",
            scene=name,
            view_ids=tuple(str(i) for i in range(self.views)),
        )

    def clip(self, name: str = "box room") -> Clip:
        scene = self.sample(name)
        return Clip(scene.images.float() / 255, f"analytic/{name}", scene)


class SyntheticTeacher:
    """Everything that a teacher can say about an analytic clip, from its scene; a function of the clip alone."""

    name = "synthetic"
    online = True
    revision = "1"
    features = TeacherFeatures((1, 3), 4, 6)

    def __init__(self, wide: bool = True):
        self.preprocessing = "wide" if wide else "narrow"
        self.asked: list[str] = []

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        self.asked.append(clip.name)
        scene = clip.scene
        if scene is None:
            return targets
        grid = (scene.size[0] // 14, scene.size[1] // 14)
        generator = torch.Generator().manual_seed(int(scene.images.sum()))
        noise = torch.rand(scene.depth.shape, generator=generator)
        info = TeacherInfo(self.name, self.revision, scene.size, 14, scene.view_ids, self.preprocessing)
        return TeacherTargets(
            num_views=scene.num_views,
            size=scene.size,
            info=info,
            depth=scene.depth,
            confidence=1 + torch.exp(6 * noise - 3),
            valid=noise > 0.2,
            cam_to_world=scene.cam_to_world,
            intrinsics=scene.intrinsics,
            points=scene.world_points,
            features={
                block: torch.randn(scene.num_views, *grid, 6, generator=generator).bfloat16()
                for block in self.features.blocks
            },
            metric_scale=torch.tensor(2.5),
        ).in_first_camera()


def tokens(block: int, views: int, grid: tuple[int, int], special: int, width: int) -> Tensor:
    """(S, special + h w, C): special tokens are 1e4; the first half of a patch's channels is 100 block + 10 row +
    column, the second half minus that."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    value = (100 * block + 10 * rows + columns).float().flatten()[:, None].expand(-1, width // 2)
    patches = torch.cat([value, -value], dim=-1).expand(views, -1, -1)
    return torch.cat([torch.full((views, special, width), 1e4), patches], dim=1)


class _Fake(nn.Module):
    """A network with one weight, which says what `scene` is."""

    scene: AnalyticScene

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    @classmethod
    def from_pretrained(cls, folder: str, local_files_only: bool) -> "_Fake":
        assert local_files_only
        assert (Path(folder) / "model.safetensors").is_file()
        return cls()

    def seen(self, images: Tensor) -> AnalyticScene:
        """The scene at the size of the input; frames are in [0, 1]."""
        assert images.shape[1] == self.scene.views
        assert images.min() >= 0
        assert images.max() <= 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return replace(self.scene, size=(images.shape[-2], images.shape[-1]))

    @property
    def world_to_cam(self) -> Tensor:
        """VGGT's world is the first camera, but for the network's error."""
        poses = self.scene.cam_to_world
        near = torch.eye(4)
        near[:3, :3] = roma.rotvec_to_rotmat(torch.tensor([0.02, -0.01, 0.03]))
        near[:3, 3] = self.scene.unit * torch.tensor([0.01, 0.02, -0.01])
        return invert_rigid(near @ invert_rigid(poses[0]) @ poses)


class FakeVGGT(_Fake):
    patch, special, sparse = 14, 5, False

    def aggregator(self, images: Tensor) -> tuple[list[Tensor | None], int]:
        self.now = self.seen(images)
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        assert images.shape[-2] % (2 * self.patch) == 0
        unread = None if self.sparse else torch.zeros(1, VIEWS, 1, 1)
        states = [unread] * 24
        for block in (4, 11, 17, 23):
            states[block] = tokens(block, VIEWS, grid, self.special, 2048)[None]
        return states, self.special

    def pose(self) -> Tensor:
        return encode_pose(self.world_to_cam, self.now.intrinsics, self.now.size)[None]

    def camera_head(self, tokens: list[Tensor]) -> list[Tensor]:
        return [torch.zeros(1, VIEWS, 9), self.pose()]

    def depth_head(self, tokens: list[Tensor], images: Tensor, patch_start_idx: int) -> tuple[Tensor, Tensor]:
        assert patch_start_idx == self.special
        return self.now.depth[None, ..., None], 1 + self.now.depth[None]


class FakeOmega(FakeVGGT):
    patch, special, sparse = 16, 17, True

    def camera_head(self, tokens: list[Tensor], patch_token_start: int) -> Tensor:
        return self.pose()

    def dense_head(self, tokens: list[Tensor], images: Tensor, patch_token_start: int) -> tuple[Tensor, Tensor]:
        return self.depth_head(tokens, images, patch_token_start)


class FakePi3(_Fake):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleList(_Block(number) for number in range(36))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        now = self.seen(images)
        for block in self.decoder:
            block(images)
        local = unproject(now.depth, now.intrinsics)
        return {
            "points": apply_rigid(now.cam_to_world, local)[None],
            "local_points": local[None],
            "conf": torch.logit(torch.full((1, *now.depth.shape, 1), 0.7)),
            "camera_poses": now.cam_to_world[None],
        }


class _Block(nn.Module):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[-2] // 14, images.shape[-1] // 14)
        states = tokens(self.number, VIEWS, grid, 5, 1024)
        return states.flatten(0, 1)[None] if self.number % 2 else states  # odd blocks see all frames at once


class FakeCUT3R(_Fake):
    def forward(self, views: list[dict[str, Any]]) -> SimpleNamespace:
        images = torch.cat([view["img"] for view in views])[None]
        assert images.min() < 0
        now = self.seen((images + 1) / 2)
        quaternion = roma.rotmat_to_unitquat(now.cam_to_world[:, :3, :3])
        pose = torch.cat([now.cam_to_world[:, :3, 3], 2 * quaternion.roll(1, -1)], dim=-1)
        local = unproject(now.depth, now.intrinsics)
        return SimpleNamespace(
            ress=[
                {
                    "pts3d_in_self_view": local[i : i + 1],
                    "conf_self": 1 + now.depth[i : i + 1],
                    "camera_pose": pose[i : i + 1],
                }
                for i in range(len(views))
            ]
        )


class _Head(nn.Module):
    def forward(self, now: AnalyticScene, poses: Tensor) -> dict[str, Tensor]:
        height, width = (side // 2 for side in now.size)
        rays = make_ray_map(poses, _halved(now.intrinsics), height, width)
        return {
            "depth": now.depth[None],
            "depth_conf": 1 + now.depth[None],
            "ray": ray_map_to_direction_first(rays)[None],
            "ray_conf": torch.ones(1, VIEWS, height, width),
        }


def _halved(K: Tensor) -> Tensor:
    """Intrinsics of the same view at half the size, pixel (0, 0) centred at the coordinate (0, 0)."""
    K = K.clone()
    K[:, :2, 2] += 0.5
    K[:, :2] /= 2
    K[:, :2, 2] -= 0.5
    return K


class FakeDA3(_Fake):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Net(self)

    def normalised(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        return (images * std + mean).clamp(0, 1)


class _Net(nn.Module):
    def __init__(self, owner: FakeDA3):
        super().__init__()
        self.owner = (owner,)
        self.head = _Head()
        self.cam_dec = nn.Identity()

    def forward(self, images: Tensor, export_feat_layers: list[int] | None = None) -> dict[str, Any]:
        (owner,) = self.owner
        assert not self.training
        owner.training = False
        if images.shape[1] == 1:  # the metric model's frames
            return self.metric(images)
        assert images.min() < 0
        now = owner.seen(owner.normalised(images))
        output = self.head(now, owner.scene.cam_to_world)
        self.cam_dec(encode_pose(owner.scene.cam_to_world, now.intrinsics, now.size)[None])
        del output["ray"], output["ray_conf"]
        grid = (now.size[0] // 14, now.size[1] // 14)
        features = {
            f"feat_layer_{block}": tokens(block, VIEWS, grid, 0, 1536).unflatten(1, grid)[None]
            for block in export_feat_layers or []
        }
        return {**output, "aux": features}

    def metric(self, images: Tensor) -> dict[str, Tensor]:
        """Metres at a focal length of 300 pixels."""
        (owner,) = self.owner
        now = replace(owner.scene, size=(images.shape[-2], images.shape[-1]), unit=1.0)
        focal = (now.intrinsics[:, 0, 0] + now.intrinsics[:, 1, 1]) / 2
        return {"depth": (now.depth * 300 / focal[:, None, None])[:, None], "sky": torch.zeros(VIEWS, 1, *now.size)}


PACKAGES = {
    "vggt": ("vggt.models.vggt", "VGGT", FakeVGGT),
    "vggt_omega": ("vggt_omega.models.vggt_omega", "VGGTOmega", FakeOmega),
    "pi3": ("pi3.models.pi3", "Pi3", FakePi3),
    "cut3r": ("dust3r.model", "ARCroco3DStereo", FakeCUT3R),
    "depth_anything3": ("depth_anything_3.api", "DepthAnything3", FakeDA3),
    "depth_anything3_metric": ("depth_anything_3.api", "DepthAnything3", FakeDA3),
}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, scene: AnalyticScene) -> str:
    """Make a teacher's package importable, for the length of a test; returns the folder of its weights."""
    module, attribute, fake = PACKAGES[name]
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], attribute, type(attribute, (fake,), {"scene": scene}))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({}))
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    return str(folder)
