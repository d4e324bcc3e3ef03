"""Resuming with another config."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.scenes import BoxRooms
from tests.train.worker import mini_run
from train import run
from train.changes import ABSENT, FREE, check_changes, differences
from train.config import RunConfig, known_keys, plain, save_config

WITHOUT_VALIDATION = ("--data.validation", "null")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with its config file, made by the command."""
    folder = tmp_path_factory.mktemp("begun")
    save_config(mini_run(2, output=str(folder / "run"), validate_every=0), folder / "mini.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_source", lambda name, root, **options: BoxRooms())
        assert run.main(["--config", str(folder / "mini.yaml"), *WITHOUT_VALIDATION]) == 0
    return folder


@pytest.fixture
def go_on(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Resume a copy of that run with further options; gives the exit code."""
    monkeypatch.setattr(run, "build_source", lambda name, root, **options: BoxRooms())
    caplog.set_level(logging.INFO)
    shutil.copytree(begun / "run", tmp_path / "run")

    def resume(*options: str) -> int:
        fixed = ("--config", str(begun / "mini.yaml"), *WITHOUT_VALIDATION, "--runtime.resume", "auto")
        return run.main([*fixed, "--runtime.output", str(tmp_path / "run"), *options])

    return resume


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("optim.lr", "0.002", "optim.lr is 0.002, was 0.001"),
        ("runtime.steps", "1", "runtime.steps is 1, was 2"),
        ("runtime.seed", "7", "runtime.seed is 7, was 0"),
        ("model", "tiny", "model is tiny, was absent"),
        ("model.heads.depth", "2", "model.heads.depth is 2, was 1"),
        ("data.views", "[2, 4]", "data.views is [2, 4], was [2, 3]"),
        ("data.source.root", "scenes", "data.source.root is scenes, was null"),
        ("objectives.geometry.camera", "0.5", "objectives.geometry.camera is 0.5, was 0.2"),
        ("schedule.kind", "constant", "schedule.kind is constant, was cosine"),
        ("guards.spike", "5", "guards.spike is 5.0, was 1000.0"),
        ("trainable", "{geometry_heads: 1.0}", "trainable.projection is absent, was 1.0"),
    ],
)
def test_another_training_is_refused(
    go_on, begun: Path, tmp_path: Path, option: str, value: str, told: str, capsys: pytest.CaptureFixture
) -> None:
    assert go_on(f"--{option}", value) == 2
    text = capsys.readouterr().err
    assert told in text
    assert told.split()[0] in text.partition("--runtime.changes")[2]
    assert f"--model {tmp_path / 'run/checkpoints/step-00000002'}" in text
    assert "Traceback" not in text
    for file in sorted((begun / "run").rglob("*")):
        copy = tmp_path / "run" / file.relative_to(begun / "run")
        assert file.is_dir() or copy.read_bytes() == file.read_bytes(), file


def test_a_longer_run_is_told(go_on, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert go_on("--runtime.steps", "4") == 0
    assert "runtime.steps is 4, was 2: the schedule is that of the longer run from here on" in caplog.messages
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()


def test_housekeeping_is_free(go_on, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--runtime.log_every", "2", "--runtime.keep", "1", "--guards.max_dropped_in_a_row", "3")
    assert go_on(*options, "--data.validation", "{name: rooms}", "--runtime.checkpoint_every", "1") == 0
    assert not [message for message in caplog.messages if ", was " in message]


def test_a_change_on_purpose(go_on, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--optim.lr", "0.002", "--optim.clip", "0.5", "--runtime.steps", "3")
    assert go_on(*options, "--runtime.changes", "[optim.lr]") == 2
    assert go_on(*options, "--runtime.changes", "[optim]") == 0
    assert "optim.lr is 0.002, was 0.001, as runtime.changes allows" in caplog.messages
    assert go_on(*options, "--runtime.steps", "4") == 0  # the newest checkpoint holds the new values


def test_the_checkpoint_of_another_run_is_refused(go_on, begun: Path, tmp_path: Path, capsys) -> None:
    save_config(mini_run(2, seed=3, validate_every=0), begun / "other.yaml")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run.main(["--config", str(begun / "other.yaml"), "--runtime.output", str(tmp_path / "other")]) == 0
    shutil.copytree(tmp_path / "other/checkpoints", tmp_path / "run/checkpoints")
    assert go_on() == 2
    assert "runtime.seed is 0, was 3" in capsys.readouterr().err


def test_free_keys_exist() -> None:
    assert set(FREE) <= set(known_keys())


def test_differences_go_both_ways(tmp_path: Path) -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 2, "c": [1, 2]}, "e": {"f": None}}
    assert differences(old, new) == {"a.b": (1, 2), "d": (1, ABSENT), "e.f": (ABSENT, None)}
    config = RunConfig()
    older = plain(config)
    del older["schedule"]["warmup"], older["trainable"]["projection"]
    assert differences(older, plain(config)) == {"trainable.projection": (ABSENT, 1.0)}
    check_changes(tmp_path, plain(replace(config, runtime=replace(config.runtime, workers=3))), config)
