import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import (
    crop_intrinsics,
    half_pixel_to_integer_grid,
    integer_grid_to_half_pixel,
    intrinsics_from_points,
    pixel_grid,
    project,
    ray_directions,
    resize_intrinsics,
    unproject,
)
from tests.geometry.scenes import BATCHES, intrinsics


def random_K(*batch: int) -> Tensor:
    """Intrinsics with skew and an off-centre principal point."""
    K = torch.eye(3, dtype=torch.float64).repeat(*batch, 1, 1)
    K[..., 0, 0] = 5 + torch.rand(batch)
    K[..., 1, 1] = 5 + torch.rand(batch)
    K[..., 0, 1] = 0.1 * torch.rand(batch)
    K[..., :2, 2] = 3 * torch.rand(*batch, 2, dtype=torch.float64)
    return K


def random_depth(*shape: int) -> Tensor:
    return 1 + torch.rand(*shape, dtype=torch.float64)


def test_pixel_centres_are_integers() -> None:
    grid = pixel_grid(2, 3)
    assert grid.tolist() == [[[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]]]
    assert pixel_grid(2, 3, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("batch", BATCHES)
def test_project_undoes_unproject(batch: tuple[int, ...]) -> None:
    K, depth = random_K(*batch), random_depth(*batch, 4, 5)
    points = unproject(depth, K)
    assert points.shape == (*batch, 4, 5, 3)
    uv, z = project(points, K)
    torch.testing.assert_close(z, depth)
    torch.testing.assert_close(uv, pixel_grid(4, 5, dtype=torch.float64).expand_as(uv))


@pytest.mark.parametrize("batch", BATCHES)
def test_rays_are_the_inverse_of_K(batch: tuple[int, ...]) -> None:
    K = random_K(*batch)
    rays = ray_directions(K, 3, 4)
    pixel = torch.tensor([3, 1, 1], dtype=torch.float64)  # u = 3, v = 1
    torch.testing.assert_close(rays[..., 1, 3, :], torch.linalg.inv(K) @ pixel)


@pytest.mark.parametrize("batch", BATCHES)
def test_project_equals_the_matrix_product(batch: tuple[int, ...]) -> None:
    K, points = random_K(*batch), torch.randn(*batch, 6, 3, dtype=torch.float64)
    uv, z = project(points, K)
    homogeneous = points @ K.mT
    torch.testing.assert_close(z, points[..., 2])
    torch.testing.assert_close(uv, homogeneous[..., :2] / homogeneous[..., 2:])


def test_a_point_in_the_camera_plane_stays_finite() -> None:
    points = torch.tensor([[1.0, 1, 0], [0, 0, 0]], requires_grad=True)
    uv, _ = project(points, intrinsics(4, 4, dtype=torch.float32))
    uv.sum().backward()
    assert uv.isfinite().all()
    assert points.grad is not None
    assert points.grad.isfinite().all()


@pytest.mark.parametrize("batch", BATCHES)
def test_intrinsics_are_recovered(batch: tuple[int, ...]) -> None:
    K = intrinsics(9, 12).repeat(*batch, 1, 1)
    K[..., 0, 0] *= 1 + torch.rand(batch)
    K[..., 1, 1] *= 1 + torch.rand(batch)
    points = unproject(random_depth(*batch, 9, 12), K)
    torch.testing.assert_close(intrinsics_from_points(points), K)


def test_intrinsics_resist_outliers_and_ignore_masked_pixels() -> None:
    K = intrinsics(24, 32)
    points = unproject(random_depth(24, 32), K)
    outlier = torch.rand(24, 32) < 0.1
    wrong = torch.where(outlier[..., None], points + torch.randn_like(points).abs(), points)
    torch.testing.assert_close(intrinsics_from_points(wrong), K, rtol=0.05, atol=0)
    junk = torch.where(outlier[..., None], torch.nan, points)
    torch.testing.assert_close(intrinsics_from_points(junk, ~outlier), K)
    behind = torch.where(outlier[..., None], -5 * points, points)
    behind[0, 0] = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(intrinsics_from_points(behind), K)


def test_intrinsics_without_valid_pixels_are_nan() -> None:
    K = intrinsics_from_points(torch.ones(4, 5, 3), torch.zeros(4, 5, dtype=torch.bool))
    assert K[0, 0].isnan()
    assert K[:, 2].tolist() == [2, 1.5, 1]


def test_half_pixel_conversion() -> None:
    K = random_K(2)
    integer = half_pixel_to_integer_grid(K)
    torch.testing.assert_close(K[..., :2, 2] - integer[..., :2, 2], torch.full((2, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(integer[..., :2, :2], K[..., :2, :2])
    torch.testing.assert_close(integer_grid_to_half_pixel(integer), K)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("new_size", [(8, 12), (16, 6), (4, 6)])
def test_resized_intrinsics_see_the_resized_image(batch: tuple[int, ...], new_size: tuple[int, int]) -> None:
    """Resampling an image of pixel coordinates says where each new pixel looked in the old image."""
    old_size = (8, 12)
    K = random_K(*batch)
    coordinates = pixel_grid(*old_size, dtype=torch.float64).permute(2, 0, 1)[None]
    resampled = F.interpolate(coordinates, new_size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    inside = (slice(4, -4), slice(2, -2)) if new_size == (16, 6) else (slice(1, -1), slice(1, -1))
    new_rays = ray_directions(resize_intrinsics(K, old_size, new_size), *new_size)
    uv, _ = project(new_rays, K)
    expected = resampled.expand_as(uv)
    torch.testing.assert_close(uv[..., *inside, :], expected[..., *inside, :])


def test_resizing_keeps_the_image_centre_and_goes_back() -> None:
    K = intrinsics(8, 12)
    half = resize_intrinsics(K, (8, 12), (4, 6))
    assert half[:2, 2].tolist() == [2.5, 1.5]
    torch.testing.assert_close(resize_intrinsics(half, (4, 6), (8, 12)), K)


@pytest.mark.parametrize("batch", BATCHES)
def test_cropped_intrinsics_see_the_same_rays(batch: tuple[int, ...]) -> None:
    K = random_K(*batch)
    rays = ray_directions(K, 8, 9)
    torch.testing.assert_close(ray_directions(crop_intrinsics(K, top=2, left=3), 6, 6), rays[..., 2:, 3:, :])
