"""What eval/probe.py measures: features that hold depth, features that do not, bins of answers, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.benchmarks import find_benchmark
from eval.probe import main
from eval.probe_commands import short_name
from eval.probe_data import Features
from eval.probe_report import models_table
from eval.probe_scores import bins, constant_depth, rank_correlation, score_room, score_rooms, summary
from eval.probe_training import ProbeConfig, share_of_lr, train_probe
from g2vlm.checkpoint import DEMO_WEIGHTS
from geometry.metrics.depth import depth_metrics
from tests.g2vlm.stock_folders import stock_folder

SIDE, CELLS, WIDTH = 12, 3, 16
CONFIG = ProbeConfig(steps=80, batch=30, channels=8, lr=1e-2)
SMALL = ("--steps", 2, "--rooms", 2, "--channels", 8, "--size", 56, "--pictures", 1)


def features(seed: int, informed: bool) -> Features:
    """Rooms of two frames whose cells have one depth each, which the layers hold, or noise instead."""
    generator = torch.Generator().manual_seed(seed)
    rooms = torch.arange(60).repeat_interleave(2)
    typical = 1.5 + 2.5 * torch.rand(60, 1, 1, generator=generator)
    cells = typical[rooms] * (0.7 + 0.6 * torch.rand(120, CELLS, CELLS, generator=generator))
    depth = cells.repeat_interleave(SIDE // CELLS, 1).repeat_interleave(SIDE // CELLS, 2)
    names = tuple(f"room-{number}" for number in range(60))
    layers = [_told(cells) if informed else torch.randn(120, CELLS, CELLS, WIDTH, generator=generator)] * 4
    return Features(names, rooms, tuple(layers), depth, torch.ones_like(depth, dtype=torch.bool))


def _told(cells: Tensor) -> Tensor:
    """Depth as waves, whose length a LayerNorm does not change."""
    waves = cells.log()[..., None] * torch.linspace(0.5, 3, WIDTH // 2)
    return torch.cat([waves.cos(), waves.sin()], -1)


@pytest.mark.parametrize(("informed", "worst", "best"), [(True, 0.5, 0.0), (False, 9.0, 1.0)])
def test_a_probe_reads_what_is_there_and_nothing_else(informed: bool, worst: float, best: float) -> None:
    held_out = features(1, informed)
    probe = train_probe(features(0, informed), CONFIG)
    rmse = summary(score_rooms(probe.predict(held_out), held_out))["rmse"]
    constant = summary(constant_depth(held_out))["rmse"]
    assert best < rmse / constant < worst


def test_a_probe_depends_on_its_seed_alone() -> None:
    few = ProbeConfig(steps=3, channels=8)
    state = torch.random.get_rng_state()
    first, second = (train_probe(features(0, True), few) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.curve == second.curve
    assert torch.equal(first.predict(features(1, True)), second.predict(features(1, True)))
    assert share_of_lr(0, 100) < share_of_lr(4, 100) == 1.0
    assert share_of_lr(99, 100) < 0.01


def test_invalid_pixels_neither_teach_nor_count() -> None:
    spoiled = features(0, True)
    spoiled.valid[:, :4] = False
    spoiled.depth[:, :4] = torch.nan
    probe = train_probe(spoiled, ProbeConfig(steps=3, channels=8))
    assert all(np.isfinite(error) for _, error in probe.curve)
    scores = score_rooms(probe.predict(spoiled), spoiled)
    assert all(np.isfinite(room.rmse) for room in scores)
    assert scores[0].pixels == 2 * SIDE * (SIDE - 4)


def test_scores_are_those_of_depth_metrics() -> None:
    generator = np.random.default_rng(0)
    truth, guess = generator.uniform(1, 4, 50), generator.uniform(1, 4, 50)
    known, own = depth_metrics(guess, truth), score_room("a", guess, truth)
    assert own.rmse == pytest.approx(known.rmse)
    assert own.abs_rel == pytest.approx(known.abs_rel)
    assert own.abs_rel_scaled <= own.abs_rel
    assert score_room("a", 3 * truth, truth).abs_rel_scaled == pytest.approx(0)


def test_rmse_is_over_all_pixels_and_abs_rel_over_rooms() -> None:
    flat = [score_room("a", np.full(3, 2.0), np.full(3, 1.0)), score_room("b", np.full(1, 4.0), np.full(1, 1.0))]
    assert summary(flat) == pytest.approx({"rmse": 3**0.5, "abs_rel": 2.0, "abs_rel_scaled": 0.0})


def test_bins_begin_with_the_worst_rooms() -> None:
    errors = np.array([0.1, 0.9, 0.5, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6])
    found = bins(errors, 1 - errors)
    assert [one.count for one in found] == [3, 2, 2, 2]
    assert [one.rmse for one in found] == pytest.approx([0.8, 0.55, 0.35, 0.15])
    assert [one.accuracy for one in found] == pytest.approx([20, 45, 65, 85])
    assert len(bins(errors[:2], errors[:2])) == 2


def test_rank_correlation() -> None:
    assert rank_correlation([0.5, 0.7, 0.9], [60, 50, 40]) == pytest.approx(-1)
    assert rank_correlation([0.5, 0.7, 0.9], [50, 60, 40]) == pytest.approx(-0.5)
    assert np.isnan(rank_correlation([0.5, 0.7], [60, 50]))
    assert np.isnan(rank_correlation([0.5, 0.7, 0.9], [60, 60, 60]))


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_numbers_charts_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    code, out, _ = run(capsys, *SMALL, "--limit", 2, "-o", output)
    assert code == 0
    found = {path.name for path in output.iterdir()}
    assert found == {"results.json", "items.jsonl", "report.md", "run.json", "training.png", "pictures"}
    record = json.loads((output / "results.json").read_text())
    assert {"benchmark", "protocol", "model", "count", "skipped", "metrics", "baselines", "per_item"} <= set(record)
    assert set(record["baselines"]) == {"constant depth", "untrained", "grey images"}
    for values in (record["metrics"], *record["baselines"].values()):
        assert set(values) == {"rmse", "abs_rel", "abs_rel_scaled"}
        assert all(value > 0 for value in values.values())
    assert record["protocol"]["layers"] == [1, 2, 3, 4]
    assert record["protocol"]["depth_size"] == 28
    lines = [json.loads(line) for line in (output / record["per_item"]).read_text().splitlines()]
    assert [line["system"] for line in lines] == ["model"] * 2 + ["untrained"] * 2 + ["grey images"] * 2
    assert "RMSE, m" in out
    for path in [*output.glob("*.png"), *(output / "pictures").iterdir()]:
        with Image.open(path) as picture:
            assert picture.width >= 900


def earlier_run(folder: Path, limit: int) -> Path:
    """A folder as eval/vqa.py writes it: every second answer is right."""
    folder.mkdir()
    benchmark = find_benchmark("rooms_qa")
    record = {"protocol": {"questions_sha256": benchmark.digest, "name": benchmark.name}}
    (folder / "results.json").write_text(json.dumps(record))
    lines = [json.dumps({"id": q.id, "score": i % 2}) for i, q in enumerate(benchmark.questions()[:limit])]
    (folder / "items.jsonl").write_text("\n".join(lines))
    return folder


def test_several_models_with_their_answers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, answers = tmp_path / "out", [earlier_run(tmp_path / name, 12) for name in "ab"]
    code, out, _ = run(
        capsys, *SMALL, "--models", DEMO_WEIGHTS, DEMO_WEIGHTS, "--layers", 0, 1, 1, 4, "--benchmark", "rooms_qa",
        "--limit", 12, "--no-baselines", "--answers", *answers, "-o", output,
    )  # fmt: skip
    assert code == 0
    assert "Spearman" in out
    record = json.loads((output / "results.json").read_text())
    assert list(record["models"]) == ["demo", "demo-2"]
    first, second = (own["metrics"] for own in record["models"].values())
    assert first == second
    assert first["answers"] == 50
    assert sum(first[f"bin_count/{number}"] for number in range(1, 5)) == 12
    assert record["metrics"] == {"spearman": None}
    assert (output / "models.png").is_file()
    assert (output / "demo-2" / "bins.png").is_file()


def test_models_are_called_as_their_runs() -> None:
    assert [*map(short_name, ("runs/a/model", "runs/b/model/", "owner/name", None, "model"))] == [
        "a", "b", "name", "demo", "model",
    ]  # fmt: skip


def test_models_that_saw_other_sizes_are_not_compared_in_silence() -> None:
    own = {"metrics": {"rmse": 1.0, "abs_rel": 1.0, "abs_rel_scaled": 1.0}}
    models = {str(size): {**own, "protocol": {"size": size}} for size in (84, 112)}
    record = {"benchmark": "b", "protocol": {"about": "a"}, "metrics": {}, "models": models}
    assert "NOT COMPARABLE: views of different sizes (84 84 px, 112 112 px)" in models_table(record)
    models["84"]["protocol"]["size"] = 112
    assert "NOT COMPARABLE" not in models_table(record)


def test_a_model_is_asked_where_no_answers_are_given(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out"
    code, _, _ = run(capsys, *SMALL, "--benchmark", "rooms_qa", "--limit", 5, "--no-baselines", "-o", output)
    assert code == 0
    values = json.loads((output / "results.json").read_text())["metrics"]
    assert 0 <= values["answers"] <= 100


def test_a_stock_model_is_probed_and_asked_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, _, _ = run(capsys, *SMALL, "--limit", 1, "--model", stock_folder(), "-o", tmp_path / "out")
    assert code == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(record["baselines"]) == {"constant depth", "untrained", "grey images"}
    assert record["protocol"]["layers"] == [1, 2, 2, 3]
    flags = (*SMALL, "--model", stock_folder(), "--benchmark", "rooms_qa", "--limit", 5)
    code, _, err = run(capsys, *flags, "-o", tmp_path / "asked")
    assert code == 2
    assert "--answers" in err
    assert not (tmp_path / "asked" / "items.jsonl").exists()  # before anything is probed


@pytest.mark.parametrize(
    "wrong",
    [
        ("--size", 50), ("--layers", 0, 1, 2, 9), ("--steps", 0), ("--channels", 12), ("--answers", "x"),
        ("--benchmark", "absent"), ("--model", "tiny", "--models", "tiny"),
        ("--benchmark", "rooms_qa", "--answers", "x", "y"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_refused(
    wrong: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code, out, err = run(capsys, *wrong, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "fix:" in err
    assert not (tmp_path / "out" / "results.json").exists()
