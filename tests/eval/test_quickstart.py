"""The report of make quickstart, from the files that training and evaluation write."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.baselines import CONSTANT, CONSTANT_PARTS, IDENTITY, UNTRAINED, System, constant_depth, identity_pose
from eval.evaluate import MODEL, evaluate
from eval.gate import judged
from eval.protocols import PROTOCOLS
from eval.quickstart import main
from eval.report import results, write
from tests.eval.samples import perfect, room_items
from train.config import RunConfig
from train.engine import Engine
from train.log import RunLog, write_run

ROOMS = PROTOCOLS["rooms-heldout-v1"]


@pytest.fixture(scope="module")
def record() -> dict:
    """Scores of a perfect model beside the baselines."""
    systems: dict[str, System] = {
        MODEL: System(perfect),
        CONSTANT: System(lambda sample: constant_depth(sample, ROOMS), CONSTANT_PARTS),
        IDENTITY: System(identity_pose, ("poses",)),
        UNTRAINED: System(lambda sample: constant_depth(sample, ROOMS), CONSTANT_PARTS),
    }
    return results(evaluate(room_items(2), systems, ROOMS), "a model", {"checkpoint": {"files": {}}, "commit": None})


@pytest.fixture
def folder(tmp_path: Path, record: dict) -> Path:
    """What train/ and eval/recon.py leave: two training steps, two validations, two pictured rooms."""
    stage1 = tmp_path / "stage1"
    (stage1 / "validation").mkdir(parents=True)
    write_run(stage1, RunConfig(), ["python", "-m", "train.run", "--optim.lr", "1e-4"], Engine(torch.device("cpu")))
    log = RunLog(stage1)
    for step, scenes in ((1, 3), (2, 4)):
        log.step(step, {"loss": 3.0 / step, "scenes": scenes, "views": 12 // scenes})
        log.validation(step, {"loss": 3.5 / step})
        log.speed(step, {"steps_per_second": 0.02})
        Image.new("RGB", (8, 8)).save(stage1 / "validation" / f"step-{step:08d}.png")
    for name, gate in (("trained", {"gate": judged(record, 0.8)}), ("demo", {})):
        (tmp_path / name / "pictures").mkdir(parents=True)
        write(tmp_path / name, {**record, **gate}, "cpu")
        for room in ("heldout-00", "heldout-09"):
            for kind in ("", ".truth"):
                Image.new("RGB", (8, 8)).save(tmp_path / name / "pictures" / f"{room}{kind}.png")
    return tmp_path


def test_a_passed_gate(folder: Path, record: dict, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    columns = r"trained here +demo weights +untrained +constant depth +identity pose\n"
    assert re.match(rf"rooms-heldout-v1\n\n +better +{columns}AbsRel +lower +0\.0000 ", out)
    constant, identity = record["baselines"][CONSTANT], record["baselines"][IDENTITY]
    assert f"gate passed: AbsRel 0.0000 is 0.00 times the best constant depth's {constant['abs_rel']:.4f}" in out
    assert f"identity pose {identity['rotation_median_deg']:.1f}; within 15 degrees 100.0 %" in out
    assert out.endswith(f"report in {folder / 'report.md'}\n")


def test_the_report_says_what_was_run_and_shows_it(folder: Path) -> None:
    main([str(folder)])
    text = (folder / "report.md").read_text()
    assert "**gate passed" in text
    for row in ("| steps | 2 |", "| images seen | 24,", "| time | 1 min 40 s on cpu", "--optim.lr 1e-4`", "torch "):
        assert row in text
    assert "| after step 1 | after step 2 |" in text
    linked = set(re.findall(r'(?:src="|\]\()([^")]+\.png)', text))
    assert {"losses.png", "trained/pictures/heldout-09.truth.png", "demo/pictures/heldout-09.png"} <= linked
    assert "stage1/validation/step-00000002.png" in linked
    assert all((folder / path).is_file() for path in linked)
    assert f"--model {folder}/stage1/model" in text


def test_a_missed_gate_still_leaves_a_report(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "trained" / "results.json"
    record = json.loads(path.read_text())
    record["metrics"]["abs_rel"] = 0.9 * record["baselines"][CONSTANT]["abs_rel"]
    path.write_text(json.dumps({**record, "gate": judged(record, 0.8)}))
    assert main([str(folder)]) == 1
    captured = capsys.readouterr()
    assert "gate MISSED: " in captured.out
    assert "is 0.90 times" in captured.out
    assert "asked for at most 0.8 times" in captured.err
    assert "**gate MISSED" in (folder / "report.md").read_text()


@pytest.mark.parametrize("file", ["stage1/run.json", "stage1/log.jsonl", "trained/results.json", "demo/results.json"])
def test_a_missing_or_damaged_part_is_named(file: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    for damage in (lambda: (folder / file).write_text("{"), (folder / file).unlink):
        damage()
        assert main([str(folder)]) == 2
        assert file in capsys.readouterr().err
    assert not (folder / "report.md").exists()


def test_scores_without_a_gate_are_refused(folder: Path, record: dict, capsys: pytest.CaptureFixture) -> None:
    write(folder / "trained", record, "cpu")
    assert main([str(folder)]) == 2
    assert "--gate" in capsys.readouterr().err
