import math

import numpy as np
import pytest
import torch
from torch import Tensor

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from geometry import apply_rigid, invert_rigid, pixel_grid, ray_directions, rigid, unproject
from geometry.correspondence import (
    TrackRule,
    VisibilityRule,
    cell_coordinates,
    cell_depth,
    cell_index,
    cycle_error,
    grid_pixels,
    grid_tracks,
    keep_consistent,
    mask_pixels,
    tracks_from_depth,
)
from tests.geometry.scenes import intrinsics

H, W = 30, 40
BASELINE = 0.4
EVERY = pixel_grid(H, W, dtype=torch.float64).long().view(-1, 2)
NO_MARGIN = VisibilityRule(margin=0)
Views = tuple[Tensor, Tensor, Tensor]
"""depth, K and world_to_cam."""


def flat(depths: list[float], shift: tuple[float, float] = (0, 0)) -> Views:
    """A wall at a depth per view, all cameras at one place; `shift` of the principal point after the first."""
    depth = torch.tensor(depths, dtype=torch.float64)[:, None, None].repeat(1, H, W)
    K = intrinsics(H, W).repeat(len(depths), 1, 1)
    K[1:, :2, 2] += torch.tensor(shift, dtype=torch.float64)
    return depth, K, torch.eye(4, dtype=torch.float64).expand(len(depths), 4, 4)


def screen_before_wall() -> Views:
    """A wall at z = 4 and a square of side 0.6 at z = 2, seen by three cameras side by side, exactly."""
    K = intrinsics(H, W).repeat(3, 1, 1)
    centre = torch.tensor([[0, 0, 0], [BASELINE, 0, 0], [-0.3, 0.25, 0.2]], dtype=torch.float64)
    cam_to_world = rigid(torch.eye(3, dtype=torch.float64).expand(3, 3, 3), centre)
    rays = ray_directions(K, H, W)
    to_screen, to_wall = (z - centre[:, 2, None, None] for z in (2.0, 4.0))
    hit = centre[:, None, None] + to_screen[..., None] * rays
    return torch.where((hit[..., :2].abs() < 0.3).all(-1), to_screen, to_wall), K, invert_rigid(cam_to_world)


def test_a_camera_that_is_not_finite_shows_nothing() -> None:
    depth, K, world_to_cam = screen_before_wall()
    world_to_cam[1] = torch.nan
    visible = grid_tracks(depth, K, world_to_cam, TrackRule()).visible
    assert visible[0].any()
    assert visible[2].any()
    assert not visible[1].any()


def test_occlusion_by_a_screen_is_exact_away_from_its_edges() -> None:
    depth, K, world_to_cam = screen_before_wall()
    cam_to_world = invert_rigid(world_to_cam)
    world = apply_rigid(cam_to_world, unproject(depth, K))
    for anchor in range(3):
        tracks = tracks_from_depth(depth, K, world_to_cam, EVERY, VisibilityRule(), anchor=anchor)
        points = world[anchor].view(-1, 3)
        torch.testing.assert_close(tracks.points[anchor], EVERY.double())
        seen = []
        for view in range(3):
            centre = cam_to_world[view, :3, 3]
            crossing = centre + (2 - centre[2]) / (points[:, 2:] - centre[2]) * (points - centre)
            behind = (points[:, 2] > 3) & (crossing[:, :2].abs() < 0.3).all(-1)
            near_edge = ((crossing[:, :2].abs().amax(-1) - 0.3).abs() < 0.08) & (points[:, 2] > 3)
            expected = tracks.inside[view] & ~behind
            assert torch.equal(tracks.visible[view][~near_edge], expected[~near_edge])
            seen.append(behind & ~near_edge & tracks.inside[view])
        assert torch.stack(seen).any()
        torch.testing.assert_close(
            unproject_at(tracks.points[1], tracks.depth[1], K[1]), apply_rigid(world_to_cam[1], points)
        )
        others = tracks.visible.clone()
        others[anchor] = False
        assert torch.equal(tracks.useful(anchor), tracks.visible[anchor] & others.any(0))


def unproject_at(points: Tensor, depth: Tensor, K: Tensor) -> Tensor:
    """The definition: z K^-1 (u, v, 1)."""
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    return depth[..., None] * (homogeneous @ torch.linalg.inv(K).mT)


def visible(views: Views, rule: VisibilityRule) -> bool:
    """Whether view 1 shows all or none of view 0's inner pixels."""
    inner = ((EVERY > 5) & (torch.tensor([W, H]) - 6 > EVERY)).all(-1)
    shown = tracks_from_depth(*views, EVERY[inner], rule).visible[1]
    assert shown.all() or not shown.any()
    return bool(shown.all())


@pytest.mark.parametrize(
    ("there", "expected"), [(1.0, True), (0.953, True), (0.9521, False), (1.049, True), (1.051, False), (0.0, False)]
)
def test_both_relative_limits(there: float, expected: bool) -> None:
    assert visible(flat([1.0, there]), VisibilityRule(relative=0.05)) is expected


def test_slack_widens_both_limits_but_shows_nothing_without_depth() -> None:
    assert visible(flat([1.0, 0.945]), VisibilityRule(slack=0.01))
    assert visible(flat([1.0, 1.055]), VisibilityRule(slack=0.01))
    assert not visible(flat([1.0, 1.065]), VisibilityRule(slack=0.01))
    assert not visible(flat([1.0, 0.0]), VisibilityRule(slack=2.0))


@pytest.mark.parametrize("nothing", [0.0, -1.0, torch.nan, torch.inf])
def test_pixels_without_depth(nothing: float) -> None:
    depth, K, world_to_cam = flat([2.0, 2.0])
    depth[0, 10, 12] = nothing
    pixels = torch.tensor([[12, 10], [13, 10]])
    tracks = tracks_from_depth(depth, K, world_to_cam, pixels, VisibilityRule(margin=0, min_depth=-math.inf))
    assert tracks.visible.tolist() == tracks.inside.tolist() == [[False, True]] * 2
    depth, K, world_to_cam = flat([2.0, nothing])
    assert not visible((depth, K, world_to_cam), VisibilityRule(slack=0.1))


@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_any_of_the_four_pixels_around_shows_the_point(corner: tuple[int, int]) -> None:
    depth, K, world_to_cam = flat([2.0, 9.0], shift=(0.4, 0.7))
    x, y = 20 + corner[0], 11 + corner[1]
    depth[1, y, x] = 2.0
    shown = tracks_from_depth(depth, K, world_to_cam, EVERY, NO_MARGIN).visible[1].view(H, W)
    expected = torch.zeros(H, W, dtype=torch.bool)
    expected[y - 1 : y + 1, x - 1 : x + 1] = True
    assert torch.equal(shown, expected)


def test_margin() -> None:
    depth, K, world_to_cam = flat([2.0, 2.0], shift=(0.25, 0.5))
    tracks = tracks_from_depth(depth, K, world_to_cam, EVERY, VisibilityRule(margin=3))
    expected = torch.zeros(H, W, dtype=torch.bool)
    expected[3 : H - 3, 3 : W - 3] = True
    assert torch.equal(tracks.inside[1].view(H, W), expected)
    assert torch.equal(tracks.visible[1].view(H, W), expected)


def test_points_behind_a_camera() -> None:
    depth, K, world_to_cam = flat([2.0, 2.0])
    turned = torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    views = depth, K, torch.stack([world_to_cam[0], turned])
    tracks = tracks_from_depth(*views, EVERY, NO_MARGIN)
    assert not tracks.inside[1].any()
    assert not tracks.visible[1].any()
    untested = tracks_from_depth(*views, EVERY, VisibilityRule(margin=0, min_depth=-math.inf))
    assert untested.inside[1].any()
    assert not untested.visible[1].any()


def test_views_and_pixels_do_not_meddle() -> None:
    depth, K, world_to_cam = screen_before_wall()
    whole = tracks_from_depth(depth, K, world_to_cam, EVERY, VisibilityRule())
    part = tracks_from_depth(depth[[0, 2]], K[[0, 2]], world_to_cam[[0, 2]], EVERY[::7], VisibilityRule())
    torch.testing.assert_close(part.points, whole.points[[0, 2], ::7])
    assert torch.equal(part.visible, whole.visible[[0, 2], ::7])


def test_the_way_back_ends_where_it_began() -> None:
    views = screen_before_wall()
    tracks = tracks_from_depth(*views, EVERY, VisibilityRule())
    error = cycle_error(tracks, *views)
    assert error[tracks.visible].max() < 1e-6
    occluded = tracks.inside & ~tracks.visible
    assert error[occluded].min() > 1
    assert torch.equal(keep_consistent(tracks, error).visible, tracks.visible)


def test_the_way_back_finds_wrong_depth() -> None:
    depth, K, world_to_cam = screen_before_wall()
    wrong = depth.clone()
    wrong[1] *= 0.96
    tracks = tracks_from_depth(wrong, K, world_to_cam, EVERY, VisibilityRule())
    assert tracks.visible[1].sum() > 100
    error = cycle_error(tracks, wrong, K, world_to_cam)
    wall = tracks.visible[1] & (depth[0].view(-1) > 3)
    expected = K[0, 0, 0] * BASELINE * (1 / (0.96 * 4) - 1 / 4)
    torch.testing.assert_close(error[1, wall], expected.expand(int(wall.sum())))
    kept = keep_consistent(tracks, error, 0.9 * expected.item())
    assert not kept.visible[1, wall].any()
    assert torch.equal(kept.inside, tracks.inside)
    assert kept.visible[0].any()


def test_the_way_back_needs_depth() -> None:
    depth, K, world_to_cam = flat([2.0, 2.0])
    tracks = tracks_from_depth(depth, K, world_to_cam, EVERY, NO_MARGIN)
    depth[1] = torch.nan
    error = cycle_error(tracks, depth, K, world_to_cam)
    assert error[1].isinf().all()
    assert error[0].max() < 1e-9


def test_the_way_back_starts_inside_the_image() -> None:
    views = flat([2.0, 2.0], shift=(2.5, 0))
    tracks = tracks_from_depth(*views, EVERY, NO_MARGIN)
    lost = cycle_error(tracks, *views)[1].view(H, W).isinf()
    assert torch.equal(lost, (torch.arange(W) >= W - 2).expand(H, W))


def test_the_way_back_does_not_end_behind_the_anchor() -> None:
    depth, K, world_to_cam = flat([2.0, 2.0])
    turned = torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    views = depth, K, torch.stack([world_to_cam[0], turned])
    tracks = tracks_from_depth(*views, EVERY, VisibilityRule(margin=0, min_depth=-math.inf))
    assert cycle_error(tracks, *views)[1].isinf().all()


@pytest.mark.parametrize(
    ("size", "grid"), [((32, 48), (8, 8)), ((30, 41), (7, 9)), ((24, 24), (24, 24)), ((5, 4), (9, 8))]
)
def test_grid_pixels_hold_the_centres_of_the_cells(size: tuple[int, int], grid: tuple[int, int]) -> None:
    pixels = grid_pixels(size, grid)
    assert pixels.dtype == torch.int64
    expected = [
        (math.floor((j + 0.5) * size[1] / grid[1]), math.floor((i + 0.5) * size[0] / grid[0]))
        for i, j in np.ndindex(*grid)
    ]
    assert [tuple(pixel) for pixel in pixels.tolist()] == expected


def test_mask_pixels_go_row_by_row() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert mask_pixels(mask).tolist() == [[1, 0], [2, 0], [0, 1]]


def test_cell_centres_are_integers() -> None:
    size, grid = (28, 42), (4, 3)
    centres = torch.tensor([[(j + 0.5) * 14 - 0.5, (i + 0.5) * 7 - 0.5] for i, j in np.ndindex(*grid)])
    cells = cell_coordinates(centres, size, grid)
    torch.testing.assert_close(cells, torch.tensor([[float(j), float(i)] for i, j in np.ndindex(*grid)]))
    assert cell_index(centres, size, grid).tolist() == list(range(12))


def test_cells_hold_whole_pixels_where_the_sizes_divide() -> None:
    size, grid = (28, 42), (4, 3)
    pixels = pixel_grid(*size)
    index = cell_index(pixels, size, grid)
    expected = (torch.arange(28)[:, None] // 7) * 3 + torch.arange(42) // 14
    assert torch.equal(index, expected)


def test_cells_do_not_depend_on_the_image_s_resolution() -> None:
    points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor([39, 29])
    double = 2 * points + 0.5  # resampling keeps the image's border
    torch.testing.assert_close(cell_coordinates(double, (60, 80), (4, 5)), cell_coordinates(points, (30, 40), (4, 5)))


def test_points_outside_belong_to_the_nearest_cell() -> None:
    points = torch.tensor([[-5.0, -5], [100, -5], [-5, 100], [100, 100]])
    assert cell_index(points, (30, 40), (4, 5)).tolist() == [0, 4, 15, 19]


# ---- rules and cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), [((12, 8), (3, 2)), ((13, 9), (4, 5)), ((5, 6), (7, 3))])
def test_depth_of_a_cell_is_the_mean_of_its_pixels(size: tuple[int, int], grid: tuple[int, int]) -> None:
    depth, valid = 1 + torch.rand(2, *size, dtype=torch.float64), torch.rand(2, *size) < 0.5
    valid[1] = False
    mean, known = cell_depth(torch.where(valid, depth, torch.nan), valid, grid)
    assert mean.shape == known.shape == (2, grid[0] * grid[1])
    found: dict[tuple[int, int], list[float]] = {}
    for view, y, x in valid.nonzero().tolist():
        cell = int((y + 0.5) * grid[0] / size[0]) * grid[1] + int((x + 0.5) * grid[1] / size[1])
        found.setdefault((view, cell), []).append(float(depth[view, y, x]))
    for view in range(2):
        for cell in range(grid[0] * grid[1]):
            values = found.get((view, cell), [])
            assert bool(known[view, cell]) == bool(values)
            assert mean[view, cell].item() == pytest.approx(sum(values) / max(len(values), 1))
    assert known[0].any()


def test_cells_of_points_and_pixels_agree() -> None:
    """A pixel's depth goes to the cell that a point at the pixel's centre falls into."""
    size, grid = (15, 22), (4, 3)
    pixels = mask_pixels(torch.ones(size, dtype=torch.bool))
    cells = cell_index(pixels.double(), size, grid)
    for cell in range(12):
        own = torch.zeros(size, dtype=torch.bool)
        x, y = pixels[cells == cell].unbind(-1)
        own[y, x] = True
        assert cell_depth(torch.ones(1, *size), own[None], grid)[1].nonzero().tolist() == [[0, cell]]


def test_the_points_of_a_rule_are_those_of_its_grids() -> None:
    """Its coarse grid is part of the fine one, and a limit of the way back is one more condition."""
    sample = RoomsSource("tiny", cameras="near").load(0, ViewRequest(3, (84, 84), seed=0))
    assert sample.depth is not None
    assert sample.intrinsics is not None
    assert sample.cam_to_world is not None
    views = sample.depth, sample.intrinsics, invert_rigid(sample.cam_to_world)
    rule = TrackRule(max_cycle_error=0.4)
    tracks = grid_tracks(*views, rule)
    apart = [tracks_from_depth(*views, grid_pixels((84, 84), grid), rule.visibility) for grid in rule.grids]
    torch.testing.assert_close(tracks.points, torch.cat([own.points for own in apart], dim=1))
    near = torch.cat([cycle_error(own, *views) <= 0.4 for own in apart], dim=1)
    plain = torch.cat([own.visible for own in apart], dim=1)
    assert torch.equal(tracks.visible, plain & near)
    assert 0 < tracks.visible.sum() < plain.sum()
    coarse, fine = ({tuple(pixel) for pixel in grid_pixels((84, 84), grid).tolist()} for grid in rule.grids)
    assert len(coarse) == 64
    assert coarse < fine
