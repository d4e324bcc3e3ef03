"""The contract of teacher targets, on exact rooms whose world is not the first camera's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from geometry import project
from geometry.pose_encoding import decode_pose

VIEWS, SIZE, PATCH = 3, (28, 42), 14
GEOMETRY = ("depth", "confidence", "valid", "cam_to_world", "intrinsics", "points", "metric_scale")
LENGTHS = ("depth", "points")


@pytest.fixture(scope="module")
def room() -> TeacherTargets:
    """Everything that a teacher can say about a room, with points from an independent computation."""
    sample = RoomsSource().load(3, ViewRequest(VIEWS, SIZE, seed=0))
    generator = torch.Generator().manual_seed(0)
    confidence = 1 + torch.rand(VIEWS, *SIZE, generator=generator)
    return TeacherTargets(
        num_views=VIEWS,
        size=SIZE,
        info=TeacherInfo("exact", "1", SIZE, PATCH),
        depth=sample.depth,
        confidence=confidence,
        valid=sample.valid & (confidence > 1.1),
        cam_to_world=sample.cam_to_world,
        intrinsics=sample.intrinsics,
        points=points_one_by_one(sample.depth, sample.intrinsics, sample.cam_to_world),
        features={
            block: torch.randn(VIEWS, SIZE[0] // PATCH, SIZE[1] // PATCH, 8, generator=generator).bfloat16()
            for block in (4, 11)
        },
        metric_scale=torch.tensor(1.0),
    )


def points_one_by_one(depth: Tensor, intrinsics: Tensor, cam_to_world: Tensor) -> Tensor:
    """World points (S, H, W, 3) in float64, by solving K x = z (u, v, 1) for one pixel at a time."""
    z, K, poses = (tensor.double().numpy() for tensor in (depth, intrinsics, cam_to_world))
    points = np.empty((*z.shape, 3))
    for view, v, u in np.ndindex(z.shape):
        local = np.linalg.solve(K[view], z[view, v, u] * np.array([u, v, 1.0]))
        points[view, v, u] = (poses[view] @ [*local, 1.0])[:3]
    return torch.from_numpy(points).float()


def same(ours: TeacherTargets, other: TeacherTargets, names: tuple[str, ...] = GEOMETRY) -> None:
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(other, name), rtol=1e-5, atol=1e-5, msg=name)


def test_depth_intrinsics_and_poses_give_the_points(room: TeacherTargets) -> None:
    torch.testing.assert_close(room.world_points, room.points, rtol=1e-5, atol=1e-5)
    moved = room.in_first_camera()
    torch.testing.assert_close(moved.world_points, moved.points, rtol=1e-5, atol=1e-5)


def test_points_fall_back_on_their_pixels(room: TeacherTargets) -> None:
    moved = room.in_first_camera().normalised()
    local = torch.einsum("sij,shwj->shwi", moved.world_to_cam[:, :3, :3], moved.points)
    uv, z = project(local + moved.world_to_cam[:, None, None, :3, 3], moved.intrinsics)
    v, u = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    torch.testing.assert_close(z, moved.depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(uv, torch.stack([u, v], -1).float().expand_as(uv), rtol=0, atol=1e-2)


def test_first_camera_becomes_exactly_the_identity(room: TeacherTargets) -> None:
    moved = room.in_first_camera()
    assert moved.cam_to_world[0].equal(torch.eye(4))
    for view in range(VIEWS):
        expected = torch.linalg.inv(room.cam_to_world[0].double()) @ room.cam_to_world[view].double()
        torch.testing.assert_close(moved.cam_to_world[view].double(), expected, rtol=1e-5, atol=1e-5)
    same(moved, room, ("depth", "confidence", "valid", "intrinsics", "metric_scale"))
    same(moved.in_first_camera(), moved)


def test_moving_the_world_changes_nothing_seen_from_the_first_camera(room: TeacherTargets) -> None:
    turn = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, -3], [0, 1, 0, 5], [0, 0, 0, 1]])
    points = room.points @ turn[:3, :3].T + turn[:3, 3]
    elsewhere = replace(room, cam_to_world=turn @ room.cam_to_world, points=points)
    same(elsewhere.in_first_camera(), room.in_first_camera())
    torch.testing.assert_close(elsewhere.mean_distance, room.mean_distance)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scaling_changes_lengths_only(room: TeacherTargets, factor: float) -> None:
    scaled = room.scaled(factor)
    for name in LENGTHS:
        assert getattr(scaled, name).equal(getattr(room, name) * factor), name
    assert scaled.cam_to_world[:, :3, 3].equal(room.cam_to_world[:, :3, 3] * factor)
    assert scaled.cam_to_world[:, :3, :3].equal(room.cam_to_world[:, :3, :3])
    assert scaled.cam_to_world[:, 3].equal(room.cam_to_world[:, 3])
    for name in ("confidence", "valid", "intrinsics", "features", "info"):
        assert getattr(scaled, name) is getattr(room, name), name
    torch.testing.assert_close(scaled.depth * scaled.metric_scale, room.depth * room.metric_scale)
    torch.testing.assert_close(scaled.world_points, room.points * factor, rtol=1e-5, atol=1e-5)


def test_scaling_leaves_the_original_alone(room: TeacherTargets) -> None:
    before = room.cam_to_world.clone()
    room.scaled(2.0)
    assert room.cam_to_world.equal(before)


def test_normalised_valid_points_are_one_away_from_the_first_camera_on_average(room: TeacherTargets) -> None:
    normalised = room.in_first_camera().normalised()
    assert normalised.points[room.valid].norm(dim=-1).mean().item() == pytest.approx(1, rel=1e-5)
    assert room.in_first_camera().points[room.valid].norm(dim=-1).mean().item() != pytest.approx(1, rel=0.1)
    same(room.scaled(7.0).in_first_camera().normalised(), normalised, tuple(n for n in GEOMETRY if n != "metric_scale"))
    same(room.normalised().in_first_camera(), normalised)
    same(normalised.normalised(), normalised)


def test_metric_scale_still_gives_metres_after_normalising(room: TeacherTargets) -> None:
    normalised = room.normalised()
    torch.testing.assert_close(normalised.depth * normalised.metric_scale, room.depth)


def test_pose_encoding_is_that_of_the_poses_and_intrinsics(room: TeacherTargets) -> None:
    moved = room.in_first_camera()
    world_to_cam, K = decode_pose(moved.pose_encoding, SIZE)
    torch.testing.assert_close(world_to_cam @ moved.cam_to_world, torch.eye(4).expand(VIEWS, 4, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(K[:, [0, 1], [0, 1]], moved.intrinsics[:, [0, 1], [0, 1]], rtol=1e-5, atol=0)
    torch.testing.assert_close(moved.pose_encoding[0, :7], torch.tensor([0.0, 0, 0, 0, 0, 0, 1]))
    expected = moved.pose_encoding * torch.tensor([2.0] * 3 + [1.0] * 6)
    torch.testing.assert_close(moved.scaled(2.0).pose_encoding, expected)


def test_normalising_needs_no_points_of_the_teacher(room: TeacherTargets) -> None:
    torch.testing.assert_close(replace(room, points=None).mean_distance, room.mean_distance)


def test_values_where_nothing_is_valid_do_not_matter(room: TeacherTargets) -> None:
    broken = torch.where(room.valid, room.depth, torch.nan)
    torch.testing.assert_close(replace(room, depth=broken, points=None).mean_distance, room.mean_distance)
    empty = replace(room, valid=torch.zeros_like(room.valid))
    same(empty.normalised(), empty)


def test_to_moves_every_tensor_and_leaves_masks(room: TeacherTargets) -> None:
    doubles = room.to(torch.float64)
    for name in GEOMETRY:
        assert getattr(doubles, name).dtype == (torch.bool if name == "valid" else torch.float64), name
    assert {tensor.dtype for tensor in doubles.features.values()} == {torch.float64}
    elsewhere = room.to("meta")
    tensors = [getattr(elsewhere, name) for name in GEOMETRY] + list(elsewhere.features.values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_targets_of_a_model_become_constants(room: TeacherTargets) -> None:
    weight = torch.ones((), requires_grad=True)
    with torch.inference_mode():
        inference = room.depth * 1
    student = torch.ones(1, requires_grad=True)
    detached = replace(room, depth=inference, confidence=room.confidence * weight).detached()
    assert not detached.confidence.requires_grad
    (student * detached.depth).sum().backward()  # autograd refuses to save tensors of inference mode
    assert student.grad is not None


def test_what_is_absent_is_named_when_it_is_needed(room: TeacherTargets) -> None:
    nothing = TeacherTargets(num_views=2, size=SIZE, info=TeacherInfo("nobody", "", SIZE))
    assert nothing.scaled(2.0).to(torch.float64).detached().depth is None
    for name, properties in {
        "depth": ["world_points"],
        "intrinsics": ["world_points", "pose_encoding"],
        "cam_to_world": ["world_points", "world_to_cam", "pose_encoding", "mean_distance"],
        "valid": ["mean_distance"],
    }.items():
        for wanted in properties:
            with pytest.raises(ValueError, match=f"{name}: not among the targets of exact"):
                getattr(replace(room, **{name: None}), wanted)
    with pytest.raises(ValueError, match="cam_to_world: not among"):
        nothing.in_first_camera()


@pytest.mark.parametrize("name", [*GEOMETRY[:-1]])
def test_shapes_are_checked(room: TeacherTargets, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: given shape"):
        replace(room, **{name: getattr(room, name)[:2]})


def test_shapes_of_the_rest_are_checked(room: TeacherTargets) -> None:
    with pytest.raises(ValueError, match="valid: given dtype"):
        replace(room, valid=room.valid.float())
    with pytest.raises(ValueError, match="metric_scale: given shape"):
        replace(room, metric_scale=torch.ones(1))
    for shape in [(VIEWS, 6, 8), (VIEWS - 1, 2, 3, 8), (VIEWS, 3, 2, 8), (VIEWS, 1, 2, 8)]:
        with pytest.raises(ValueError, match=r"features\[7\]: given shape"):
            replace(room, features={7: torch.zeros(shape)})


def test_features_fill_the_teacher_input(room: TeacherTargets) -> None:
    pooled = {4: torch.zeros(VIEWS, 1, 2, 8)}
    info = TeacherInfo("exact", "1", (28, 56), 2 * PATCH)
    assert replace(room, info=info, features=pooled).features is pooled
