"""The table and curves of the ablations, from what training and evaluation write."""

import json
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.ablations import CONFIGS, METRICS, main, run_folder

METRIC_NAMES = [key for key, _ in METRICS.values()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Two finished seeds of every config: AbsRel 0.1, 0.3; validation losses 4, 2."""
    for name in CONFIGS:
        for seed in range(2):
            folder = run_folder(tmp_path, name, seed)
            (folder / "scores").mkdir(parents=True)
            (folder / "stage1").mkdir()
            metrics = dict.fromkeys(METRIC_NAMES, 0.1 + 0.2 * seed)
            results = {"metrics": metrics, "baselines": {"constant depth": {"abs_rel": 0.4}}}
            (folder / "scores/results.json").write_text(json.dumps(results))
            losses = [{"kind": "validation", "step": 10 * i, "loss": 6 - 2 * i} for i in (1, 2)]
            lines = [{"kind": "step", "step": 1, "loss": 9.0}, *losses]
            (folder / "stage1/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_finished_runs_are_only_told(output: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(ablations.subprocess, "run", lambda *_, **__: pytest.fail("nothing is left to run"))
    main(["--output", str(output), "--seeds", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| global | 0.2000 +- 0.1414 |")
    assert [row.split(" |")[0] for row in rows[2:7]] == [*(f"| {name}" for name in CONFIGS), "| (constant depth)"]
    assert "| 0.4000 | - |" in rows[6]
    assert (output / "table.md").read_text().startswith("|  | AbsRel |")
    assert (output / "curves.png").stat().st_size > 1000
    losses = ablations.validation_losses(run_folder(output, "mixed", 1) / "stage1/log.jsonl")
    assert losses.tolist() == [[10, 4], [20, 2]]


def test_what_is_missing_is_trained_and_scored_with_its_seed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = run_folder(output, "single encoder", 1) / "scores/results.json"
    text = scores.read_text()
    scores.unlink()
    commands = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command[1:])
        scores.write_text(text)

    monkeypatch.setattr(ablations.subprocess, "run", run)
    main(["--output", str(output), "--seeds", "2", "--", "--runtime.steps", "7"])
    (train, score) = commands
    assert train[:4] == ["-m", "train.run", "--config", "configs/ablations/single_encoder.yaml"]
    assert train[train.index("--runtime.seed") + 1] == "1"
    assert train[train.index("--runtime.steps") + 1] == "7"
    assert score[0] == "eval/recon.py"
    assert score[score.index("--model") + 1].endswith("single_encoder-1/stage1/model")
