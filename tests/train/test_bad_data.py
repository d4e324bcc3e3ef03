"""Data that are damaged, through the command of training: clear lines, the right exit code, no traceback."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.g2vlm.data.scenes import room_frames, write_canonical, write_seven_scenes
from tests.train.worker import mini_run
from train import run
from train.config import SourceConfig, save_config

FRAMES = 40


@pytest.fixture
def train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys):
    """Train for eight steps on a source; gives the exit code and everything that was told."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)

    def train(name: str, root: Path, *options: str, **source) -> tuple[int, str]:
        config = mini_run(8, validate_every=0, checkpoint_every=0)
        data = replace(config.data, source=SourceConfig(name, str(root), source), validation=None, images_per_step=12)
        save_config(replace(config, data=data), tmp_path / "run.yaml")
        code = run.main(["--config", str(tmp_path / "run.yaml"), *options])
        text = caplog.text + capsys.readouterr().err
        assert "Traceback" not in text
        assert text.count("error:") == (code != 0)
        return code, text

    return train


def frames(folder: Path, damaged: int) -> list[Path]:
    """Write a scene of forty frames; returns the images that are cut in half."""
    write_canonical(folder, room_frames(FRAMES, (28, 28)))
    bad = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    bad = [path for path in bad if "depth" not in str(path.relative_to(folder))][3 : 3 + damaged]
    for image in bad:
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    return bad


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damaged_images_are_named_once(train_on, tmp_path: Path, workers: str) -> None:
    bad = frames(tmp_path / "scene", FRAMES // 20)
    code, text = train_on("canonical", tmp_path / "scene", "--runtime.workers", workers)
    assert code == 0
    assert len(bad) == 2
    for image in bad:
        assert text.count(str(image)) == 1, image


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_damaged_images(train_on, tmp_path: Path, workers: str) -> None:
    bad = frames(tmp_path / "scene", FRAMES // 20 + 1)
    code, text = train_on("canonical", tmp_path / "scene", "--runtime.workers", workers)
    assert code == 6
    assert "error: too many unreadable frames in  canonical" in text
    assert "3 of 40, more than 5.0%" in text
    assert any(str(image) in text for image in bad)


def test_depth_that_is_not_a_number(train_on, tmp_path: Path) -> None:
    frames = room_frames(FRAMES, (28, 28))
    write_canonical(tmp_path / "scene", frames, depth_encoding="npz")
    file = sorted((tmp_path / "scene").rglob("*.npz"))[5]
    np.savez(file, depth=np.where(np.eye(28) > 0, np.nan, frames[5].depth))
    code, text = train_on("canonical", tmp_path / "scene")
    assert code == 0
    assert text.count(f"left out: bad depth  {file}") == 1
    assert "28 values are NaN, infinite or negative, the first at row 0, column 0" in text


@pytest.mark.parametrize(
    ("pose", "why"),
    [([[1.0, 0, 0, 0]] * 3, "its shape is (3, 4), not (4, 4)"), ([[float("nan")] * 4] * 4, "not finite")],
)
def test_scenes_with_bad_poses_are_passed_over(train_on, tmp_path: Path, pose: list, why: str) -> None:
    for name in ("scenes/a", "scenes/b"):
        write_canonical(tmp_path / name, room_frames(6, (28, 28)))
    file = tmp_path / "scenes/b/scene_meta.json"
    content = json.loads(file.read_text())
    content["frames"][2]["transform_matrix"] = pose
    file.write_text(json.dumps(content))
    code, text = train_on("canonical", tmp_path / "scenes", "--guards.max_bad_scenes_share", "0.8")
    assert code == 0
    assert text.count("passed over canonical/1") == 1
    entry = json.loads(Path("runs/run/bad_samples.jsonl").read_text().splitlines()[0])
    assert str(file) in entry["reason"]
    assert why in entry["reason"]
    code, text = train_on("canonical", tmp_path / "scenes")
    assert code == 6
    assert "scenes could not be read" in text


def test_bad_pose_files(train_on, tmp_path: Path) -> None:
    folder = write_seven_scenes(tmp_path / "room/seq-01", num_views=2)
    for number in range(40, 140, 20):
        for file in folder.glob("frame-000020.*"):
            shutil.copy(file, folder / file.name.replace("000020", f"{number:06d}"))
    pose = (folder / "frame-000000.pose.txt").read_text()
    (folder / "frame-000040.pose.txt").write_text("\n".join(pose.splitlines()[:3]))
    (folder / "frame-000060.pose.txt").write_text(pose.replace(pose.split()[0], "nan", 1))
    (folder / "frame-000080.pose.txt").write_text("lost")
    code, text = train_on("seven_scenes", folder, "--runtime.steps", "3", max_bad=0.5)
    assert code == 0
    for number, why in ((40, "its shape is (3, 4), not (4, 4)"), (60, "not finite"), (80, "could not convert")):
        lines = [line for line in text.splitlines() if f"frame-{number:06d}.pose.txt" in line]
        assert len(lines) == 1, number
        assert why in lines[0]
    code, text = train_on("seven_scenes", folder, "--runtime.steps", "3")
    assert code == 6
    assert "too many unreadable frames" in text


def test_a_missing_folder(train_on, tmp_path: Path) -> None:
    code, text = train_on("canonical", tmp_path / "absent")
    assert code == 2
    assert f"missing data folder  {tmp_path / 'absent'}" in text
    assert not (tmp_path / "runs").exists()
