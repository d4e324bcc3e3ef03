"""Ray maps against the peers' (golden family `supervision`, `ray_map`)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geometry.rays import (
    camera_from_rays,
    intrinsics_from_plane,
    intrinsics_to_plane,
    make_ray_map,
    points_from_rays,
    ray_map_from_direction_first,
    ray_map_to_direction_first,
)
from tests.parity import golden

pytestmark = pytest.mark.parity

CASES = golden.cases("supervision/ray_map*.safetensors")
RECOVERED = 1e-5  # the peers' camera is a random choice among fits to float32 rays


def check(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=tolerance)


def our_map_on_the_plane(case: dict[str, Tensor]) -> Tensor:
    """The fixture's cameras by their intrinsics on the 2 x 2 plane, at the fixture's number of cells."""
    height, width = case["camray_dir_origin"].shape[-3:-1]
    return make_ray_map(case["c2w"], intrinsics_from_plane(case["K_norm2"], height, width), height, width)


@pytest.mark.parametrize("path", CASES)
def test_rays_of_cells(path: Path) -> None:
    case = load_file(path)
    check(ray_map_to_direction_first(our_map_on_the_plane(case)), case["camray_dir_origin"])


@pytest.mark.parametrize("path", CASES)
def test_points_of_cells(path: Path) -> None:
    case = load_file(path)
    check(points_from_rays(our_map_on_the_plane(case), case["depth_patch"]), case["points_world_patch"])


@pytest.mark.parametrize("path", CASES)
def test_rays_and_points_of_pixels(path: Path) -> None:
    case = load_file(path)
    height, width = case["image_hw"].tolist()
    rays = make_ray_map(case["c2w"], case["intrinsics_px"], height, width)
    check(rays[..., 3:], case["spec_ray_dir_px"])
    check(points_from_rays(rays, case["depth_px"]), case["points_world_px"])


@pytest.mark.parametrize("path", CASES)
def test_recovered_camera(path: Path) -> None:
    case = load_file(path)
    rays = ray_map_from_direction_first(case["camray_dir_origin"])
    cam_to_world, K = camera_from_rays(rays)
    plane = intrinsics_to_plane(K, *rays.shape[-3:-1])
    check(cam_to_world[..., :3, :3], case["recovered_R_c2w"], RECOVERED)
    check(cam_to_world[..., :3, 3], case["recovered_T"], RECOVERED)
    check(plane[..., [0, 1], [0, 1]], case["recovered_focal"], RECOVERED)
    check(plane[..., :2, 2], case["recovered_pp"], RECOVERED)
