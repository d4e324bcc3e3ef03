"""The table and curves of the ablations, from what training and evaluation write."""

import json
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.ablations import main, run_folder
from benchmarks.experiments import EXPERIMENTS
from train.config import parse

ROOT = Path(__file__).resolve().parents[2]
STAGE1 = EXPERIMENTS["stage1"]


def finished(output: Path, name: str) -> Path:
    """Two finished seeds of every config: AbsRel 0.1, 0.3; validation losses 4, 2."""
    experiment = EXPERIMENTS[name]
    for name in experiment.configs:
        for seed in range(2):
            folder = run_folder(output, name, seed)
            (folder / "training/model").mkdir(parents=True)
            for score in experiment.scores:
                (folder / score).mkdir()
                names = [column.metric for column in experiment.columns.values() if column.folder == score]
                metrics = dict.fromkeys(names, 0.1 + 0.2 * seed)
                results = {"metrics": metrics, "baselines": {"constant depth": {"abs_rel": 0.4}}}
                (folder / score / "results.json").write_text(json.dumps(results))
            losses = [{"kind": "validation", "step": 10 * i, "loss": 6 - 2 * i, "language": 2 - i} for i in (1, 2)]
            lines = [{"kind": "step", "step": 1, "loss": 9.0}, *losses]
            (folder / "training/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return output


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return finished(tmp_path, "stage1")


def test_finished_runs_are_only_told(output: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(ablations.subprocess, "run", lambda *_, **__: pytest.fail("nothing is left to run"))
    main(["stage1", "--output", str(output), "--seeds", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| global | 0.2000 +- 0.1414 |")
    names = [row.split(" |")[0].removeprefix("| ") for row in rows[2:7]]
    assert names == [*STAGE1.configs, "(constant depth)"]
    assert "| 0.4000 | - |" in rows[6]
    assert (output / "table.md").read_text().startswith("|  | AbsRel |")
    assert (output / "curves.png").stat().st_size > 1000
    losses = ablations.validation_losses(run_folder(output, "mixed", 1) / "training/log.jsonl")
    assert losses.tolist() == [[10, 4], [20, 2]]


def test_what_is_missing_is_trained_and_scored_with_its_seed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run_folder(output, "single encoder", 1) / "scores/results.json"
    text = scores.read_text()
    scores.unlink()
    (scores.parent / "poses.csv").touch()
    commands = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command[1:])
        if command[1] == "eval/recon.py":
            scores.parent.mkdir()
            scores.write_text(text)

    (run_folder(output, "single encoder", 1) / "training/model").rmdir()
    monkeypatch.setattr(ablations.subprocess, "run", run)
    main(["stage1", "--output", str(output), "--seeds", "2", "--", "--runtime.steps", "7"])
    (train, score) = commands
    assert train[:4] == ["-m", "train.run", "--config", "configs/ablations/single_encoder.yaml"]
    assert train[train.index("--runtime.seed") + 1] == "1"
    assert train[train.index("--runtime.steps") + 1] == "7"
    assert score[0] == "eval/recon.py"
    assert score[score.index("--model") + 1].endswith("single_encoder-1/training/model")


def test_joint_training_is_told_with_all_its_scores(tmp_path: Path, capsys) -> None:
    """Each column from the folder that it belongs to; a baseline only where it is known."""
    output = finished(tmp_path, "joint")
    for seed in range(2):
        file = run_folder(output, "CE + CE", seed) / "shuffled/results.json"
        file.write_text(json.dumps({"metrics": {"macro": 30.0}, "baselines": {"random": {"macro": 32.0}}}))
    main(["joint", "--output", str(output), "--seeds", "2"])
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:9]]
    assert rows[1][1:4] == ["0.2 +- 0.1", "0.2 +- 0.1", "30.0 +- 0.0"]
    assert rows[5][0] == "| (constant depth)"
    assert rows[5][1:4] == ["-", "-", "-"]
    assert "0.4000" in rows[5]


def test_the_curve_of_joint_training_is_that_of_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategies' sums of losses do not compare: one of them has the geometry loss in it."""
    drawn = []
    monkeypatch.setattr(ablations, "line_chart", lambda title, label, lines: drawn.extend([title, *lines]))
    ablations.curves(EXPERIMENTS["joint"], finished(tmp_path, "joint"), 2)
    title, *lines = drawn
    assert "language" in title
    assert [line.points.tolist() for line in lines] == [[[10, 1], [20, 0]]] * 5


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_is_a_run(name: str) -> None:
    for configs in EXPERIMENTS[name].configs.values():
        config, _ = parse([part for config in configs for part in ("--config", str(ROOT / config))])
        assert config.trainable, configs
