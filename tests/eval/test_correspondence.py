"""What eval/correspondence.py measures: perfect and meaningless features, baselines, the command and its files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.charts import HEIGHT, WIDTH, Series, line_chart
from eval.correspondence import DATASETS, main
from eval.correspondence_clips import DATASETS as KNOWN_DATASETS
from eval.correspondence_clips import OFFSETS, Points, find_clips, points_of
from eval.correspondence_pictures import pca_colours
from eval.correspondence_run import Outcome, best_layer, curves, kept, metrics, run_clips
from eval.correspondence_scores import (
    AFTER,
    ATTENTION,
    BEFORE,
    COLOUR,
    HIDDEN,
    IDENTITY,
    RANDOM,
    Key,
    Scored,
    by_chance,
    calibration,
    match_states,
    score,
    share_by_view,
    share_correct,
)
from eval.sources import evenly
from eval.student import HeadMaps, Seen, StockModel, open_model
from g2vlm.data.frames import SceneFacts
from g2vlm.errors import InputError
from g2vlm.stock.model import FAMILIES
from g2vlm.supervision.backbones import Taps
from geometry import apply_rigid, unproject
from geometry.correspondence import grid_pixels
from geometry.losses.features import pool_to_grid
from geometry.metrics.matching import match_metrics
from tests.g2vlm.stock_folders import stock_folder

SIDE, CELLS, VIEWS = 112, 8, 4
FILES = {"results.json", "items.jsonl", "report.md", "run.json", "pck.png", "confidence.png", "walk.png", "kept.png"}


def shuffled_points(seed: int = 0) -> tuple[Points, list[Tensor]]:
    """Points whose places in every other view are a permutation of the cells, and the permutations."""
    generator = torch.Generator().manual_seed(seed)
    centres = grid_pixels((SIDE, SIDE), (CELLS, CELLS))
    orders = [torch.randperm(CELLS**2, generator=generator) for _ in range(VIEWS - 1)]
    places = torch.stack([centres[order] for order in orders]).float()
    return Points((SIDE, SIDE), centres, places, torch.ones(VIEWS - 1, CELLS**2, dtype=torch.bool)), orders


def identities(orders: list[Tensor], heads: int) -> Tensor:
    """(T, h, w, heads, N): what tells each cell of the first view apart, put where it is in the others.

    The second half of the heads has it with the other sign, so that queries must meet the keys that they share.
    """
    one_hot = torch.eye(CELLS**2)
    moved = [one_hot[order.argsort()] for order in orders]  # the cell order[i] shows what cell i of the first shows
    states = torch.stack([one_hot, *moved]).unflatten(1, (CELLS, CELLS))
    signs = torch.ones(heads, 1)
    signs[(heads + 1) // 2 :] = -1
    return states[..., None, :] * signs


def images(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (VIEWS, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def scored_with(queries: Tensor, keys: Tensor, points: Points) -> Scored:
    hidden = queries[..., 0, :]
    seen = Seen({0: hidden}, {1: HeadMaps(queries, queries)}, {1: HeadMaps(keys, keys)})
    return score("made-up", seen, points, images())


def test_identities_moved_by_the_truth_are_all_matched() -> None:
    points, orders = shuffled_points()
    scored = scored_with(identities(orders, 4), identities(orders, 2), points)  # two queries share a key
    for key in (Key(AFTER, 1), Key(BEFORE, 1), Key(ATTENTION, 1), Key(HIDDEN, 0)):
        assert share_correct([scored], key, 2) == share_correct([scored], key, 1) == 100
    assert np.isnan(calibration([scored], Key(AFTER, 1)))  # all are right
    assert share_correct([scored], Key(IDENTITY), 1) < 20


def test_noise_is_at_chance() -> None:
    points, _ = shuffled_points()
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, VIEWS, CELLS, CELLS, 2, 32, generator=generator)
    scored = scored_with(queries, keys, points)
    chance = share_correct([scored], Key(RANDOM))
    assert 10 < chance < 25
    for series in (AFTER, ATTENTION):
        assert abs(share_correct([scored], Key(series, 1)) - chance) < 10
    assert abs(calibration([scored], Key(AFTER, 1))) < 0.25


def test_what_is_confident_when_right_correlates() -> None:
    points, orders = shuffled_points()
    states = identities(orders, 1).clone()
    states[0, :4] *= 20  # the upper half asks loudly for what is there, the lower half softly for something else
    states[0, 4:] = 0.1 * states[0, 4:].flip(1)
    assert calibration([scored_with(states, identities(orders, 1), points)], Key(AFTER, 1)) > 0.8


def test_invisible_points_do_not_count() -> None:
    points, orders = shuffled_points()
    points.visible[:, 32:] = False
    points.places[:, 48:] = torch.nan
    scored = scored_with(identities(orders, 1), identities(orders, 1), points)
    assert share_correct([scored], Key(AFTER, 1)) == 100
    assert np.isfinite(share_correct([scored], Key(RANDOM)))


def test_chance_is_the_share_of_cells_that_would_be_right() -> None:
    truth = np.random.default_rng(0).uniform(0, CELLS - 1, (VIEWS - 1, 5, 2))
    counted = np.zeros((VIEWS - 1, 5))
    for y in range(CELLS):
        for x in range(CELLS):
            everywhere = np.broadcast_to([x, y], truth.shape)
            counted += match_metrics(everywhere, truth, np.ones(truth.shape[:-1], bool), 2.0).correct
    assert by_chance(truth, (CELLS, CELLS), 2.0) == pytest.approx(counted / CELLS**2)


def test_colours_and_places_of_a_view_that_did_not_move() -> None:
    points, _ = shuffled_points()
    same = Points(points.size, points.queries, points.queries.float().expand(VIEWS - 1, -1, -1), points.visible)
    seen = Seen({0: torch.randn(VIEWS, CELLS, CELLS, 4)})
    still = score("still", seen, same, images()[:1].expand(VIEWS, -1, -1, -1))
    assert share_correct([still], Key(IDENTITY), 1) == share_correct([still], Key(COLOUR), 1) == 100


def test_world_points_find_each_other_across_a_room() -> None:
    """Renderer, tracks, cells and matching agree: features that are the place in the room are matched."""
    clip = find_clips("rooms", None, 1, 4, 0).clips[0]
    sample = clip.load(224)
    assert sample.depth is not None
    assert sample.intrinsics is not None
    assert sample.cam_to_world is not None
    places = apply_rigid(sample.cam_to_world, unproject(sample.depth, sample.intrinsics))  # (4, H, W, 3)
    waves = places @ torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 1.5
    states = pool_to_grid(torch.cat([waves.cos(), waves.sin()], -1), (8, 8))
    points = points_of(sample)
    found = match_states(states, points)
    truth = (points.places + 0.5) * 8 / 224 - 0.5
    right = (found.cells - truth).norm(dim=-1) <= 2
    assert right[points.visible].float().mean() > 0.95


def test_the_student_sees_what_it_is_shown() -> None:
    model = open_model(None, "cpu", None)
    views = find_clips("rooms", None, 1, 2, 0).clips[0].load(84).images
    taps = Taps(hidden=(0, 4), attention=(2,))
    shown = model.student(84).see(views, taps, with_expert=True)
    assert shown.hidden[4].shape == (2, 3, 3, 128)
    assert shown.queries[2].after_rotary.shape == (2, 3, 3, 4, 32)
    assert shown.expert[4].shape == (2, 6, 6, 128)
    assert model.student(112).see(torch.zeros(2, 3, 112, 112, dtype=torch.uint8), taps).hidden[0].shape[1:3] == (4, 4)
    blind = model.student(84, "off", blank=True)
    grey, other = blind.see(views, taps, with_expert=True), blind.see(255 - views, taps)
    assert not grey.expert
    assert torch.equal(grey.hidden[4], other.hidden[4])
    assert not torch.equal(model.student(84, "off").see(views, taps).hidden[4], shown.hidden[4])
    assert not torch.equal(model.untrained().student(84).see(views, taps).hidden[4], shown.hidden[4])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_student_sees_what_it_is_shown(family: str) -> None:
    model = open_model(str(stock_folder(family)), "cpu", None)
    views = find_clips("rooms", None, 1, 2, 0).clips[0].load(112).images
    taps = Taps(hidden=(0, 3), attention=(2,))
    student, side = model.student(112), 3 if family == "qwen3_vl" else 4
    shown = student.see(views, taps, with_expert=True)
    assert shown.hidden[3].shape == (2, side, side, 64)
    assert shown.queries[2].after_rotary.shape == (2, side, side, 4, 16)
    assert shown.keys[2].before_rotary.shape == (2, side, side, 2, 16)
    assert not shown.expert
    assert list(student.provenance["checkpoint"]["files"]) == ["model.safetensors"]
    assert not model.untrained().student(112).provenance["checkpoint"]["files"]
    first = student.see(views[:1], taps)
    assert torch.allclose(first.hidden[3][0], shown.hidden[3][0], atol=1e-4)  # views come in order, and see no later
    blind = model.student(112, blank=True)
    assert torch.equal(blind.see(views, taps).hidden[3], blind.see(255 - views, taps).hidden[3])
    assert not torch.equal(model.untrained().student(112).see(views, taps).hidden[3], shown.hidden[3])


@pytest.mark.parametrize("model", [None, "stock"])
def test_files_are_read_once_for_where_the_weights_come_from(
    model: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("g2vlm.provenance.sha256", lambda file: read.append(file) or "")
    opened = open_model(model and str(stock_folder()), "cpu", None)
    for size in (84, 112):
        assert opened.student(size).provenance["checkpoint"]["files"]
    assert len(read) == 1


def test_views_that_no_context_of_a_stock_model_holds_are_refused() -> None:
    model = open_model(str(stock_folder()), "cpu", None)
    assert isinstance(model, StockModel)
    model.model.config.get_text_config().max_position_embeddings = 40
    with pytest.raises(InputError, match="do not fit"):
        model.student(112).see(torch.zeros(2, 3, 112, 112, dtype=torch.uint8), Taps(hidden=(1,)))


def test_a_walk_is_scored_by_its_steps_whatever_its_length() -> None:
    points, orders = shuffled_points()
    whole = scored_with(identities(orders, 1), identities(orders, 1), points)
    short = Points(points.size, points.queries, points.places[:1], points.visible[:1])
    states = torch.randn(2, CELLS, CELLS, 1, 8, generator=torch.Generator().manual_seed(0))
    part = score("short", Seen({0: states[..., 0, :]}, {1: HeadMaps(states, states)}, {1: HeadMaps(states, states)}),
                 short, images()[:2])  # fmt: skip
    by_view = share_by_view([whole, part], Key(AFTER, 1))
    assert len(by_view) == VIEWS - 1
    assert 50 <= by_view[0] < 80
    assert by_view[1:].tolist() == [100, 100]
    lasting = kept(curves(Outcome([whole], [])), (2, 9))
    assert lasting[f"kept/{AFTER}/1/2"] == 100
    assert f"kept/{AFTER}/1/9" not in lasting


def test_the_best_layer_is_that_of_the_largest_share() -> None:
    values = {"pck2/hidden/0": 20.0, "pck2/hidden/11": 60.0, "pck2/hidden/2": 40.0, "pck1/hidden/3": 90.0}
    assert best_layer(values, HIDDEN) == 11
    assert best_layer(values, AFTER) is None
    assert metrics(Outcome([], [])) == {}


def test_colours_of_features_mean_the_same_in_every_view() -> None:
    states = torch.randn(1, 5, 6, 16, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    states[1] = states[1].flip(0)
    colours = pca_colours(states)
    assert colours.shape == (3, 5, 6, 3)
    assert colours.dtype == np.uint8
    assert np.array_equal(colours[0], colours[2])
    assert np.array_equal(colours[0], colours[1][::-1])
    assert np.ptp(colours[0].reshape(-1, 3), axis=0).min() > 200
    assert np.ptp(pca_colours(torch.ones(2, 3, 3, 8))) == 0


def test_long_legends_get_rows_of_their_own_and_negative_values_a_place() -> None:
    lines = [Series(f"a rather long name {i}", np.array([(0, -1.0), (4, 1.0)]), (220, 0, 0)) for i in range(7)]
    picture = np.asarray(line_chart("title", "layer", lines, (-1, 1))).astype(int)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    rows = np.nonzero((np.abs(picture - (220, 0, 0)).max(-1) < 40)[:, 70:920].any(1))[0]
    assert rows.max() > HEIGHT - 70  # -1 is at the bottom


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_numbers_charts_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    code, out, _ = run(
        capsys, "--clips", 2, "--views", 3, "--paths", 1, "--size", 112, "--pictures", 1, "-o", output
    )  # fmt: skip
    assert code == 0
    assert FILES | {"pictures"} == {path.name for path in output.iterdir()}
    assert "random cell" in out
    assert "MODIFIED" in out
    record = json.loads((output / "results.json").read_text())
    assert {"benchmark", "protocol", "model", "count", "skipped", "metrics", "baselines", "per_item"} <= set(record)
    assert record["count"] == 2
    assert record["protocol"]["grids"] == {"112": [4, 4], "84": [3, 3]}
    assert record["protocol"]["modified"] == {"clips": 2, "views": 3, "paths": 1, "size": 112}
    values = record["metrics"]
    assert all(isinstance(value, int | float | None) for value in values.values())
    for series, layers in ((AFTER, range(1, 5)), (BEFORE, range(1, 5)), (HIDDEN, range(5))):
        assert all(0 <= values[f"{prefix}pck2/{series}/{n}"] <= 100 for n in layers for prefix in ("", "trained_size/"))
    assert set(record["baselines"]) == {IDENTITY, RANDOM, COLOUR}
    assert record["curves"]["offsets"] == [*range(1, OFFSETS + 1)]
    lines = [json.loads(line) for line in (output / record["per_item"]).read_text().splitlines()]
    assert [(line["kind"], line["size"]) for line in lines] == [("clip", 112)] * 2 + [("clip", 84)] * 2 + [
        ("walk", 112)
    ]
    for path in [*output.glob("*.png"), *(output / "pictures").iterdir()]:
        with Image.open(path) as picture:
            assert picture.width >= WIDTH


class Broken:
    """Recordings: one whose metadata cannot be read, and one without frames."""

    def __len__(self) -> int:
        return 2

    def facts(self, scene: int) -> SceneFacts:
        if scene == 0:
            raise InputError("damaged metadata")
        return SceneFacts("empty", "canonical")

    def frame_names(self, scene: int) -> list[str]:
        self.facts(scene)
        return []


def test_broken_recordings_are_skipped_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eval.correspondence_clips.CanonicalSource", lambda folder: Broken())
    found = find_clips("canonical", tmp_path, 2, 8, 1)
    assert [clip.name for clip in found.clips] == ["scene-0", "empty"]
    outcome = run_clips(open_model(None, "cpu", None).student(84), found.clips, 84, 84)
    assert ["damaged metadata" in outcome.skipped[0].reason, "no view" in outcome.skipped[1].reason] == [True, True]


def test_few_are_chosen_evenly() -> None:
    assert [evenly(range(9), count) for count in (-1, 0, 1, 3, 20)] == [[], [], [0], [0, 4, 8], [*range(9)]]
    assert evenly([], 3) == []


def test_the_command_on_a_stock_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ("--clips", 1, "--views", 2, "--paths", 1, "--size", 112, "--pictures", -1)
    code, out, _ = run(capsys, "--model", stock_folder(), *flags, "-o", tmp_path / "out")
    assert code == 0
    assert "geometric expert" not in out.split("PCK@2:")[0]
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["protocol"]["grids"] == {"112": [4, 4]}
    assert {f"pck2/{series}/3" for series in (AFTER, BEFORE, HIDDEN)} <= set(record["metrics"])


WRONG = (("--size", 100), ("--views", 1), ("--clips", 0), ("--paths", -1), ("--data", "x"), ("--dataset", "canonical"))


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_measured_is_refused(
    wrong: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, out, err = run(capsys, *wrong, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "fix:" in err
    assert not (tmp_path / "out").exists()


def test_the_parser_offers_what_there_is() -> None:
    assert DATASETS == KNOWN_DATASETS
