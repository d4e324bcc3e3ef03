"""Samples, predictions and sources with exact ground truth for the evaluation's tests."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import roma
import torch

from eval.sources import Item
from g2vlm.data.frames import Frame, FrameSource, SceneFacts
from g2vlm.data.types import SceneSample
from geometry import GeometryPrediction
from tests.g2vlm.rooms import box_room

SIZE = (42, 56)


def room_sample(num_views: int = 3, size: tuple[int, int] = SIZE, scene: str = "room", **changes) -> SceneSample:
    """The test room, exact: points, normals and poses of every view; a few pixels are marked invalid."""
    room = box_room(num_views, size)
    valid = torch.ones(num_views, *size, dtype=torch.bool)
    valid[0, :5, :5] = False
    depth = torch.from_numpy(room.depth.copy())
    depth[~valid] = torch.nan
    sample = SceneSample(
        images=torch.from_numpy(room.images.copy()).permute(0, 3, 1, 2).contiguous(),
        depth=depth,
        valid=valid,
        intrinsics=torch.from_numpy(room.intrinsics_at(size)),
        cam_to_world=torch.from_numpy(room.cam_to_world),
        normals=torch.from_numpy(room.normals),
        is_metric=True,
        dataset="test",
        scene=scene,
        view_ids=tuple(f"view-{i}" for i in range(num_views)),
    )
    return replace(sample, **changes)


def perfect(sample: SceneSample, scale: float = 1.0, rotation: torch.Tensor | None = None) -> GeometryPrediction:
    """The truth as a prediction, in a world moved, turned and scaled; NaN where the truth is invalid."""
    assert sample.cam_to_world is not None
    turn = torch.eye(3) if rotation is None else rotation
    poses = sample.cam_to_world.clone()
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = scale * poses[:, :3, 3] @ turn.mT + (0 if rotation is None else torch.tensor([3.0, -1.0, 2.0]))
    assert sample.normals is not None
    return GeometryPrediction(scale * sample.local_points, poses, sample.normals)


def random_rotation(seed: int) -> torch.Tensor:
    vector = np.random.default_rng(seed).normal(size=3)
    return roma.rotvec_to_rotmat(torch.tensor(vector, dtype=torch.float32))


def room_items(count: int = 3, num_views: int = 3) -> list[Item]:
    return [Item(f"room-{i}", lambda i=i: room_sample(num_views, scene=f"room-{i}")) for i in range(count)]


class RoomFrames(FrameSource):
    """Stored frames of the test room, numbered 0, 10, 20, ..., one scene per entry of `counts`."""

    name = "test"

    def __init__(self, *counts: int):
        super().__init__()
        self.scenes = [room_sample(count) for count in counts]

    def __len__(self) -> int:
        return len(self.scenes)

    def facts(self, scene: int) -> SceneFacts:
        return SceneFacts(f"room-{scene}", "test", is_metric=True)

    def frame_names(self, scene: int) -> Sequence[str]:
        return [f"seq-07/frame-{10 * i:06d}" for i in range(self.scenes[scene].num_views)]

    def read_frame(self, scene: int, index: int) -> Frame:
        sample = self.scenes[scene]
        assert sample.depth is not None
        assert sample.intrinsics is not None
        assert sample.cam_to_world is not None
        return Frame(
            self.frame_names(scene)[index],
            sample.images[index].permute(1, 2, 0).numpy(),
            sample.depth[index].nan_to_num().numpy(),
            sample.intrinsics[index].double().numpy(),
            sample.cam_to_world[index].double().numpy(),
        )
