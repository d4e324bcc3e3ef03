"""From items to files: failures are counted, results keep their schema, views are those of the protocol."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.baselines import IDENTITY, System, identity_pose
from eval.evaluate import MODEL, Evaluation, evaluate, require_scored
from eval.protocols import DATASETS, PROTOCOLS, ViewRule, find_protocol
from eval.report import append_rows, markdown, results, table, write
from eval.scoring import Row, score
from eval.sources import Item, choose_views, distinct, file_name, first_views, frame_items, frame_numbers
from g2vlm.data.frames import SceneFacts
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed, InputError, ResourceError
from geometry import GeometryPrediction
from tests.eval.samples import RoomFrames, perfect, room_items, room_sample

ROOMS = PROTOCOLS["rooms-heldout-v1"]


EXACT = System(perfect)
IDENTICAL = System(identity_pose, ("poses",))
PROVENANCE = {
    "checkpoint": {"name": "perfect", "files": {"model.safetensors": "ab" * 32}, "dtype": "float32", "config": {}},
    "commit": {"hash": "cd" * 20, "dirty": True},
}


def broken_item(name: str) -> Item:
    def load() -> SceneSample:
        raise InputError(f"cannot read  {name}/depth.png", "file ends early", "replace it")

    return Item(name, load)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    items = [*room_items(2), broken_item("torn")]
    return evaluate(items, {MODEL: EXACT, IDENTITY: IDENTICAL}, ROOMS)


@pytest.fixture
def written(evaluation: Evaluation, tmp_path: Path) -> Path:
    """The files of an evaluation."""
    items = [*room_items(2), broken_item("torn")]
    evaluate(items, {MODEL: EXACT, IDENTITY: IDENTICAL}, ROOMS, lambda scored: append_rows(tmp_path, scored.rows))
    write(tmp_path, results(evaluation, "perfect", PROVENANCE), "cpu")
    return tmp_path


def test_perfect_predictions_are_perfect_over_a_whole_set(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics(MODEL)
    assert metrics["abs_rel"] < 1e-6
    assert metrics["accuracy_mean"] < 1e-5
    assert metrics["auc_30"] == 100
    assert metrics["num_pairs"] == 6
    assert evaluation.metrics(IDENTITY)["rotation_median_deg"] > 20


def test_an_item_that_fails_is_counted_with_its_reason(evaluation: Evaluation) -> None:
    assert evaluation.count == 2
    (skipped,) = evaluation.skipped
    assert skipped.item == "torn"
    assert skipped.reason.startswith("data: cannot read torn/depth.png")


def test_an_item_that_one_system_fails_on_is_left_out_for_all() -> None:
    def fails_on_second(sample: SceneSample) -> GeometryPrediction:
        if sample.scene == "room-1":
            raise CheckFailed("predicted values are not finite")
        return identity_pose(sample)

    result = evaluate(room_items(3), {MODEL: EXACT, "other": System(fails_on_second, ("poses",))}, ROOMS)
    assert {name: [row.item for row in rows] for name, rows in result.rows.items()} == {
        MODEL: ["room-0", "room-2"],
        "other": ["room-0", "room-2"],
    }
    assert result.skipped[0].reason.startswith("other: ")


def test_nothing_scored_is_a_failure() -> None:
    with pytest.raises(CheckFailed, match="no scene could be scored"):
        require_scored(evaluate([broken_item("torn")], {MODEL: EXACT}, ROOMS))
    with pytest.raises(CheckFailed, match="there is no scene"):
        require_scored(evaluate([], {MODEL: EXACT}, ROOMS))


def test_scored_items_are_kept_before_a_later_one_stops_the_evaluation(tmp_path: Path) -> None:
    def stop() -> SceneSample:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([*room_items(2), Item("stop", stop)], {MODEL: EXACT}, ROOMS, lambda s: append_rows(tmp_path, s.rows))
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == ["room-0", "room-1"]


@pytest.mark.parametrize("field", ["local_points", "cam_to_world", "normals"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_item_with_a_prediction_that_is_not_finite_is_skipped(field: str, value: float) -> None:
    def broken(sample: SceneSample) -> GeometryPrediction:
        prediction = perfect(sample)
        values = getattr(prediction, field).clone()
        values[1, 1, 1] = value if sample.scene == "room-1" else values[1, 1, 1]
        return replace(prediction, **{field: values})

    result = evaluate(room_items(3), {MODEL: System(broken)}, ROOMS)
    assert [row.item for row in result.rows[MODEL]] == ["room-0", "room-2"]
    assert [skipped.item for skipped in result.skipped] == ["room-1"]
    assert "finite" in result.skipped[0].reason


def test_awkward_truth_is_scored_or_skipped_with_its_reason() -> None:
    nan = torch.full((3, 42, 56), math.nan)
    few = torch.zeros(3, 42, 56, dtype=torch.bool)
    few[2, -1, :2] = True
    poses = room_sample().cam_to_world
    assert poses is not None
    samples = {
        "one view": room_sample(1),
        "NaN depth": room_sample(depth=nan, valid=None),
        "no valid pixel": room_sample(valid=torch.zeros(3, 42, 56, dtype=torch.bool)),
        "two valid pixels": room_sample(valid=few),
        "one camera twice": room_sample(cam_to_world=poses[[0, 0, 0]]),
    }
    items = [Item(name, lambda sample=sample: sample) for name, sample in samples.items()]
    result = evaluate(items, {MODEL: EXACT}, ROOMS)
    assert [row.item for row in result.rows[MODEL]] == ["one view", "one camera twice"]
    reasons = {skipped.item: skipped.reason for skipped in result.skipped}
    assert "no pixel has valid depth" in reasons["NaN depth"]
    assert "no pixel has valid depth" in reasons["no valid pixel"]
    assert "at least 3 points" in reasons["two valid pixels"]


def test_memory_that_runs_out_stops_the_evaluation() -> None:
    for error in (torch.OutOfMemoryError("tried to allocate 96 GiB"), MemoryError()):

        def hungry(sample: SceneSample, error: BaseException = error) -> GeometryPrediction:
            raise error

        with pytest.raises(ResourceError, match="not enough memory"):
            evaluate(room_items(1), {MODEL: System(hungry)}, ROOMS)


def test_a_bug_is_not_taken_for_a_bad_item() -> None:
    def wrong(sample: SceneSample) -> GeometryPrediction:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        evaluate(room_items(1), {MODEL: System(wrong)}, ROOMS)


def test_results_have_the_agreed_schema(written: Path) -> None:
    record = json.loads((written / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(record) == [
        "benchmark", "protocol", "model", "count", "skipped", "metrics", "baselines", "per_item", "provenance",
    ]  # fmt: skip
    assert (record["benchmark"], record["model"], record["count"]) == ("rooms-heldout-v1", "perfect", 2)
    assert set(record["skipped"][0]) == {"item", "reason"}
    assert set(record["baselines"]) == {IDENTITY}
    assert all(isinstance(value, int | float) for value in record["metrics"].values())
    assert record["protocol"]["depth"]["alignment"] == "l1_scale"
    assert record["protocol"]["points"]["alignment"] == "umeyama_then_icp"
    assert record["provenance"] == PROVENANCE
    assert record["per_item"] == "items.jsonl"
    assert json.loads((written / "run.json").read_text())["packages"]["torch"]


def test_lines_per_item_hold_what_the_metrics_are_made_of(evaluation: Evaluation, written: Path) -> None:
    text = (written / "items.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(line["system"], line["item"]) for line in lines] == [
        (MODEL, "room-0"), (IDENTITY, "room-0"), (MODEL, "room-1"), (IDENTITY, "room-1"),
    ]  # fmt: skip
    pooled = sorted(angle for line in lines[1::2] for angle in line["rotation_deg"])
    assert (pooled[2] + pooled[3]) / 2 == pytest.approx(evaluation.metrics(IDENTITY)["rotation_median_deg"])
    assert lines[1]["abs_rel"] is None  # not scored


def test_the_table_names_protocol_counts_baselines_and_skips(evaluation: Evaluation) -> None:
    record = results(evaluation, "perfect", PROVENANCE)
    for text in (table(record), markdown(record)):
        assert "rooms-heldout-v1" in text
        assert "2 scenes, 1 skipped, 6 pairs of views" in text
        assert "skipped torn: data: cannot read" in text
        (line,) = [line for line in text.splitlines() if "RRA @ 15" in line]
        assert "100.00" in line
        (line,) = [line for line in text.splitlines() if "AbsRel" in line]
        assert line.rstrip(" |").endswith("-")  # identity poses have no depth
        assert "weights: model.safetensors sha256 abababababab; commit cdcdcdcdcdcd with local changes" in text
        for label in ("normal consistency, mean", "normals of points, mean deg", "normals put out, mean deg"):
            assert label in text


def test_other_averages_are_rows_of_their_own_only_where_they_differ() -> None:
    rows = [Row(name, (), 14, 14, pixels, abs_rel=error, delta_1=0.5, rotation_deg=angles, translation_deg=angles)
            for name, pixels, error, angles in (("a", 100, 0.1, (1.0,)), ("b", 300, 0.5, (1.0, 20.0)))]  # fmt: skip
    record = results(Evaluation(ROOMS, {MODEL: rows}, []), "model", PROVENANCE)
    metrics = record["metrics"]
    assert (metrics["abs_rel"], metrics["abs_rel_macro"]) == pytest.approx((0.3, 0.3))
    assert metrics["abs_rel_micro"] == pytest.approx(0.4)
    assert (metrics["rra_15"], metrics["rra_15_micro"]) == pytest.approx((200 / 3, 200 / 3))
    assert metrics["rra_15_macro"] == pytest.approx(75)
    lines = table(record).splitlines()
    labels = [line.split("  ")[0] for line in lines]
    assert "AbsRel (micro)" in labels
    assert "RRA @ 15 deg, % (macro)" in labels
    assert not {"AbsRel (macro)", "RRA @ 15 deg, % (micro)", "delta < 1.25 (micro)"} & set(labels)


# ---------------------------------------------------------------------------------------------- protocols, views


def test_every_dataset_has_a_protocol_and_unknown_ones_are_refused() -> None:
    assert set(DATASETS) == {"rooms", "seven_scenes", "canonical", "images"}
    for dataset in DATASETS:
        assert find_protocol(dataset).dataset == dataset
    assert find_protocol("seven_scenes", "7scenes-proj").options == {"depth": "proj"}
    with pytest.raises(InputError, match="7scenes-proj-clean"):
        find_protocol("seven_scenes", "rooms-heldout-v1")


def test_a_changed_constant_changes_the_label() -> None:
    changed = ROOMS.changed(views=2, max_points=100)
    assert changed.label == "rooms-heldout-v1 (modified: views 2, max_points 100)"
    assert changed.views.count == 2
    assert ROOMS.changed() == ROOMS
    assert ROOMS.label == "rooms-heldout-v1"


@pytest.mark.parametrize(
    ("numbers", "rule", "expected"),
    [
        (range(1000), ViewRule(stride=200), [0, 200, 400, 600, 800]),
        (range(0, 700, 4), ViewRule(stride=40), list(range(0, 175, 10))),  # a recording stored with gaps
        ([15, 23, 31, 39, 47, 55], ViewRule(stride=40), [0, 5]),  # counted from the first
        (range(9), ViewRule(count=3), [0, 4, 8]),
        (range(9), ViewRule(stride=2, count=2), [0, 8]),
        (range(3), ViewRule(count=5), [0, 1, 2]),
        ([], ViewRule(stride=40), []),
    ],
)
def test_views_are_chosen_by_their_numbers(numbers, rule: ViewRule, expected: list[int]) -> None:
    assert choose_views(list(numbers), rule) == expected


def test_the_number_of_a_view_is_the_last_in_its_name() -> None:
    assert frame_numbers(["seq-07/frame-000000", "seq-07/frame-000040"]) == [0, 40]
    assert frame_numbers(["a", "b", "c"]) == [0, 1, 2]
    assert frame_numbers(["left 1", "right 1"]) == [0, 1]  # they do not ascend


def test_stored_frames_are_scored_perfectly_by_a_perfect_prediction() -> None:
    protocol = PROTOCOLS["7scenes-proj-clean"].changed(width=56)
    source = RoomFrames(9, 3)  # frames 0, 10, ..., 80: every 40th is a view
    systems = {MODEL: System(perfect_of_frames)}
    result = evaluate(frame_items(source, protocol), systems, protocol)
    assert [row.item for row in result.rows[MODEL]] == ["room-0", "room-1"]
    assert result.rows[MODEL][0].view_ids == tuple(f"seq-07/frame-{i:06d}" for i in (0, 40, 80))
    assert result.metrics(MODEL)["abs_rel"] < 1e-6
    assert result.metrics(MODEL)["normal_derived_mean_deg"] < 0.1
    assert result.metrics(MODEL)["rra_5"] == 100


def perfect_of_frames(sample: SceneSample):
    """Stored frames come without normals."""
    room = room_sample(sample.num_views)
    return perfect(SceneSample(**{**vars(sample), "normals": room.normals}))


def test_frames_are_stretched_to_the_width_of_the_protocol() -> None:
    (item,) = frame_items(RoomFrames(2), PROTOCOLS["canonical-v1"].changed(width=84))
    assert item.load().size == (56, 84)  # round(42 / 56 * 84 / 14) patches of 14, halves to even


def test_items_of_one_name_are_told_apart() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]
    assert file_name("chess/seq-03", ".png") == "chess_seq-03.png"


def test_a_scene_whose_facts_cannot_be_read_is_one_skipped_item() -> None:
    class Torn(RoomFrames):
        def facts(self, scene: int) -> SceneFacts:
            if scene == 1:
                raise InputError("cannot read  scene_meta.json", "not JSON", "")
            return super().facts(scene)

    protocol = PROTOCOLS["canonical-v1"].changed(width=56)
    result = evaluate(frame_items(Torn(2, 2, 2), protocol), {MODEL: System(perfect_of_frames)}, protocol)
    assert [row.item for row in result.rows[MODEL]] == ["room-0", "room-2"]
    assert [(skipped.item, skipped.reason[:32]) for skipped in result.skipped] == [
        ("scene-1", "data: cannot read scene_meta.jso")
    ]


def test_the_first_views_of_fixed_items() -> None:
    (item,) = first_views(room_items(1, num_views=4), 2)
    assert item.load().view_ids == ("view-0", "view-1")
    (item,) = first_views(room_items(1, num_views=4), None)
    assert item.load().num_views == 4


def test_slanted_surfaces_keep_their_normals() -> None:
    """At low resolution a slanted wall changes depth by more than a few percent from pixel to pixel."""
    sample = room_sample()
    row = score(perfect(sample), sample, ROOMS)
    assert row.normal_derived_pixels > 0.8 * row.valid_pixels
    assert not math.isnan(row.normal_derived_mean_deg)
