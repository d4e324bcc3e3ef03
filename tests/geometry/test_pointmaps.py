import numpy as np
import pytest
import torch
from torch import Tensor

from geometry import (
    apply_rigid,
    depth_edges,
    neighbour_normals,
    normals_from_points,
    ray_directions,
    world_points_from_local,
)
from tests.geometry.scenes import BATCHES, intrinsics, random_poses


def plane(normal: Tensor, *batch: int, size: tuple[int, int] = (6, 7)) -> Tensor:
    """Local points (*batch, H, W, 3) of the plane with this normal (3,), at distance 3."""
    rays = ray_directions(intrinsics(*size), *size)
    return (-3 / (rays @ normal))[..., None].mul(rays).repeat(*batch, 1, 1, 1)


NORMAL = torch.nn.functional.normalize(torch.tensor([0.3, -0.4, -1.0], dtype=torch.float64), dim=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_plane_normals_face_the_camera(batch: tuple[int, ...]) -> None:
    points = plane(NORMAL, *batch)
    normals, valid = normals_from_points(points, torch.ones_like(points[..., 0], dtype=torch.bool))
    assert valid.all()
    assert (points[..., 2] > 0).all()
    torch.testing.assert_close(normals, NORMAL.expand_as(normals))


def test_sphere_normals() -> None:
    rays = torch.nn.functional.normalize(ray_directions(intrinsics(40, 40), 40, 40), dim=-1)
    centre = torch.tensor([0, 0, 5.0], dtype=torch.float64)
    along = rays @ centre
    root = along**2 - centre @ centre + 4
    points = (along - root.clamp_min(0).sqrt())[..., None] * rays
    normals, valid = normals_from_points(points, root > 0.2)
    expected = (points - centre) / 2
    cosine = (normals * expected).sum(-1)[valid]
    assert valid.sum() > 200
    assert cosine.min() > 0.99


@pytest.mark.parametrize("junk", [0.0, 1e30, torch.nan, torch.inf])
def test_invalid_pixels_leave_no_trace(junk: float) -> None:
    points = plane(NORMAL)
    valid = torch.ones(6, 7, dtype=torch.bool)
    valid[2, 3] = valid[0, 1] = valid[1, 0] = False
    dirty = torch.where(valid[..., None], points, junk).requires_grad_()
    normals, defined = normals_from_points(dirty, valid)
    expected = valid.clone()
    expected[0, 0] = False  # both of its neighbours are gone
    assert torch.equal(defined, expected)
    torch.testing.assert_close(normals[defined], NORMAL.expand(int(defined.sum()), 3))
    assert (normals[~defined] == 0).all()
    normals.square().sum().backward()
    assert dirty.grad is not None
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~valid] == 0).all()


def test_collinear_points_have_no_normal() -> None:
    points = torch.arange(4.0)[None, :, None] * torch.tensor([1.0, 2, 3])
    points = points.repeat(3, 1, 1).requires_grad_()
    normals, defined = normals_from_points(points, torch.ones(3, 4, dtype=torch.bool))
    assert not defined.any()
    normals.sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()


def test_normals_gradient() -> None:
    points = (plane(NORMAL, size=(3, 4)) + 0.05 * torch.randn(3, 4, 3, dtype=torch.float64)).requires_grad_()
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 1] = False
    assert torch.autograd.gradcheck(lambda p: normals_from_points(p, valid)[0], points)


@pytest.mark.parametrize("batch", BATCHES)
def test_corner_normals_of_a_plane_face_the_camera(batch: tuple[int, ...]) -> None:
    points = plane(NORMAL, *batch)
    normals, valid = neighbour_normals(points, torch.ones_like(points[..., 0], dtype=torch.bool))
    assert normals.shape == (4, *points.shape)
    rows, columns = torch.arange(6)[:, None], torch.arange(7)
    up, left, down, right = rows > 0, columns > 0, rows < 5, columns < 6
    expected = torch.stack([up & left, left & down, down & right, right & up])
    assert torch.equal(valid, expected.view(4, *(1,) * len(batch), 6, 7).expand_as(valid))
    torch.testing.assert_close(normals[valid], NORMAL.expand(int(valid.sum()), 3))
    assert (normals[~valid] == 0).all()


def test_corner_normals_match_the_definition() -> None:
    points = torch.randn(4, 5, 3, dtype=torch.float64)
    valid = torch.rand(4, 5) > 0.2
    normals, usable = neighbour_normals(torch.where(valid[..., None], points, torch.nan), valid)
    steps = [(-1, 0), (0, -1), (1, 0), (0, 1)]  # up, left, down, right
    for corner, y, x in np.ndindex(4, 4, 5):
        there = [(y + dy, x + dx) for dy, dx in (steps[corner], steps[(corner + 1) % 4])]
        known = all(0 <= v < 4 and 0 <= u < 5 and valid[v, u] for v, u in [(y, x), *there])
        assert usable[corner, y, x] == known
        if known:
            first, second = (points[v, u] - points[y, x] for v, u in there)
            across = torch.linalg.cross(first, second)
            torch.testing.assert_close(normals[corner, y, x], across / across.norm())


def test_corner_normals_gradient() -> None:
    points = (plane(NORMAL, size=(3, 4)) + 0.05 * torch.randn(3, 4, 3, dtype=torch.float64)).requires_grad_()
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 1] = False
    assert torch.autograd.gradcheck(lambda p: neighbour_normals(p, valid)[0], points)


@pytest.mark.parametrize("batch", BATCHES)
def test_depth_edges_match_the_definition(batch: tuple[int, ...]) -> None:
    depth = 1 + 0.06 * torch.rand(*batch, 5, 6, dtype=torch.float64)
    edges = depth_edges(depth, 0.04)
    assert edges.shape == depth.shape
    assert 0 < edges.sum() < edges.numel()
    for given, got in zip(depth.reshape(-1, 5, 6).numpy(), edges.reshape(-1, 5, 6).numpy(), strict=True):
        for y, x in np.ndindex(5, 6):
            window = given[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert got[y, x] == ((window.max() - window.min()) / given[y, x] > 0.04)


def test_depth_step_marks_both_sides() -> None:
    depth = torch.ones(4, 6)
    depth[:, 3:] = 2
    assert depth_edges(depth, 0.03)[1].tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("batch", BATCHES)
def test_world_points(batch: tuple[int, ...]) -> None:
    local, pose = torch.randn(*batch, 2, 3, 3, dtype=torch.float64), random_poses(*batch)
    world = world_points_from_local(local, pose)
    torch.testing.assert_close(apply_rigid(torch.linalg.inv(pose), world), local)
