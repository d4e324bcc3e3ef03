import pytest
import torch

from geometry import apply_rigid, invert_rigid, relative_cam, rigid
from geometry.transforms import length, rotate, small_matmul
from tests.geometry.scenes import BATCHES, random_poses


@pytest.mark.parametrize("batch", BATCHES)
def test_inverse_undoes(batch: tuple[int, ...]) -> None:
    transform = random_poses(*batch)
    product = small_matmul(invert_rigid(transform), transform)
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64).expand_as(product))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("grid", [(), (5,), (4, 5)])
def test_apply_equals_homogeneous_product(batch: tuple[int, ...], grid: tuple[int, ...]) -> None:
    transform, points = random_poses(*batch), torch.randn(*batch, *grid, 3, dtype=torch.float64)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    expected = torch.einsum(
        "bij,bnj->bni", transform.reshape(-1, 4, 4), homogeneous.reshape(transform[..., 0, 0].numel(), -1, 4)
    )
    torch.testing.assert_close(apply_rigid(transform, points), expected[..., :3].reshape(points.shape))
    torch.testing.assert_close(
        rotate(transform[..., :3, :3], points), apply_rigid(transform, points) - apply_rigid(transform, points * 0)
    )


def test_matrix_with_more_batch_than_points_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer batch dimensions"):
        apply_rigid(random_poses(2, 3), torch.zeros(3))


def test_rigid_has_the_constant_last_row() -> None:
    transform = rigid(torch.eye(3).expand(2, 3, 3), torch.ones(2, 3))
    assert transform[:, 3].tolist() == [[0, 0, 0, 1]] * 2
    assert transform[:, :3, 3].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("batch", BATCHES)
def test_relative_cam_maps_camera_j_to_camera_i(batch: tuple[int, ...]) -> None:
    cam_to_world = random_poses(*batch, 4)
    rel_cam = relative_cam(cam_to_world)
    assert rel_cam.shape == (*batch, 4, 4, 4, 4)
    in_camera_1 = torch.randn(*batch, 7, 3, dtype=torch.float64)
    world = apply_rigid(cam_to_world[..., 1, :, :], in_camera_1)
    in_camera_2 = apply_rigid(torch.linalg.inv(cam_to_world[..., 2, :, :]), world)
    torch.testing.assert_close(apply_rigid(rel_cam[..., 2, 1, :, :], in_camera_1), in_camera_2)


def test_small_products_ignore_autocast() -> None:
    a, b = torch.randn(5, 4, 4), torch.randn(5, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(small_matmul(a, b), (a.double() @ b.double()).float())
        assert apply_rigid(a, torch.randn(5, 6, 3)).dtype == torch.float32


def test_length_has_zero_gradient_at_zero() -> None:
    x = torch.tensor([[0.0, 0, 0], [3, 0, 4]], requires_grad=True)
    length(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0, 0], [0.6, 0, 0.8]]))
