"""From items to files: failures are counted, results keep their schema, views are those of the protocol."""

import json
import math

import pytest
import torch

from eval.baselines import IDENTITY, identity_pose
from eval.evaluate import MODEL, Evaluation, evaluate
from eval.protocols import DATASETS, PROTOCOLS, ViewRule, find_protocol
from eval.report import item_lines, markdown, results, table, write
from eval.scoring import Row, score
from eval.sources import Item, choose_views, first_views, frame_items, frame_numbers
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed, InputError, ResourceError
from tests.eval.samples import RoomFrames, perfect, room_items, room_sample

ROOMS = PROTOCOLS["rooms-heldout-v1"]


def exact(sample: SceneSample) -> Row:
    return score(perfect(sample), sample, ROOMS)


def identity(sample: SceneSample) -> Row:
    return identity_pose(sample, ROOMS)


def broken_item(name: str) -> Item:
    def load() -> SceneSample:
        raise InputError(f"cannot read  {name}/depth.png", "file ends early", "replace it")

    return Item(name, load)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    items = [*room_items(2), broken_item("torn")]
    return evaluate(items, {MODEL: exact, IDENTITY: identity}, ROOMS)


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
    def fails_on_second(sample: SceneSample) -> Row:
        if sample.scene == "room-1":
            raise CheckFailed("predicted values are not finite")
        return identity(sample)

    result = evaluate(room_items(3), {MODEL: exact, "other": fails_on_second}, ROOMS)
    assert {name: [row.item for row in rows] for name, rows in result.rows.items()} == {
        MODEL: ["room-0", "room-2"],
        "other": ["room-0", "room-2"],
    }
    assert result.skipped[0].reason.startswith("other: ")


def test_nothing_scored_is_a_failure() -> None:
    with pytest.raises(CheckFailed, match="no scene could be scored"):
        evaluate([broken_item("torn")], {MODEL: exact}, ROOMS)
    with pytest.raises(CheckFailed, match="there is no scene"):
        evaluate([], {MODEL: exact}, ROOMS)


def test_memory_that_runs_out_stops_the_evaluation() -> None:
    def hungry(sample: SceneSample) -> Row:
        raise torch.OutOfMemoryError("tried to allocate 96 GiB")

    with pytest.raises(ResourceError, match="not enough memory"):
        evaluate(room_items(1), {MODEL: hungry}, ROOMS)


def test_a_bug_is_not_taken_for_a_bad_item() -> None:
    def wrong(sample: SceneSample) -> Row:
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        evaluate(room_items(1), {MODEL: wrong}, ROOMS)


def test_results_have_the_agreed_schema(evaluation: Evaluation, tmp_path) -> None:
    write(tmp_path, results(evaluation, "perfect"), item_lines(evaluation), "cpu")
    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(record) == [
        "benchmark", "protocol", "model", "count", "skipped", "metrics", "baselines", "per_item",
    ]  # fmt: skip
    assert (record["benchmark"], record["model"], record["count"]) == ("rooms-heldout-v1", "perfect", 2)
    assert set(record["skipped"][0]) == {"item", "reason"}
    assert set(record["baselines"]) == {IDENTITY}
    assert all(isinstance(value, int | float) for value in record["metrics"].values())
    assert record["protocol"]["depth"]["alignment"] == "l1_scale"
    assert json.loads((tmp_path / "run.json").read_text())["packages"]["torch"]


def test_lines_per_item_hold_what_the_metrics_are_made_of(evaluation: Evaluation, tmp_path) -> None:
    write(tmp_path, results(evaluation, "perfect"), item_lines(evaluation), "cpu")
    text = (tmp_path / "items.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(line["system"], line["item"]) for line in lines] == [
        (MODEL, "room-0"), (MODEL, "room-1"), (IDENTITY, "room-0"), (IDENTITY, "room-1"),
    ]  # fmt: skip
    pooled = sorted(angle for line in lines[2:] for angle in line["rotation_deg"])
    assert (pooled[2] + pooled[3]) / 2 == pytest.approx(evaluation.metrics(IDENTITY)["rotation_median_deg"])
    assert lines[2]["abs_rel"] is None  # not scored


def test_the_table_names_protocol_counts_baselines_and_skips(evaluation: Evaluation) -> None:
    record = results(evaluation, "perfect")
    for text in (table(record), markdown(record)):
        assert "rooms-heldout-v1" in text
        assert "2 scenes, 1 skipped, 6 pairs of views" in text
        assert "skipped torn: data: cannot read" in text
        (line,) = [line for line in text.splitlines() if "RRA @ 15" in line]
        assert "100.00" in line
        (line,) = [line for line in text.splitlines() if "AbsRel" in line]
        assert line.rstrip(" |").endswith("-")  # identity poses have no depth


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
    systems = {MODEL: lambda sample: score(perfect_of_frames(sample), sample, protocol)}
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


def test_the_first_views_of_fixed_items() -> None:
    (item,) = first_views(room_items(1, num_views=4), 2)
    assert item.load().view_ids == ("view-0", "view-1")
    (item,) = first_views(room_items(1, num_views=4), None)
    assert item.load().num_views == 4


def test_slanted_surfaces_keep_their_normals() -> None:
    """At low resolution a slanted wall changes depth by more than a few percent from pixel to pixel."""
    sample = room_sample()
    row = exact(sample)
    assert row.normal_derived_pixels > 0.8 * row.valid_pixels
    assert not math.isnan(row.normal_derived_mean_deg)
