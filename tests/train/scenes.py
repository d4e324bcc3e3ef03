"""A small source for tests: the furnished box room, its views numbered along the arc."""

from dataclasses import dataclass, field

import numpy as np
import torch

from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from tests.g2vlm.rooms import camera, look

VIEWS = 12


@dataclass(frozen=True)
class BoxRooms:
    """The same room in several sizes (scene i is scaled by 1 + i / 10); `broken` scenes cannot be read."""

    num_scenes: int = 8
    views: int = VIEWS
    broken: frozenset[int] = frozenset()
    name: str = field(default="box_rooms")

    def __len__(self) -> int:
        return self.num_scenes

    def num_views(self, scene: int) -> int:
        return self.views

    def load(self, scene: int, request: ViewRequest) -> SceneSample:
        if scene in self.broken:
            raise InputError(f"cannot read scene {scene}", "it is broken")
        random = np.random.default_rng(request.seed)
        chosen = np.sort(random.choice(self.views, request.num_views, replace=False))
        height, width = request.size
        K = np.array([[0.8 * width, 0, (width - 1) / 2], [0, 0.8 * width, (height - 1) / 2], [0, 0, 1]])
        poses = np.stack([camera(int(view), self.views) for view in chosen])
        parts = [look(pose, K, request.size) for pose in poses]
        points, normals, colours = (np.stack(part) for part in zip(*parts, strict=True))
        scale = 1 + scene / 10
        poses[:, :3, 3] *= scale
        return SceneSample(
            images=torch.from_numpy(colours.transpose(0, 3, 1, 2).copy()),
            depth=torch.from_numpy(points[..., 2] * scale).float(),
            valid=torch.ones(request.num_views, height, width, dtype=torch.bool),
            intrinsics=torch.from_numpy(K).float().repeat(request.num_views, 1, 1),
            cam_to_world=torch.from_numpy(poses).float(),
            normals=torch.from_numpy(normals).float(),
            dataset=self.name,
            scene=str(scene),
            view_ids=tuple(str(view) for view in chosen),
        )
