"""The script of make quickstart: what it calls, in which folder, and how it ends. `make smoke` runs it for real."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
# Takes the place of python: notes what it is asked for, and ends as the test wants.
[ "$1" = -c ] && exit 0
RUN=$(sed 's/.*--runtime.output //; s/ .*//' <<< "$*")
echo "$* (threads $OMP_NUM_THREADS)" >> calls
case "$*" in
    *"/stage1 "*) mkdir -p "$RUN/model"; echo "${WEIGHTS:-}" > "$RUN/model/model.safetensors"; exit "${TRAINING:-0}" ;;
    *"/stage2 "*) touch "$RUN/log.jsonl"; exit "${STAGE2:-0}" ;;
    "eval/recon.py"*"--gate"*) mkdir -p "$3"; touch "$3/results.json"; exit "${SCORING:-0}" ;;
    "-m eval.quickstart "*) mkdir -p "$3"; touch "$3/report.md"; exit "${REPORT:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def quickstart(checkout: Path, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Run the script from another folder: exit code, calls, what was said."""
    (checkout / "calls").write_text("")
    done = subprocess.run(
        ["bash", str(checkout / "train" / "quickstart.sh"), *arguments],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHON": "./python", "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
    )
    assert not done.stdout
    return done.returncode, (checkout / "calls").read_text().splitlines(), done.stderr


def test_trains_both_stages_scores_and_reports(checkout: Path) -> None:
    code, calls, _ = quickstart(checkout, "--limit", "2", "--stage2-steps", "7", "--runtime.steps", "3")
    assert code == 0
    training, stage2, trained, demo, answers, room, report = calls
    folder = "runs/quickstart"
    assert training == (
        "-m train.run --config configs/tiny_stage1.yaml --runtime.device cpu --runtime.steps 3 "
        f"--runtime.output {folder}/stage1 --runtime.resume auto (threads 2)"
    )
    assert trained.startswith(f"eval/recon.py --output {folder}/trained --limit 2 ")
    assert f"--model {folder}/stage1/model --gate 0.8" in trained
    assert demo.startswith(f"eval/recon.py --output {folder}/demo --limit 2 ")
    assert "--model" not in demo
    assert "--no-baselines" in demo
    assert stage2 == (
        "-m train.run --default configs/tiny_stage2.yaml --config configs/tiny_stage2.yaml --runtime.device cpu "
        f"--model {folder}/stage1/model "
        "--trainable {semantic_expert: 1.0, embeddings: 1.0, lm_head: 1.0, semantic_encoder: 1.0} "
        f"--runtime.steps 7 --runtime.output {folder}/stage2 --runtime.resume auto "
        "(threads 2)"
    )
    assert answers.startswith(f"eval/vqa.py --output {folder}/answers --limit 2 ")
    assert f"--model {folder}/stage2/model" in answers
    assert room.startswith(f"-m eval.quickstart_room {folder} ")
    assert report.startswith(f"-m eval.quickstart {folder} ")


def test_a_missed_gate_is_reported_and_decides_the_exit_code(checkout: Path) -> None:
    code, calls, _ = quickstart(checkout, SCORING="1", REPORT="1")
    assert (code, len(calls)) == (1, 7)
    assert (checkout / "runs/quickstart/report.md").is_file()


@pytest.mark.parametrize("code", [2, 75])
@pytest.mark.parametrize(("stage", "count"), [("TRAINING", 1), ("STAGE2", 2)])
def test_training_that_fails_ends_it(checkout: Path, stage: str, count: int, code: int) -> None:
    given, calls, said = quickstart(checkout, **{stage: str(code)})
    assert (given, len(calls)) == (code, count)
    assert ("goes on from here" in said) == (code == 75)


def test_scoring_that_fails_otherwise_ends_it(checkout: Path) -> None:
    code, calls, _ = quickstart(checkout, SCORING="4")
    assert (code, len(calls)) == (4, 3)


def test_an_interrupted_run_is_continued_and_a_finished_one_kept(checkout: Path) -> None:
    assert quickstart(checkout, SCORING="4")[0] == 4
    assert (checkout / "runs/quickstart/trained/results.json").is_file()
    (checkout / "runs/quickstart/trained/stale").touch()
    for folder in ("runs/quickstart", "runs/quickstart-2", "runs/quickstart-3"):
        code, calls, said = quickstart(checkout)
        assert code == 0
        assert f"--runtime.output {folder}/stage1 " in calls[0]
        assert f"results go to {folder}\n" in said
    assert not (checkout / "runs/quickstart/trained/stale").exists()
    assert quickstart(checkout, "--output", "mine")[1][-1].startswith("-m eval.quickstart mine ")


def test_stage_2_is_continued_unless_stage_1_is_another(checkout: Path) -> None:
    log = checkout / "runs/quickstart/stage2/log.jsonl"
    for weights, continued in (("a", False), ("a", True), ("b", False), ("b", True)):
        code, _, _ = quickstart(checkout, STAGE2="75", WEIGHTS=weights)
        assert code == 75
        assert (log.read_text() == "earlier") == continued
        log.write_text("earlier")


def test_what_was_scored_of_an_interrupted_run_is_scored_again(checkout: Path) -> None:
    (checkout / "runs/quickstart/stage1").mkdir(parents=True)
    for name in ("answers", "room"):
        (checkout / f"runs/quickstart/{name}").mkdir()
        (checkout / f"runs/quickstart/{name}/stale").touch()
    assert quickstart(checkout)[0] == 0
    assert not list(checkout.glob("runs/quickstart/*/stale"))


def test_a_folder_with_something_else_is_left_alone(checkout: Path) -> None:
    (checkout / "mine/trained").mkdir(parents=True)
    code, calls, said = quickstart(checkout, "--output", "mine")
    assert (code, calls) == (2, [])
    assert "will not write into  mine" in said
    assert (checkout / "mine/trained").is_dir()


def test_threads_are_the_cores_up_to_four(checkout: Path) -> None:
    _, (training, *_), _ = quickstart(checkout, OMP_NUM_THREADS="")
    assert training.endswith(f"(threads {min(os.cpu_count() or 1, 4)})")


def test_without_the_package_it_says_what_to_do(checkout: Path) -> None:
    code, calls, said = quickstart(checkout, PYTHON="false")
    assert (code, calls) == (3, [])
    assert "fix: make test (or make quickstart)" in said
