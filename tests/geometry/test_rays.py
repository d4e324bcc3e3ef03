import math

import pytest
import torch
from torch import Tensor

from geometry import apply_rigid, geodesic_angle, invert_rigid, pixel_grid, project, unproject
from geometry.cameras import pinhole
from geometry.pose_encoding import decode_pose, encode_pose
from geometry.rays import (
    RayFit,
    camera_from_rays,
    intrinsics_from_plane,
    intrinsics_to_plane,
    make_ray_map,
    points_from_rays,
    ray_map_from_direction_first,
    ray_map_to_direction_first,
)
from tests.geometry.scenes import BATCHES, random_poses

H, W = 12, 16


def random_cameras(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Poses (*batch, 4, 4), and K (*batch, 3, 3) with the principal point anywhere in the middle half of the image."""
    size = torch.tensor([W, H], dtype=dtype)
    focal = size * (0.4 + torch.rand(*batch, 2, dtype=dtype))
    return random_poses(*batch, dtype=dtype), pinhole(focal, size * (0.25 + 0.5 * torch.rand(*batch, 2, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", BATCHES)
def test_rays_and_points_agree_with_the_cameras(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    pose, K = random_cameras(*batch, dtype=dtype)
    depth = 0.5 + 4 * torch.rand(*batch, H, W, dtype=dtype)
    rays = make_ray_map(pose, K, H, W)
    assert rays.shape == (*batch, H, W, 6)
    points = points_from_rays(rays, depth)
    torch.testing.assert_close(points, apply_rigid(pose, unproject(depth, K)), rtol=1e-5, atol=1e-5)
    pixel, z = project(apply_rigid(invert_rigid(pose), points), K)
    torch.testing.assert_close(z, depth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pixel / W, pixel_grid(H, W, dtype=dtype).expand_as(pixel) / W, rtol=0, atol=1e-5)
    origin = pose[..., None, None, :3, 3].expand_as(points)
    torch.testing.assert_close(rays[..., :3], origin, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_ray_map_gives_its_camera_back(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    pose, K = random_cameras(*batch, dtype=dtype)
    rays = make_ray_map(pose, K, H, W)
    rays[..., 3:] *= 0.3 + torch.rand(*batch, H, W, 1, dtype=dtype)  # only the direction says something
    got, got_K = camera_from_rays(rays, torch.rand(*batch, H, W))
    assert got.dtype == dtype
    torch.testing.assert_close(got, pose, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_K / W, K / W, rtol=1e-5, atol=1e-5)


def test_confidence_decides_between_two_cameras() -> None:
    (first, K_first), (second, K_second) = random_cameras(), random_cameras()
    upper = (torch.arange(H) < H // 2)[:, None].expand(H, W)
    rays = torch.where(upper[..., None], make_ray_map(first, K_first, H, W), make_ray_map(second, K_second, H, W))
    for chosen, pose, K in [(upper, first, K_first), (~upper, second, K_second)]:
        got, got_K = camera_from_rays(rays, chosen.double())
        torch.testing.assert_close(got, pose)
        torch.testing.assert_close(got_K, K)


def test_centre_is_the_weighted_mean() -> None:
    rays = make_ray_map(*random_cameras(), H, W)
    rays[..., :3] += torch.randn(H, W, 3)
    confidence = torch.rand(H, W, dtype=torch.float64)
    got, _ = camera_from_rays(rays, confidence)
    expected = (confidence[..., None] * rays[..., :3]).sum((0, 1)) / confidence.sum()
    torch.testing.assert_close(got[:3, 3], expected)


def test_wrong_rays_do_not_turn_the_camera() -> None:
    pose, K = random_cameras(5)
    rays = make_ray_map(pose, K, H, W)
    wrong = torch.rand(5, H, W) < 0.3
    rays[..., 3:] = torch.where(wrong[..., None], torch.randn_like(rays[..., 3:]), rays[..., 3:])
    got, _ = camera_from_rays(rays, fit=RayFit(max_angle=0.02))
    plain, _ = camera_from_rays(rays, fit=RayFit(hypotheses=0, max_angle=math.pi))
    error, plain_error = (geodesic_angle(camera[:, :3, :3], pose[:, :3, :3]) for camera in (got, plain))
    assert error.max() < 0.01
    assert plain_error.min() > 0.05


def test_the_seed_decides_and_views_do_not_meddle() -> None:
    rays = make_ray_map(*random_cameras(3), H, W)
    rays += 0.3 * torch.randn_like(rays)
    confidence = torch.rand(3, H, W)
    fit = RayFit(max_angle=0.05)
    state = torch.random.get_rng_state()
    pose, K = camera_from_rays(rays, confidence, fit)
    assert torch.equal(torch.random.get_rng_state(), state)
    alone, alone_K = camera_from_rays(rays[2], confidence[2], fit)
    torch.testing.assert_close(alone, pose[2])
    torch.testing.assert_close(alone_K, K[2])
    other, _ = camera_from_rays(rays, confidence, RayFit(max_angle=0.05, seed=1))
    assert not torch.allclose(pose, other)


def test_rays_that_are_not_finite_count_nothing() -> None:
    pose, K = random_cameras()
    rays = make_ray_map(pose, K, H, W)
    rays[2, 3, 0], rays[5, 5, 4] = torch.nan, torch.inf
    got, got_K = camera_from_rays(rays)
    torch.testing.assert_close(got, pose)
    torch.testing.assert_close(got_K, K)


def test_a_view_without_rays_is_nan_and_alone() -> None:
    pose, K = random_cameras(2)
    confidence = torch.ones(2, H, W)
    confidence[0] = 0
    got, got_K = camera_from_rays(make_ray_map(pose, K, H, W), confidence)
    assert got[0].isnan().all()
    assert got_K[0].isnan().all()
    torch.testing.assert_close(got[1], pose[1])
    torch.testing.assert_close(got_K[1], K[1])


def test_channel_orders() -> None:
    rays = make_ray_map(*random_cameras(2), H, W)
    other = ray_map_to_direction_first(rays)
    assert torch.equal(other[..., :3], rays[..., 3:])
    assert torch.equal(other[..., 3:], rays[..., :3])
    assert torch.equal(ray_map_from_direction_first(other), rays)


def test_the_plane_is_sampled_at_cell_centres() -> None:
    _, K = random_cameras(3)
    plane = intrinsics_to_plane(K, H, W)
    torch.testing.assert_close(intrinsics_from_plane(plane, H, W), K)
    x = (torch.arange(W, dtype=torch.float64) * 2 + 1) / W  # 1/w, 3/w, ..., 2 - 1/w
    y = (torch.arange(H, dtype=torch.float64) * 2 + 1) / H
    direction = make_ray_map(torch.eye(4, dtype=torch.float64).expand(3, 4, 4), K, H, W)[..., 3:]
    slope_x = (x - plane[:, :1, 2]) / plane[:, :1, 0]
    slope_y = (y - plane[:, 1:2, 2]) / plane[:, 1:2, 1]
    torch.testing.assert_close(direction[..., 0], slope_x[:, None, :].expand(3, H, W))
    torch.testing.assert_close(direction[..., 1], slope_y[:, :, None].expand(3, H, W))


def test_nine_numbers_give_the_same_rays_on_the_plane_as_in_pixels_between_centres() -> None:
    pose, K = random_cameras(3)
    _, plane = decode_pose(encode_pose(invert_rigid(pose), K, (H, W)), (2, 2))
    torch.testing.assert_close(plane[:, :2, 2], torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(plane[:, 0, 0], K[:, 0, 0] * 2 / W)
    torch.testing.assert_close(plane[:, 1, 1], K[:, 1, 1] * 2 / H)


def test_gradients() -> None:
    pose, K = random_cameras()
    depth = (1 + torch.rand(H, W, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: points_from_rays(make_ray_map(pose, K, H, W), d), depth)
