"""Visibility of tracks against exact rooms: a ray from the other camera to the point, cast in float64, ends there."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from geometry import depth_edges, invert_rigid
from geometry.correspondence import (
    Tracks,
    VisibilityRule,
    cycle_error,
    grid_pixels,
    keep_consistent,
    tracks_from_depth,
)
from tests.g2vlm.data.rooms_oracle import trace

ROOMS, VIEWS, GRID = 8, 4, (24, 24)
RULE = VisibilityRule()
SAME_PLACE = 2e-3  # of the distance: what float32 depth leaves open
LEAST_AGREEMENT = 0.995


class Counted(NamedTuple):
    """What became of the points inside the image, over rooms and views; away from edges alone."""

    plain: Tensor  # the rule agrees with the ray
    cycled: Tensor  # the rule with the cycle check does
    occluded: Tensor  # the ray ends before the point


def near_edges(depth: Tensor, instances: Tensor, points: Tensor) -> Tensor:
    """Points (P, 2) with a step of depth or another instance within a pixel of their four neighbours."""
    labels = instances[None].float()
    borders = F.max_pool2d(labels, 3, 1, 1) + F.max_pool2d(-labels, 3, 1, 1) > 0
    edges = (depth_edges(depth, RULE.relative) | borders[0]).float()
    wide = F.max_pool2d(F.pad(edges, (0, 1, 0, 1))[None], 2, stride=1)[0]  # [v, u]: any of (v, u) + {0, 1}^2
    u, v = points.floor().long().unbind(-1)
    return wide[v.clamp(0, depth.shape[0] - 1), u.clamp(0, depth.shape[1] - 1)] > 0


def count(law: str, cameras: str, size: tuple[int, int]) -> Counted:
    source = RoomsSource(law, cameras=cameras)
    found: list[Counted] = []
    for room in range(ROOMS):
        sample, scene = source.load(room, ViewRequest(VIEWS, size, seed=0)), source.scene(room)
        assert sample.depth is not None
        assert sample.intrinsics is not None
        assert sample.cam_to_world is not None
        assert sample.instances is not None
        pixels = grid_pixels(size, GRID)
        views = sample.depth, sample.intrinsics, invert_rigid(sample.cam_to_world)
        tracks = tracks_from_depth(*views, pixels, RULE)
        checked = keep_consistent(tracks, cycle_error(tracks, *views))
        x, y = pixels.unbind(-1)
        world, instance = sample.world_points[0, y, x].double(), sample.instances[0, y, x]
        for view in range(1, VIEWS):
            centre = sample.cam_to_world[view, :3, 3].double()
            nearest = trace(scene, centre.numpy(), (world - centre).numpy())
            there = torch.from_numpy(nearest.depth - 1).abs() < SAME_PLACE
            shown = there & (torch.from_numpy(nearest.instance) == instance)
            edge = near_edges(sample.depth[view], sample.instances[view], tracks.points[view])
            counted = tracks.inside[view] & ~edge
            found.append(Counted(*(row[counted] for row in compare(tracks, checked, view, shown))))
    return Counted(*(torch.cat(rows) for rows in zip(*found, strict=True)))


def compare(tracks: Tracks, checked: Tracks, view: int, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tracks.visible[view] == shown, checked.visible[view] == shown, ~shown


@pytest.mark.parametrize(
    ("law", "cameras", "size"),
    [("tiny", "mixed", (84, 84)), ("tiny", "near", (84, 84)), ("standard", "mixed", (168, 168))],
)
def test_visibility_is_what_the_room_says(law: str, cameras: str, size: tuple[int, int]) -> None:
    found = count(law, cameras, size)
    assert len(found.plain) > 1000
    assert found.occluded.sum() > 20
    assert found.plain.double().mean() >= LEAST_AGREEMENT
    assert found.plain[found.occluded].double().mean() > 0.9


@pytest.mark.parametrize("law", ["tiny", "standard"])
def test_the_way_back_tells_the_two_sides_of_thin_things(law: str) -> None:
    found = count(law, "wide", (168, 168))
    assert found.plain.double().mean() > 0.98  # a chair's back is thinner than the rule's tolerance
    assert found.cycled.double().mean() >= LEAST_AGREEMENT
