"""The baselines are what they claim to be."""

import math

import numpy as np
import pytest
import torch

from eval.baselines import (
    BASELINES,
    CONSTANT,
    CONSTANT_PARTS,
    IDENTITY,
    UNTRAINED,
    baseline_systems,
    constant_depth,
    identity_pose,
    model_system,
    untrained,
)
from eval.predictions import predict
from eval.protocols import PROTOCOLS
from eval.scoring import Row, score
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed
from g2vlm.pipeline import Pipeline, load
from geometry import geodesic_angle, relative_cam
from tests.eval.samples import room_sample

ROOMS = PROTOCOLS["rooms-heldout-v1"]


def flat_row(sample: SceneSample) -> Row:
    return score(constant_depth(sample, ROOMS), sample, ROOMS, CONSTANT_PARTS)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny", "cpu")


def test_best_constant_depth_is_the_best_of_all_constants() -> None:
    sample = room_sample()
    assert sample.depth is not None
    assert sample.valid is not None
    depth = sample.depth[sample.valid].double().numpy()
    constants = np.linspace(depth.min(), depth.max(), 5001)
    brute = min(float(np.mean(np.abs(c - depth) / depth)) for c in constants)
    row = flat_row(sample)
    assert row.abs_rel <= brute + 1e-12
    assert row.abs_rel == pytest.approx(brute, rel=1e-4)
    assert row.depth_scale == pytest.approx(1)  # nothing is left to align


def test_constant_depth_has_no_poses_and_flat_normals() -> None:
    row = flat_row(room_sample())
    assert row.rotation_deg == ()
    assert math.isnan(row.normal_output_mean_deg)
    assert 10 < row.normal_derived_mean_deg < 90
    assert 0.1 < row.accuracy_mean < 3


def test_constant_depth_needs_neither_intrinsics_nor_poses() -> None:
    sample = room_sample(intrinsics=None, cam_to_world=None)
    assert flat_row(sample).abs_rel == flat_row(room_sample()).abs_rel


def test_identity_pose_errs_by_the_rotation_itself() -> None:
    sample = room_sample(4)
    assert sample.cam_to_world is not None
    row = score(identity_pose(sample), sample, ROOMS, ("poses",))
    rotations = relative_cam(sample.cam_to_world.double())[..., :3, :3]
    angles = geodesic_angle(rotations, torch.eye(3, dtype=torch.float64).expand_as(rotations))
    i, j = np.triu_indices(4, k=1)
    assert row.rotation_deg == pytest.approx(angles[i, j].rad2deg().tolist(), abs=1e-3)
    assert row.translation_deg == pytest.approx([90] * 6)
    assert math.isnan(row.abs_rel)


def test_an_untrained_model_is_the_same_architecture_with_other_weights(pipeline: Pipeline) -> None:
    other = untrained(pipeline)
    shapes = {name: tensor.shape for name, tensor in pipeline.model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in other.model.state_dict().items()} == shapes
    pixels = torch.rand(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    first, again = untrained(pipeline).predict(pixels), other.predict(pixels)
    assert torch.equal(first.local_points, again.local_points)
    assert not torch.equal(pipeline.predict(pixels).local_points, again.local_points)


def test_the_baselines_stand_beside_the_model(pipeline: Pipeline) -> None:
    systems = baseline_systems(pipeline, ROOMS)
    assert list(systems) == list(BASELINES) == [CONSTANT, IDENTITY, UNTRAINED]
    sample = room_sample(2)
    rows = [
        score(system.predict(sample), sample, ROOMS, system.parts)
        for system in (model_system(pipeline), *systems.values())
    ]
    assert len({(row.item, row.view_ids, row.valid_pixels) for row in rows}) == 1
    assert [(math.isnan(row.abs_rel), row.rotation_deg == ()) for row in rows] == [
        (False, False), (False, True), (True, False), (False, False),
    ]  # fmt: skip


def test_a_model_that_puts_out_nan_is_refused(pipeline: Pipeline) -> None:
    broken = untrained(pipeline)
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(CheckFailed, match="not finite"):
        predict(broken, room_sample(1))


def test_true_cameras_place_the_planes_of_constant_depth() -> None:
    """In a world of one depth they are the world itself."""
    sample = room_sample(depth=torch.full((3, 42, 56), 2.0))
    row = flat_row(sample)
    assert row.accuracy_mean < 1e-5
    assert row.completion_mean < 1e-5
