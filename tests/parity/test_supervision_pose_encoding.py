"""Nine-number cameras against the peers' (golden family `supervision`, `pose_encoding`)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geometry import invert_rigid
from geometry.pose_encoding import decode_pose, decode_pose_cam_to_world, encode_pose
from tests.parity import golden

pytestmark = pytest.mark.parity

CASES = golden.cases("supervision/pose_encoding*.safetensors")
DA3_LEAST_TAN = 1e-6


def load(path: Path) -> tuple[dict[str, Tensor], tuple[int, int]]:
    case = load_file(path)
    height, width = case["image_hw"].tolist()
    return case, (height, width)


def check(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", CASES)
def test_encode(path: Path) -> None:
    case, size = load(path)
    check(encode_pose(case["extrinsics_w2c"], case["intrinsics"], size), case["pose_enc"])


@pytest.mark.parametrize("path", CASES)
def test_decode(path: Path) -> None:
    case, size = load(path)
    world_to_cam, K = decode_pose(case["pose_enc"], size)
    check(world_to_cam[..., :3, :], case["decoded_extrinsics"])
    check(K, case["decoded_intrinsics"])


@pytest.mark.parametrize("path", CASES)
def test_decode_what_no_encoder_wrote(path: Path) -> None:
    case, size = load(path)
    world_to_cam, K = decode_pose(case["raw_pose_enc"], size)
    check(world_to_cam[..., :3, :], case["raw_decoded_extrinsics"])
    check(K, case["raw_decoded_intrinsics"])


@pytest.mark.parametrize("path", CASES)
def test_decode_as_depth_anything_3_does(path: Path) -> None:
    case, size = load(path)
    cam_to_world, _ = decode_pose_cam_to_world(case["raw_pose_enc"], size, least_tan=DA3_LEAST_TAN)
    check(cam_to_world[..., :3, :], case["raw_decoded_da3_c2w"])
    check(invert_rigid(cam_to_world)[..., :3, :], case["raw_decoded_da3_w2c"])
