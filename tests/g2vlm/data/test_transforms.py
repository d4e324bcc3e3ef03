import numpy as np
import pytest
import torch

from g2vlm.data.transforms import (
    augment_colours,
    centred_box,
    draw_zoom,
    move_intrinsics,
    resize_image,
    resize_nearest,
    whole_box,
)
from g2vlm.errors import InputError
from geometry import intrinsics_from_points
from tests.g2vlm.data.scenes import room_frames

K = np.array([[200.0, 0, 110.3], [0, 210.0, 73.8], [0, 0, 1]])
SIZE = (160, 240)


def ramps(size: tuple[int, int]) -> np.ndarray:
    """An image whose red channel is the column and whose green channel is the row."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


@pytest.mark.parametrize("target", [(56, 84), (84, 56), (98, 98)])
@pytest.mark.parametrize("zoom", [1.0, 0.9])
def test_crop_keeps_pixels_rays_and_depth_together(target: tuple[int, int], zoom: float) -> None:
    box = centred_box(SIZE, target, K, zoom)
    moved = move_intrinsics(K, box, target)
    image = resize_image(ramps(SIZE), box, target).astype(float)
    nearest = resize_nearest(ramps(SIZE)[..., 0].astype(np.float32), box, target)

    columns = np.arange(target[1])[4:-4]
    rays = (columns - moved[0, 2]) / moved[0, 0]
    original = rays * K[0, 0] + K[0, 2]  # where the same ray lies in the stored image
    assert np.abs(image[10, 4:-4, 0] - original).max() <= 0.75  # 8-bit values
    assert np.abs(nearest[10, 4:-4] - original).max() <= 0.5 + 1e-6  # the pixel that holds the ray
    rows = np.arange(target[0])[4:-4]
    assert np.abs(image[4:-4, 10, 1] - ((rows - moved[1, 2]) / moved[1, 1] * K[1, 1] + K[1, 2])).max() <= 0.75


@pytest.mark.parametrize("target", [(56, 84), (84, 56)])
def test_crop_is_centred_isotropic_and_as_large_as_possible(target: tuple[int, int]) -> None:
    box = centred_box(SIZE, target, K)
    moved = move_intrinsics(K, box, target)
    np.testing.assert_allclose(moved[:2, 2], [(target[1] - 1) / 2, (target[0] - 1) / 2], atol=1e-9)
    np.testing.assert_allclose(moved[1, 1] / moved[0, 0], K[1, 1] / K[0, 0], rtol=1e-9)
    edges = np.array([box.top, box.left, SIZE[0] - box.top - box.height, SIZE[1] - box.left - box.width])
    assert edges.min() == pytest.approx(0, abs=1e-9)


def test_stretch_uses_both_factors() -> None:
    moved = move_intrinsics(K, whole_box(SIZE), (80, 80))
    np.testing.assert_allclose(moved[0], [K[0, 0] / 3, 0, (K[0, 2] + 0.5) / 3 - 0.5])
    np.testing.assert_allclose(moved[1], [0, K[1, 1] / 2, (K[1, 2] + 0.5) / 2 - 0.5])


def test_resized_depth_still_explains_its_intrinsics() -> None:
    frame = room_frames(size=(168, 224))[1]
    assert frame.depth is not None
    assert frame.intrinsics is not None
    box = centred_box((168, 224), (56, 84), frame.intrinsics)
    moved = move_intrinsics(frame.intrinsics, box, (56, 84))
    rows, columns = np.mgrid[:56, :84]
    z = resize_nearest(frame.depth, box, (56, 84))
    points = z[..., None] * (np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(moved).T)
    found = intrinsics_from_points(torch.from_numpy(points))
    np.testing.assert_allclose(found.numpy(), moved, atol=1e-6)


def test_crop_refuses_a_principal_point_at_the_border() -> None:
    with pytest.raises(InputError, match="principal point"):
        centred_box(SIZE, (56, 56), np.array([[200.0, 0, 40], [0, 200, 80], [0, 0, 1]]))


def test_zoom_stays_in_its_range() -> None:
    rng = np.random.default_rng(0)
    zooms = np.array([draw_zoom(rng) for _ in range(500)])
    assert zooms.min() >= 0.9
    assert zooms.max() <= 1.0
    assert (np.abs(zooms - 0.95) > 0.03).mean() > 0.5  # Beta(0.5, 0.5) prefers the ends


# ---------------------------------------------------------------------------------------------- colour


def views(num_views: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 3, 14, 14), np.uint8)).repeat(
        num_views, 1, 1, 1
    )


def test_colours_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = augment_colours(views(), seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, augment_colours(views(), seed=5))
    assert first.dtype == torch.uint8
    assert not torch.equal(first, augment_colours(views(), seed=6))


def test_colour_changes_come_as_often_as_stated() -> None:
    results = [augment_colours(views(), seed) for seed in range(400)]
    shared = np.mean([torch.equal(r[0], r[1]) and torch.equal(r[1], r[2]) for r in results])
    unchanged = np.mean([torch.equal(r[0], views()[0]) for r in results])
    grey = np.mean([torch.equal(r[0, 0], r[0, 1]) and torch.equal(r[0, 0], r[0, 2]) for r in results])
    assert 0.62 < shared < 0.79  # 0.7, and equal draws of no change at all
    assert 0.06 < unchanged < 0.13  # 0.1 * 0.95
    assert 0.02 < grey < 0.09


def test_colour_jitter_reaches_its_limits_and_no_further() -> None:
    grey = torch.full((1, 3, 14, 14), 100, dtype=torch.uint8)  # only brightness moves a grey image
    values = np.array([augment_colours(grey, seed)[0, 0, 0, 0].item() for seed in range(400)])
    assert 50 <= values.min() < 54
    assert 146 < values.max() <= 150
