"""The command `python eval/vqa.py`: flags in, table, files and exit codes out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import benchmarks
from eval.benchmarks import BENCHMARKS
from eval.qa_scoring import aggregate, score_reply
from eval.vqa import main
from eval.vqa_gate import judged, require_passed
from g2vlm.data.qa import heldout_v1
from g2vlm.errors import CheckFailed, InputError
from tests.eval.vqa_scenes import QUESTIONS, TRAINING, benchmark

FILES = {"results.json", "items.jsonl", "report.md", "run.json", "transcript.md", "transcript.png"}


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHMARKS, "made_up", benchmark())


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def made(output: Path, *arguments: object) -> list[object]:
    return ["--model", "tiny", "--benchmark", "made_up", "-o", output, *arguments]


def test_files_table_and_metrics_agree(tmp_path: Path, capsys, caplog) -> None:
    output = tmp_path / "out"
    code, out, _ = run(capsys, *made(output, "--pictures", 3))
    assert code == 0
    assert {path.name for path in output.iterdir()} == FILES
    assert out.startswith("made-up\n")
    assert "24 questions, 0 skipped; 2 views of 84 x 84; geometry on, images shown" in out
    assert "RANDOM WEIGHTS" in out
    assert "never trained" in caplog.text
    record = json.loads((output / "results.json").read_text())
    assert set(record["baselines"]) == set(record["leads"]) == {"random", "majority", "by categories", "by set"}
    assert record["count"] == len(QUESTIONS)
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [question.id for question in QUESTIONS]
    assert [line["prompt"] for line in lines] == [question.words for question in QUESTIONS]
    assert [line["score"] for line in lines] == [score_reply(q["kind"], q["reply"], q["answer"]) for q in lines]
    by_name = {"metrics": [line["score"] for line in lines]}
    by_name |= {name: [line["baselines"][name] for line in lines] for name in record["baselines"]}
    for name, scores in by_name.items():
        kept = record["metrics"] if name == "metrics" else record["baselines"][name]
        again = aggregate([line["task"] for line in lines], np.array(scores))
        assert kept["macro"] == pytest.approx(again.macro)
        assert {f"task/{task}": value for task, value in again.tasks.items()} == {
            key: value for key, value in kept.items() if key.startswith("task/")
        }
    told = next(line.split() for line in out.splitlines() if line.startswith("macro"))
    assert told[1:3] == ["24", f"{record['metrics']['macro']:.1f}"]
    with Image.open(output / "transcript.png") as picture:
        assert picture.width == 1680
    told = (output / "transcript.md").read_text()
    assert told.count("\n## ") == 3
    assert told.count("Reply: ") == told.count("True: ") == 3

    code, out, err = run(capsys, *made(output))
    assert (code, out) == (2, "")
    assert "will not overwrite" in err


def test_earlier_runs_are_further_columns(tmp_path: Path, capsys) -> None:
    first = tmp_path / "first"
    assert run(capsys, *made(first, "--pictures", 0))[0] == 0
    compare = ("--compare", first, first / "results.json")
    code, out, _ = run(capsys, *made(tmp_path / "off", "--pictures", 0, "--geometry", "off", *compare))
    assert code == 0
    assert "geometry off, images shown" in out
    record = json.loads((tmp_path / "off" / "results.json").read_text())
    assert list(record["compared"]) == ["first", "first-2"]
    assert record["leads"]["first"] == record["leads"]["first-2"]
    own = json.loads((first / "results.json").read_text())["metrics"]
    assert record["compared"]["first"] == {key: own[key] for key in record["compared"]["first"]}
    lead = record["metrics"]["macro"] - own["macro"]
    assert record["leads"]["first"]["macro"] == pytest.approx(lead)

    code, out, err = run(capsys, *made(tmp_path / "few", "--limit", 4, "--compare", first))
    assert (code, out) == (2, "")
    assert "its questions are others: 24 of made-up, not the 4 of made-up" in err
    assert run(capsys, *made(tmp_path / "none", "--compare", tmp_path / "absent"))[0] == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "vsi"], "choose from rooms_qa"),
        (["--benchmark", "made_up", "--limit", "0"], "--limit must be at least 1"),
        (["--benchmark", "made_up", "--limit", "1", "--geometry", "shuffled"], "cannot shuffle one scene"),
        (["--geometry", "shuffled", "--images", "blank"], "cannot shuffle the geometry of blank images"),
    ],
)
def test_what_cannot_be_done_changes_nothing(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    code, out, err = run(capsys, *arguments, "--model", "tiny", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, *made(tmp_path / "file" / "out", "--limit", 1))
    assert (code, out) == (2, "")
    assert "cannot write" in err


def test_the_held_out_rooms_are_the_default(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(benchmarks, "_training", lambda: TRAINING)
    arguments = ("--model", "tiny", "--limit", 3, "--gate", 5, "-o", tmp_path / "out")
    code, out, err = run(capsys, *arguments)
    assert code == 1
    assert out.startswith("rooms-qa-heldout-v1 (modified: limit 3)\n")
    assert "gate MISSED" in out
    assert "misses its gate" in err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["protocol"]["questions_sha256"] == heldout_v1.digest()
    assert "gate MISSED" in (tmp_path / "out" / "report.md").read_text()


def record(macro: float, low: float) -> dict:
    return {"metrics": {"macro": macro, "macro_low": low}, "baselines": {"a": {"macro": 20.0}, "b": {"macro": 30.0}}}


def test_the_gate_asks_for_points_and_for_certainty() -> None:
    assert judged(record(35.0, 31.0), 5)["passed"]
    assert judged(record(35.0, 31.0), 5)["baseline"] == "b"
    require_passed(judged(record(35.0, 31.0), 5))
    for missed in (record(34.9, 31.0), record(35.0, 30.0)):
        with pytest.raises(CheckFailed, match="misses its gate"):
            require_passed(judged(missed, 5))
    with pytest.raises(InputError, match="nothing was scored"):
        judged({"metrics": {}, "baselines": {}}, 5)
