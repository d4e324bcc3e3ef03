"""Perfect predictions score perfectly, wrong ones as badly as they are, and what is missing is not scored."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.protocols import PROTOCOLS, DepthRule, PoseRule
from eval.scoring import Row, score
from eval.summary import summarise
from eval.truth import ALL_PARTS
from g2vlm.errors import InputError
from tests.eval.samples import perfect, random_rotation, room_sample

ROOMS = PROTOCOLS["rooms-heldout-v1"]
SCENE_MEANS = {"accuracy_mean": 0, "accuracy_median": 0, "completion_mean": 0, "completion_median": 0, "nc_mean": 1,
               "nc_median": 1, "normal_derived_median_deg": 0, "normal_output_median_deg": 0, "num_pairs": 3,
               "rotation_median_deg": 0, "translation_median_deg": 0, "num_zero_baseline": 0}  # fmt: skip
BOTH_AVERAGES = {"abs_rel": 0, "delta_1": 1, "normal_derived_mean_deg": 0, "normal_output_mean_deg": 0, "rra_5": 100,
                 "rra_15": 100, "rra_30": 100, "rta_5": 100, "rta_15": 100, "rta_30": 100, "auc_30": 100}  # fmt: skip
AVERAGES = ("", "_macro", "_micro")
PERFECT = SCENE_MEANS | {name + kind: value for name, value in BOTH_AVERAGES.items() for kind in AVERAGES}


@pytest.mark.parametrize(
    ("scale", "seed"), [(1.0, None), (0.037, 1), (250.0, 2)], ids=["same world", "small world", "large world"]
)
@pytest.mark.parametrize("protocol", ["rooms-heldout-v1", "7scenes-proj-clean", "7scenes-pi3-518"])
def test_a_perfect_prediction_scores_perfectly_in_any_world(protocol: str, scale: float, seed: int | None) -> None:
    sample = room_sample()
    rotation = None if seed is None else random_rotation(seed)
    row = score(perfect(sample, scale, rotation), sample, PROTOCOLS[protocol])
    metrics = summarise([row], PROTOCOLS[protocol])
    assert metrics == pytest.approx(PERFECT, abs=2e-2)  # degrees: float32 poses
    assert metrics["abs_rel"] < 1e-6
    assert metrics["accuracy_mean"] < 1e-5
    assert metrics["nc_mean"] > 1 - 1e-5
    assert row.depth_scale == pytest.approx(1 / scale, rel=1e-5)
    assert row.point_scale == pytest.approx(1 / scale, rel=1e-5)
    assert row.valid_pixels == row.num_points == 3 * 42 * 56 - 25


def test_a_wrong_prediction_gets_the_errors_it_has() -> None:
    sample = room_sample()
    assert sample.depth is not None
    exact = perfect(sample)
    far = exact.local_points.clone()
    far[:, :, ::2] *= 1.5  # every second column: after the best scale half of the pixels are wrong by a half or a third
    poses = exact.cam_to_world.clone()
    poses[1, :3, :3] = poses[1, :3, :3] @ torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # 90 degrees of roll
    tilted = torch.tensor([0.0, 1.0, 0.0]).expand_as(exact.normals)
    row = score(replace(exact, local_points=far, cam_to_world=poses, normals=tilted), sample, ROOMS)
    assert 0.16 < row.abs_rel < 0.26
    assert 0.4 < row.delta_1 < 0.6
    assert row.rotation_deg == pytest.approx((90, 0, 90), abs=0.1)
    assert row.normal_output_mean_deg > 60
    assert row.normal_derived_mean_deg > 5
    assert row.accuracy_mean > 0.05


def test_every_part_is_scored_alone() -> None:
    sample = room_sample()
    fields = {
        "depth": "abs_rel",
        "points": "accuracy_mean",
        "derived normals": "normal_derived_mean_deg",
        "output normals": "normal_output_mean_deg",
    }
    for part in ALL_PARTS:
        row = score(perfect(sample), sample, ROOMS, (part,))
        scored = {name for name, field in fields.items() if not math.isnan(getattr(row, field))}
        assert scored == ({part} - {"poses"})
        assert bool(row.rotation_deg) == (part == "poses")


@pytest.mark.parametrize(
    ("missing", "unscored"),
    [
        ({"depth": None, "valid": None}, {"abs_rel", "accuracy_mean", "normal_output_mean_deg"}),
        ({"cam_to_world": None}, {"accuracy_mean", "rra_15"}),
        ({"intrinsics": None}, {"accuracy_mean", "normal_derived_mean_deg"}),
    ],
    ids=["depth", "poses", "intrinsics"],
)
def test_truth_that_is_missing_is_not_scored(missing: dict, unscored: set[str]) -> None:
    sample = room_sample()
    metrics = summarise([score(perfect(sample), replace(sample, **missing), ROOMS)], ROOMS)
    assert metrics
    assert not unscored & set(metrics)


def test_one_view_has_no_pairs() -> None:
    sample = room_sample(1)
    metrics = summarise([score(perfect(sample), sample, ROOMS)], ROOMS)
    assert "rra_15" not in metrics
    assert metrics["abs_rel"] < 1e-6


def test_normals_are_judged_from_the_points_when_the_data_has_none() -> None:
    sample = room_sample()
    derived = replace(sample, normals=None)
    row = score(perfect(sample), derived, ROOMS)
    assert row.normal_output_median_deg < 0.1
    assert row.normal_output_pixels < row.valid_pixels  # depth steps are left out


def test_a_missing_normal_counts_as_a_right_angle() -> None:
    sample = room_sample()
    exact = perfect(sample)
    row = score(replace(exact, normals=torch.zeros_like(exact.normals)), sample, ROOMS)
    assert row.normal_output_mean_deg == pytest.approx(90, abs=1e-6)


@pytest.mark.parametrize("field", ["local_points", "cam_to_world", "normals"])
def test_a_prediction_that_is_not_finite_is_refused(field: str) -> None:
    sample = room_sample()
    exact = perfect(sample)
    broken = getattr(exact, field).clone()
    broken[1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        score(replace(exact, **{field: broken}), sample, ROOMS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"depth": None, "valid": None, "cam_to_world": None}, "neither depth nor poses"),
        ({"valid": torch.zeros(3, 42, 56, dtype=torch.bool)}, "no pixel has valid depth"),
        ({"cam_to_world": torch.full((3, 4, 4), torch.nan)}, "not finite"),
    ],
)
def test_truth_that_cannot_be_used_is_refused(changes: dict, reason: str) -> None:
    sample = room_sample()
    with pytest.raises(InputError, match=reason):
        score(perfect(sample), replace(sample, **changes), ROOMS)


def test_depth_beyond_the_limit_is_not_scored() -> None:
    near = replace(ROOMS, depth=DepthRule(max_depth=2.0))
    sample = room_sample()
    assert sample.depth is not None
    row = score(perfect(sample), sample, near)
    assert row.valid_pixels == int((sample.depth < 2).sum())


def test_thinned_clouds_have_the_size_asked_for() -> None:
    sample = room_sample()
    row = score(perfect(sample), sample, ROOMS.changed(max_points=500))
    assert row.num_points == 500
    assert row.accuracy_mean < 1e-5


def test_items_are_averaged_in_both_ways_and_the_protocol_chooses() -> None:
    rows = [row_with(pixels=100, abs_rel=0.1, rotation=(1.0, 20.0)), row_with(pixels=300, abs_rel=0.5, rotation=(3.0,))]
    macro = replace(ROOMS, depth=DepthRule(average="macro"), poses=PoseRule(average="macro"))
    micro = replace(ROOMS, depth=DepthRule(average="micro"), poses=PoseRule(average="micro"))
    by_scene, together = summarise(rows, macro), summarise(rows, micro)
    for metrics in (by_scene, together):
        assert metrics["abs_rel_macro"] == pytest.approx(0.3)
        assert metrics["abs_rel_micro"] == pytest.approx(0.4)
        assert metrics["rra_5_macro"] == pytest.approx(75)
        assert metrics["rra_5_micro"] == pytest.approx(200 / 3)
        assert metrics["rotation_median_deg"] == 3
        assert metrics["num_pairs"] == 3
    assert (by_scene["abs_rel"], by_scene["rra_5"]) == (by_scene["abs_rel_macro"], by_scene["rra_5_macro"])
    assert (together["abs_rel"], together["rra_5"]) == (together["abs_rel_micro"], together["rra_5_micro"])


def test_items_without_a_part_do_not_count_in_its_mean() -> None:
    rows = [row_with(pixels=100, abs_rel=0.1, rotation=(1.0,)), row_with(pixels=300, abs_rel=math.nan)]
    metrics = summarise(rows, ROOMS)
    assert [metrics["abs_rel" + kind] for kind in AVERAGES] == pytest.approx([0.1] * 3)
    assert {metrics["rra_5" + kind] for kind in AVERAGES} == {100}
    assert "accuracy_mean" not in metrics


def test_micro_averages_of_normals_count_their_own_pixels() -> None:
    rows = [row_with(pixels=900, normal_derived_mean_deg=10.0, normal_derived_pixels=100, normal_output_mean_deg=1.0,
                     normal_output_pixels=1),
            row_with(pixels=100, normal_derived_mean_deg=40.0, normal_derived_pixels=300, normal_output_mean_deg=3.0,
                     normal_output_pixels=3)]  # fmt: skip
    metrics = summarise(rows, ROOMS)
    assert metrics["normal_derived_mean_deg_micro"] == pytest.approx(32.5)
    assert metrics["normal_output_mean_deg_micro"] == pytest.approx(2.5)
    assert metrics["normal_output_mean_deg"] == metrics["normal_output_mean_deg_macro"] == pytest.approx(2)


def row_with(pixels: int, abs_rel: float = math.nan, rotation: tuple[float, ...] = (), **fields) -> Row:
    return Row("a", (), 42, 56, pixels, abs_rel, rotation_deg=rotation, translation_deg=rotation, **fields)


def test_pose_errors_follow_the_order_of_the_protocol() -> None:
    """The translation of a pair is expressed in its second camera (pi3) or its first (VGGT)."""
    sample = room_sample()
    exact = perfect(sample)
    poses = exact.cam_to_world.clone()
    poses[0, :3, :3] = poses[0, :3, :3] @ random_rotation(4)
    turned = replace(exact, cam_to_world=poses)
    vggt = replace(ROOMS, poses=replace(ROOMS.poses, relative="vggt"))
    errors = {p.poses.relative: np.array(score(turned, sample, p).translation_deg) for p in (ROOMS, vggt)}
    assert np.abs(errors["pi3"] - errors["vggt"]).max() > 5
