import math

import numpy as np
import pytest
import roma
import torch
from torch import Tensor

from geometry import geodesic_angle, rotation_from_9d
from tests.geometry.scenes import BATCHES

DEGENERATE = {
    "reflection": [1, 0, 0, 0, 1, 0, 0, 0, -1],  # negative determinant, every singular value repeated
    "minus_identity": [-1, 0, 0, 0, -1, 0, 0, 0, -1],
    "rank_two": [1, 0, 0, 0, 1, 0, 0, 1, 0],
    "rank_one": [1, 2, 3, 1, 2, 3, 1, 2, 3],
    "zero_row": [1, 0, 0, 0, 1, 0, 0, 0, 0],
    "zero": [0] * 9,
}


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Textbook oracle: U diag(1, 1, det) V'."""
    u, _, vt = np.linalg.svd(matrix)
    return u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt


def assert_rotation(R: Tensor) -> None:
    eye = torch.eye(3, dtype=R.dtype).expand_as(R)
    torch.testing.assert_close(R @ R.mT, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones_like(R[..., 0, 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_nearest_rotation_of_the_row_normalised_matrix(batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 9, dtype=torch.float64)
    R = rotation_from_9d(x)
    assert R.shape == (*batch, 3, 3)
    for given, got in zip(x.reshape(-1, 3, 3).numpy(), R.reshape(-1, 3, 3).numpy(), strict=True):
        rows = given / np.linalg.norm(given, axis=1, keepdims=True)
        np.testing.assert_allclose(got, nearest_rotation(rows), atol=1e-12)


def test_a_rotation_with_scaled_rows_is_returned() -> None:
    R = roma.random_rotmat(10, dtype=torch.float64)
    scaled = R * torch.rand(10, 3, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(rotation_from_9d(scaled.reshape(10, 9)), R)


def test_negative_determinant() -> None:
    x = torch.randn(200, 3, 3, dtype=torch.float64)
    x = x[torch.linalg.det(x) < 0]
    assert len(x) > 50
    R = rotation_from_9d(x.reshape(-1, 9))
    assert_rotation(R)
    rows = torch.nn.functional.normalize(x, dim=-1)
    others = roma.random_rotmat(2000, dtype=torch.float64)
    best = (rows[:, None] - others).square().sum((-2, -1)).amin(1)
    assert ((rows - R).square().sum((-2, -1)) <= best).all()


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_matrices_give_rotations_and_finite_gradients(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor(DEGENERATE[name], dtype=dtype, requires_grad=True)
    R = rotation_from_9d(x)
    assert_rotation(R)
    (R * torch.randn(3, 3, dtype=dtype)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradient() -> None:
    x = torch.randn(8, 9, dtype=torch.float64, requires_grad=True)
    assert (torch.linalg.det(x.reshape(8, 3, 3)) < 0).any()
    assert torch.autograd.gradcheck(rotation_from_9d, x, atol=1e-4)
    identity = torch.eye(3, dtype=torch.float64).reshape(9).requires_grad_()  # repeated singular values, not ambiguous
    assert torch.autograd.gradcheck(rotation_from_9d, identity)


def test_half_precision_input_is_solved_in_float32() -> None:
    x = torch.randn(4, 9).bfloat16()
    R = rotation_from_9d(x)
    assert R.dtype == torch.float32
    assert torch.equal(R, rotation_from_9d(x.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(R, rotation_from_9d(x))


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 9"):
        rotation_from_9d(torch.zeros(2, 6))


@pytest.mark.parametrize("batch", BATCHES)
def test_geodesic_angle(batch: tuple[int, ...]) -> None:
    axis = torch.nn.functional.normalize(torch.randn(*batch, 3, dtype=torch.float64), dim=-1)
    angle = math.pi * torch.rand(*batch, 1, dtype=torch.float64)
    a = roma.random_rotmat(batch, dtype=torch.float64) if batch else roma.random_rotmat(1, dtype=torch.float64)[0]
    b = a @ roma.rotvec_to_rotmat(angle * axis)
    torch.testing.assert_close(geodesic_angle(a, b), angle[..., 0])
    torch.testing.assert_close(geodesic_angle(b, a), angle[..., 0])


def test_small_angles_keep_their_digits() -> None:
    a = torch.eye(3, dtype=torch.float64)
    b = roma.rotvec_to_rotmat(torch.tensor([1e-9, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(geodesic_angle(a, b), torch.tensor(1e-9, dtype=torch.float64), rtol=1e-6, atol=0)
