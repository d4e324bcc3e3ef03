import errno
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.train.scenes import BoxRooms
from tests.train.worker import mini_run
from train import run, state
from train.config import load_config, save_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A config file of a two-step run over the test's own rooms, to be started from a temporary folder."""
    monkeypatch.setattr(run, "build_source", lambda name, root, **options: BoxRooms())
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    save_config(mini_run(2), tmp_path / "mini.yaml")
    return tmp_path / "mini.yaml"


def test_a_run_explains_itself(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run.main(["--config", str(config), "--optim.lr", "1e-4"]) == 0
    assert caplog.messages[0] == "config mini.yaml"
    folder = Path("runs/mini")
    values = json.loads((folder / "run.json").read_text())
    assert values["command"][-2:] == ["--optim.lr", "1e-4"]
    assert values["config"]["optim"]["lr"] == load_config(folder / "config.yaml").optim.lr == 1e-4
    assert {"commit", "versions", "device", "processes"} <= values.keys()
    assert "eta" in caplog.text
    assert "views/s" in caplog.text
    assert (folder / "model/model.safetensors").is_file()


def test_files_over_files_are_all_named(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("slow.yaml").write_text("optim: {lr: 1.0e-5}\n")
    assert run.main(["--config", str(config), "--config=slow.yaml"]) == 0
    assert caplog.messages[0] == "config mini.yaml, slow.yaml"
    assert load_config(Path("runs/slow/config.yaml")).optim.lr == 1e-5


def test_nothing_is_overwritten(config: Path) -> None:
    for _ in range(2):
        assert run.main(["--config", str(config)]) == 0
    first = Path("runs/mini/log.jsonl").read_text()
    assert Path("runs/mini-2/log.jsonl").read_text() == first
    assert run.main(["--config", str(config), "--runtime.resume", "auto", "--runtime.steps", "4"]) == 0
    assert Path("runs/mini/log.jsonl").read_text().startswith(first[:200])
    assert not Path("runs/mini-3").exists()


def test_the_default_config_is_named(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = ["--runtime.steps", "1", "--data.images_per_step", "2", "--data.validation", "null", "--data.width", "28"]
    assert run.main([*small, "--data.views", "[2, 2]"]) == 0
    assert caplog.messages[0].endswith("tiny_stage1.yaml (the default; choose another with --config configs/NAME.yaml)")
    assert Path("runs/tiny_stage1/model").is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--optim.lrr", "1"], 2, "did you mean optim.lr?"),
        (["--optim.lr", "fast"], 2, "optim.lr"),
        (["--config", "absent.yaml"], 2, "absent.yaml"),
        (["--model", "absent"], 2, "no model absent"),
        (["--trainable", "{heads: 1.0}"], 2, "trainable.heads"),
        (["--objectives.geometry", "null"], 2, "nothing to minimise"),
        (["--data.views", "[4, 2]"], 2, "data.views"),
        (["--data.views", "[2, 99]", "--runtime.steps", "50"], 2, "no scene with"),
        (["--data.width", "10"], 2, "data.width"),
        (["--guards.max_dropped_in_a_row", "0", "--guards.spike", "1e-9", "--schedule.warmup", "0"], 6, "were dropped"),
    ],
)
def test_mistakes_are_one_clear_error(
    config: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert run.main(["--config", str(config), *arguments]) == code
    text = capsys.readouterr().err
    assert words in text
    assert text.count("error:") == 1
    assert "Traceback" not in text


def test_unwritable_outputs_are_one_clear_error(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run.main(["--config", str(config), "--runtime.output", str(tmp_path / "file/run")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: cannot write ")
    assert text.count("error:") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 4), (errno.EROFS, 2)])
def test_a_disk_that_fails_during_the_run(
    config: Path, number: int, code: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint cannot be written; the first stays."""
    save, calls = state.save_file, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))
        save(*args, **kwargs)

    monkeypatch.setattr(state, "save_file", fail)
    assert run.main(["--config", str(config), "--runtime.checkpoint_every", "1"]) == code
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert "step-00000002" in text
    assert "Traceback" not in text
    assert state.Checkpoints(Path("runs/mini/checkpoints")).newest() == (1, {})


def test_tensorboard_is_optional(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    writer = type("Writer", (), {"add_scalar": lambda self, *values: drawn.append(values)})
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", fake)
    assert run.main(["--config", str(config), "--runtime.tensorboard", "true"]) == 0
    assert {("train/loss", 1), ("train/loss", 2), ("validation/points", 2)} <= {(name, step) for name, _, step in drawn}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    assert run.main(["--config", str(config), "--runtime.tensorboard", "true"]) == 3


def test_the_script_finds_its_way(tmp_path: Path) -> None:
    """From another folder, with the mistake of a user."""
    command = ["bash", str(ROOT / "train/stage1_geometry.sh"), "--optim.lrr", "1"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "did you mean optim.lr?" in done.stderr
    assert not done.stdout
