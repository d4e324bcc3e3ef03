"""The report of make quickstart, from the files that training and evaluation write."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.baselines import CONSTANT, CONSTANT_PARTS, IDENTITY, UNTRAINED, System, constant_depth, identity_pose
from eval.conditions import Conditions
from eval.evaluate import MODEL, Skipped, evaluate
from eval.gate import judged
from eval.protocols import PROTOCOLS
from eval.qa_blind import majority
from eval.qa_scoring import score_reply
from eval.quickstart import main
from eval.quickstart_room import answered
from eval.records import write_record
from eval.report import results, write
from eval.vqa_run import Reply, VqaEvaluation
from eval.vqa_summary import blind_scores
from eval.vqa_summary import results as vqa_results
from g2vlm.data.qa.question import Question
from tests.eval.samples import perfect, room_items
from tests.eval.vqa_scenes import QUESTIONS, TRAINING, benchmark
from train.config import ChatConfig, ChatSourceConfig, DataConfig, RunConfig
from train.engine import Engine
from train.log import RunLog, write_run

ROOMS = PROTOCOLS["rooms-heldout-v1"]
PROVENANCE = {"checkpoint": {"files": {}}, "commit": None}
CHAT = RunConfig(data=DataConfig(chat=ChatConfig((ChatSourceConfig("rooms_qa"),))))
constant_answer = majority(TRAINING)


@pytest.fixture(scope="module")
def record() -> dict:
    """Scores of a perfect model beside the baselines."""
    systems: dict[str, System] = {
        MODEL: System(perfect),
        CONSTANT: System(lambda sample: constant_depth(sample, ROOMS), CONSTANT_PARTS),
        IDENTITY: System(identity_pose, ("poses",)),
        UNTRAINED: System(lambda sample: constant_depth(sample, ROOMS), CONSTANT_PARTS),
    }
    return results(evaluate(room_items(2), systems, ROOMS), "a model", PROVENANCE)


def vqa_record(answer: Callable[[Question], str], form: bool = True) -> dict:
    """Scores of a model that answers so, beside blind answers."""
    evaluation = VqaEvaluation(benchmark(), Conditions(), (84, 84), None, 16)
    for question in QUESTIONS:
        score = score_reply(question.kind, answer(question), question.answer)
        evaluation.replies.append(Reply(question, answer(question), score, 1, False, form, False))
    return vqa_results(evaluation, blind_scores(benchmark()), {}, "a model", PROVENANCE)


def write_answers(folder: Path, record: dict) -> None:
    write_record(folder / "answers", record, "", "cpu")


def write_room(folder: Path, changed: Sequence[str] = ()) -> None:
    """What eval/quickstart_room.py leaves."""
    questions = [answered(question, reply) for question, reply in zip(QUESTIONS, ("1", "a|`b\n", ""), strict=False)]
    frozen = {"weights": 12_345, "changed_weights": [*changed], "changed_outputs": []}
    (folder / "room.json").write_text(json.dumps({"scene": "s0", "questions": questions, "frozen": frozen}))


@pytest.fixture
def folder(tmp_path: Path, record: dict) -> Path:
    """What train/ and eval/ leave: two steps of each stage, two validations, two pictured rooms, one asked about."""
    stage1 = tmp_path / "stage1"
    (stage1 / "validation").mkdir(parents=True)
    write_run(stage1, RunConfig(), ["python", "-m", "train.run", "--optim.lr", "1e-4"], Engine(torch.device("cpu")))
    log = RunLog(stage1)
    for step, scenes in ((1, 3), (2, 4)):
        log.step(step, {"loss": 3.0 / step, "scenes": scenes, "views": 12 // scenes})
        log.validation(step, {"loss": 3.5 / step})
        log.speed(step, {"steps_per_second": 0.02})
        Image.new("RGB", (8, 8)).save(stage1 / "validation" / f"step-{step:08d}.png")
    (tmp_path / "stage2").mkdir()
    command = ["python", "-m", "train.run", "--runtime.steps", "2"]
    write_run(tmp_path / "stage2", CHAT, command, Engine(torch.device("cpu")))
    log = RunLog(tmp_path / "stage2")
    for step in (1, 2):
        log.step(step, {"loss": 6.0 / step, "samples": 5, "images": 600})
        log.speed(step, {"steps_per_second": 0.01})
    (tmp_path / "answers").mkdir()
    for name in ("report.md", "transcript.md"):
        (tmp_path / "answers" / name).touch()
    write_answers(tmp_path, vqa_record(lambda question: question.answer))
    for part in ("photos", "recon"):
        (tmp_path / "room" / part).mkdir(parents=True)
    for picture in ("photos/frame-1", "photos/frame-2", "recon/preview"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"room/{picture}.png")
    for file in ("points.ply", "points.glb"):
        (tmp_path / "room" / "recon" / file).touch()
    write_room(tmp_path / "room")
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
    for row in (
        "| steps | 2 |",
        "| seen | 24 images, 84 pixels wide |",
        "| time | 1 min 40 s on cpu",
        "--optim.lr 1e-4`",
        "torch ",
    ):
        assert row in text
    assert "| after step 1 | after step 2 |" in text
    for row in ("| 10 conversations about 1,200 images |", "3 min 20 s on cpu", "--runtime.steps 2`"):
        assert row in text
    linked = set(re.findall(r'(?:src="|\]\()([^")]+\.\w+)', text))
    assert {"losses.png", "losses-stage2.png", "room/recon/preview.png", "room/photos/frame-2.png"} <= linked
    assert {"answers/transcript.md", "answers/report.md", "room/recon/points.ply"} <= linked
    assert {"trained/pictures/heldout-09.truth.png", "demo/pictures/heldout-09.png"} <= linked
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


def test_the_questions_are_told_with_replies_and_true_answers(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(folder)])
    out, text = capsys.readouterr().out, (folder / "report.md").read_text()
    assert f"  {QUESTIONS[0].question}\n    model: 1   true: 1   score 100\n" in out
    assert f"  {QUESTIONS[1].question} A. bed B. tv C. rug\n    model: a|'b   true: A. bed   score 0\n" in out
    assert "model: (nothing)   true: 1   score 0" not in out  # the third is a choice
    assert "model: (nothing)   true: A. bed   score 0" in out
    assert f"| {QUESTIONS[0].question} | `1` | 1 | 100 |" in text
    assert f"| {QUESTIONS[1].question}<br>A. bed<br>B. tv<br>C. rug | `a\\|'b` | A. bed | 0 |" in text
    assert f"g2vlm ask {folder}/room/photos --model {folder}/stage2/model --stdin" in text


@pytest.mark.parametrize(
    ("answer", "form", "place", "taught"),
    [
        (lambda question: question.answer, True, "above what can be", "and uses what it sees"),
        (constant_answer, True, "at the level of answers without looking", "but nothing shows that it uses"),
        (lambda _: "chair", False, "BELOW what can be", "not even learned the form of an answer: 0 %"),
    ],
)
def test_where_the_answers_stand_follows_from_the_interval(
    answer: Callable[[Question], str], form: bool, place: str, taught: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    record = vqa_record(answer, form)
    write_answers(folder, record)
    assert main([str(folder)]) == 0
    out, text = capsys.readouterr().out, (folder / "report.md").read_text()
    best = max(own["macro"] for own in record["baselines"].values())
    for told in (f"answers {place}", f"macro {record['metrics']['macro']:.1f}, best blind", f"{best:.1f}, difference"):
        assert told in out
        assert told in text
    assert taught in out
    assert "after 3 min 20 s of stage 2 the model" in out
    assert f"| {QUESTIONS[0].task} | 6 | {record['metrics']['group/object_counting']:.1f} |" in text


def test_questions_that_could_not_be_asked_are_told(folder: Path, capsys: pytest.CaptureFixture) -> None:
    evaluation = VqaEvaluation(benchmark(), Conditions(), (84, 84), None, 16, skipped=[Skipped("q1", "no room")])
    write_answers(folder, vqa_results(evaluation, blind_scores(benchmark()), {}, "a model", PROVENANCE))
    assert main([str(folder)]) == 0
    assert "answers: nothing was scored" in capsys.readouterr().out
    assert "0 questions, 1 skipped" in (folder / "report.md").read_text()


def test_what_stage_2_left_as_it_was_is_told(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(folder)])
    assert "all 12,345 weights that reconstruct" in capsys.readouterr().out
    assert "bit for bit those of stage 1" in (folder / "report.md").read_text()
    write_room(folder / "room", ["heads.camera.weight"])
    main([str(folder)])
    assert "frozen geometry CHANGED in stage 2: heads.camera.weight\n" in capsys.readouterr().out
    assert "bit for bit" not in (folder / "report.md").read_text()


@pytest.mark.parametrize(("line", "said"), [('"loss": NaN', "not finite"), (None, "made no step")])
def test_stage_2_must_have_run(line: str | None, said: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "stage2" / "log.jsonl"
    path.write_text(path.read_text().replace('"loss": 3.0', line) if line else "")
    assert main([str(folder)]) == 1
    assert said in capsys.readouterr().err
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize(
    "file",
    [
        "stage1/run.json",
        "stage1/log.jsonl",
        "stage2/log.jsonl",
        "trained/results.json",
        "demo/results.json",
        "answers/results.json",
        "room/room.json",
    ],
)
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
