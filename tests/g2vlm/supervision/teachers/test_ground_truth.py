"""The data as a teacher, and how two teachers join."""

from dataclasses import replace

import pytest
import torch

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.teachers.base import targets_of
from g2vlm.supervision.teachers.ground_truth import GroundTruth
from g2vlm.supervision.teachers.joining import joined
from g2vlm.supervision.teachers.registry import build_teacher
from geometry import apply_rigid, invert_rigid
from tests.g2vlm.supervision.teachers.fakes import AnalyticScene, SyntheticTeacher


@pytest.fixture(scope="module")
def room() -> SceneSample:
    return RoomsSource().load(5, ViewRequest(3, (28, 42), seed=1))


def taught(scene: SceneSample):
    teacher = build_teacher("ground_truth")
    assert not teacher.online
    assert teacher.features is None
    return teacher.complete(Clip.of(scene), None)


def test_the_truth_is_the_scene_seen_from_its_first_camera(room: SceneSample) -> None:
    found = taught(room)
    assert torch.equal(found.cam_to_world[0], torch.eye(4))
    moved = apply_rigid(invert_rigid(room.cam_to_world[0]), room.world_points)
    torch.testing.assert_close(found.world_points[found.valid], moved[found.valid], rtol=1e-4, atol=1e-4)
    assert torch.equal(found.valid, room.valid)
    assert torch.equal(found.intrinsics, room.intrinsics)
    assert float(found.metric_scale) == 1.0
    assert found.info.view_ids == room.view_ids
    assert found.confidence is None
    assert found.features is None


def test_depth_that_cannot_be_one_is_not_valid(room: SceneSample) -> None:
    depth = room.depth.clone()
    depth[0, 0, :3] = torch.tensor([torch.nan, torch.inf, 0])
    for valid in (torch.ones_like(room.valid), None):
        found = taught(replace(room, depth=depth, valid=valid))
        assert found.valid.logical_not().nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
        assert (found.depth[0, 0, :3] == 0).all()


def test_absent_stays_absent(room: SceneSample) -> None:
    cameras = taught(replace(room, depth=None, valid=None))
    assert (cameras.depth, cameras.valid) == (None, None)
    assert cameras.cam_to_world is not None
    depth = taught(replace(room, cam_to_world=None, is_metric=False))
    assert depth.cam_to_world is None
    assert depth.metric_scale.isnan()
    assert taught(replace(room, depth=None, valid=None, intrinsics=None, cam_to_world=None)) is None
    assert GroundTruth().complete(Clip(torch.zeros(2, 3, 14, 14)), None) is None


def test_a_scene_of_other_views_is_refused(room: SceneSample) -> None:
    with pytest.raises(InputError, match="3 views, the clip has 2 frames"):
        GroundTruth().complete(replace(Clip.of(room), images=torch.zeros(2, 3, 28, 42)), None)


def test_geometry_is_the_first_teacher_s_and_never_mixed() -> None:
    clip = AnalyticScene((28, 42), corner=False).clip()
    truth, all_said = taught(clip.scene), SyntheticTeacher().complete(clip, None)
    assert targets_of([SyntheticTeacher(), GroundTruth()], clip).depth is not truth.depth
    bare = replace(truth, depth=None, valid=None)
    both = joined(bare, all_said)
    assert both.depth is None
    assert both.points is None
    assert both.confidence is None
    assert set(both.features) == {1, 3}
    featured = replace(all_said, depth=None, valid=None, cam_to_world=None, intrinsics=None, points=None)
    later = joined(featured, truth)
    assert later.depth is truth.depth
    assert set(later.features) == {1, 3}
    assert later.info.cell_size == 14
    assert joined(None, truth) is truth
    assert joined(truth, None) is truth
