"""Tracks from depth and cameras against the peers' (golden family `supervision`, `tracks_from_depth`)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from geometry.cameras import unproject
from geometry.correspondence import Tracks, VisibilityRule, mask_pixels, tracks_from_depth
from geometry.transforms import apply_rigid, invert_rigid
from tests.parity import golden

pytestmark = pytest.mark.parity

CASES = golden.cases("supervision/tracks_from_depth*.safetensors")
ROUNDING = 1e-4  # pixels, and of a threshold


def rule(path: Path) -> VisibilityRule:
    """The fixture's thresholds; the peers ask nothing of the sign of the depth."""
    with safe_open(path, "pt") as file:
        given = file.metadata()
    return VisibilityRule(int(given["boundary_thres"]), float(given["pos_rel_thres"]), min_depth=-math.inf)


@pytest.mark.parametrize("path", CASES)
def test_world_points(path: Path) -> None:
    case = load_file(path)
    local = unproject(case["depths"], case["intrinsics"])
    world = apply_rigid(invert_rigid(case["extrinsics_w2c"]), local)
    torch.testing.assert_close(world, case["world_points"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", CASES)
def test_tracks(path: Path) -> None:
    case = load_file(path)
    tracks = run(case, rule(path))
    torch.testing.assert_close(tracks.points, case["image_points"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tracks.depth, case["projected_depth"], rtol=1e-5, atol=1e-6)
    for name in ("inside", "visible"):
        expected, decided = case[name], ~undecided(case, rule(path), name)
        assert decided.float().mean() > 0.8
        assert torch.equal(getattr(tracks, name)[decided], expected[decided]), name


def run(case: dict[str, Tensor], rule: VisibilityRule, shift: float = 0.0) -> Tracks:
    """Tracks of the fixture's pixels; `shift` moves every view's image, but not what the pixels are lifted to."""
    views = [case[name] for name in ("depths", "intrinsics", "extrinsics_w2c")]
    depth, K, world_to_cam = (torch.cat([tensor[:1], tensor]) for tensor in views)  # lifted from a view of its own
    K[1:, :2, 2] += shift
    tracks = tracks_from_depth(depth, K, world_to_cam, mask_pixels(case["query_mask"]), rule)
    return Tracks(tracks.points[1:], tracks.depth[1:], tracks.inside[1:], tracks.visible[1:])


def undecided(case: dict[str, Tensor], rule: VisibilityRule, name: str) -> Tensor:
    """Points (T, P) on a border pixel or a threshold, which the rounding of float32 decides."""
    rules = [replace(rule, relative=rule.relative * factor) for factor in (1 - ROUNDING, 1 + ROUNDING)]
    results = [getattr(run(case, each, shift), name) for each in rules for shift in (-ROUNDING, ROUNDING)]
    return torch.stack(results).any(0) != torch.stack(results).all(0)
