import math

import pytest
import roma
import torch
from torch import Tensor

from geometry.cameras import pinhole
from geometry.pose_encoding import decode_pose, decode_pose_cam_to_world, encode_pose
from geometry.transforms import rigid
from tests.geometry.scenes import BATCHES, random_poses

SIZE = (20, 30)


def random_intrinsics(*batch: int) -> Tensor:
    """K whose principal point is where decoding puts it."""
    focal = 10 + 40 * torch.rand(*batch, 2, dtype=torch.float64)
    return pinhole(focal, torch.tensor([SIZE[1] / 2, SIZE[0] / 2], dtype=torch.float64))


@pytest.mark.parametrize("batch", BATCHES)
def test_round_trip(batch: tuple[int, ...]) -> None:
    world_to_cam, K = random_poses(*batch), random_intrinsics(*batch)
    encoding = encode_pose(world_to_cam, K, SIZE)
    assert encoding.shape == (*batch, 9)
    assert (encoding[..., 6] >= 0).all()
    torch.testing.assert_close(encoding[..., 3:7].norm(dim=-1), torch.ones(batch, dtype=torch.float64))
    back, K_back = decode_pose(encoding, SIZE)
    torch.testing.assert_close(back, world_to_cam)
    torch.testing.assert_close(K_back, K)


def test_field_of_view_is_height_first() -> None:
    K = pinhole(torch.tensor([15.0, 10.0]), torch.tensor([15.0, 10.0]))  # half the width, half the height
    fov = encode_pose(torch.eye(4), K, SIZE)[7:]
    torch.testing.assert_close(fov, torch.full((2,), math.pi / 2))
    narrow = encode_pose(torch.eye(4), pinhole(torch.tensor([150.0, 10.0]), K[:2, 2]), SIZE)[7:]
    assert narrow[1] < narrow[0]


@pytest.mark.parametrize("axis", range(3))
def test_half_turns_survive(axis: int) -> None:
    rotation = roma.rotvec_to_rotmat(math.pi * torch.eye(3, dtype=torch.float64)[axis])
    pose = rigid(rotation, torch.ones(3, dtype=torch.float64))
    encoding = encode_pose(pose, random_intrinsics(), SIZE)
    assert encoding[6] >= 0
    torch.testing.assert_close(decode_pose(encoding, SIZE)[0], pose)


def test_the_encoder_writes_one_of_the_two_quaternions() -> None:
    encoding = encode_pose(random_poses(200), random_intrinsics(200), SIZE)
    assert (encoding[:, 6] >= 0).all()


def test_any_quaternion_of_one_direction_is_one_rotation() -> None:
    encoding = encode_pose(random_poses(5), random_intrinsics(5), SIZE)
    stretched = encoding.clone()
    stretched[:, 3:7] *= torch.tensor([-3.0, -1.0, 0.01, 0.5, 1e3], dtype=torch.float64)[:, None]
    torch.testing.assert_close(decode_pose(stretched, SIZE)[0], decode_pose(encoding, SIZE)[0])


def test_the_other_reading_is_camera_to_world() -> None:
    cam_to_world, K = random_poses(4), random_intrinsics(4)
    got, got_K = decode_pose_cam_to_world(encode_pose(cam_to_world, K, SIZE), SIZE)
    torch.testing.assert_close(got, cam_to_world)
    torch.testing.assert_close(got_K, K)


def test_field_of_view_of_zero_keeps_a_finite_focal_length() -> None:
    encoding = torch.tensor([0, 0, 0, 0, 0, 0, 1.0, 0, 0])
    assert decode_pose(encoding, SIZE)[1][0, 0].isinf()
    K = decode_pose(encoding, SIZE, least_tan=1e-6)[1]
    torch.testing.assert_close(K[[0, 1], [0, 1]], torch.tensor([15e6, 10e6]))


def test_half_precision_is_computed_in_single() -> None:
    world_to_cam, K = random_poses(3).bfloat16(), random_intrinsics(3).bfloat16()
    encoding = encode_pose(world_to_cam, K, SIZE)
    assert encoding.dtype == torch.float32
    assert decode_pose(encoding.bfloat16(), SIZE)[0].dtype == torch.float32


def test_gradients() -> None:
    encoding = encode_pose(random_poses(2), random_intrinsics(2), SIZE).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: decode_pose(e, SIZE), encoding)


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 9"):
        decode_pose(torch.zeros(2, 8), SIZE)
