"""The command line: what it writes, and what it says and does about bad input. Every case goes through `main`."""

import json
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from g2vlm.checkpoint import load_model, save_model
from g2vlm.cli import main

WIDTH = "56"


def photo(path: Path, size: tuple[int, int] = (80, 60), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        photo(folder / f"view{index}.png")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(load_model("tiny", dtype=torch.float32), folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def recon(*arguments: object) -> int:
    return main(["recon", *map(str, arguments), "--width", WIDTH, "--device", "cpu"])


def test_recon_writes_every_format(photos: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    assert recon(photos, "--model", model_folder, "-o", output) == 0
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert {"points.ply", "points.glb", "cameras.json", "preview.png"} <= files
    assert len([name for name in files if name.startswith("depth/")]) == 3
    assert {Path(line).resolve() for line in capsys.readouterr().out.splitlines()} <= {
        path.resolve() for path in (output, *output.rglob("*"))
    }
    cameras = json.loads((output / "cameras.json").read_text())
    assert [view["image"].split("/")[-1] for view in cameras["views"]] == ["view0.png", "view1.png", "view2.png"]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_recon_accepts_one_view_of_any_mode(mode: str, model_folder: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "one.png", (60, 90), mode)
    assert recon(image, "--model", model_folder, "-o", tmp_path / "out", "--formats", "cameras") == 0


def test_dry_run_writes_nothing(photos: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    assert recon(photos, "--model", model_folder, "-o", tmp_path / "out", "--dry-run") == 0
    assert "3, brought to 56x42" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def text_as_jpeg(folder: Path) -> Path:
    (folder / "note.jpg").write_text("not an image")
    return folder / "note.jpg"


def truncated_jpeg(folder: Path) -> Path:
    content = photo(folder / "whole.jpg", (200, 200)).read_bytes()
    (folder / "half.jpg").write_bytes(content[: len(content) // 2])
    return folder / "half.jpg"


def huge_header(folder: Path) -> Path:
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "huge.png").write_bytes(png)
    return folder / "huge.png"


def missing_file(folder: Path) -> Path:
    return folder / "absent.jpg"


@pytest.mark.parametrize("make", [empty_folder, text_as_jpeg, truncated_jpeg, huge_header, missing_file])
def test_bad_images(make, model_folder: Path, tmp_path: Path, capsys) -> None:
    image = make(tmp_path)
    assert_fails(2, capsys, recon(image, "--model", model_folder, "-o", tmp_path / "out"), image.name)
    assert not (tmp_path / "out").exists()


def test_one_pixel_image_is_brought_to_size(model_folder: Path, tmp_path: Path) -> None:
    image = photo(tmp_path / "dot.png", (1, 1))
    assert recon(image, "--model", model_folder, "-o", tmp_path / "out", "--formats", "cameras") == 0


def test_bad_image_among_good_ones_can_be_skipped(photos: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    text_as_jpeg(photos)
    assert_fails(2, capsys, recon(photos, "--model", model_folder, "-o", tmp_path / "a"), "note.jpg")
    assert recon(photos, "--model", model_folder, "-o", tmp_path / "b", "--formats", "cameras", "--skip-bad") == 0
    assert len(json.loads((tmp_path / "b" / "cameras.json").read_text())["views"]) == 3


def test_output_folder_is_never_overwritten(photos: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    command = (photos, "--model", model_folder, "-o", tmp_path / "out", "--formats", "cameras")
    assert_fails(2, capsys, recon(*command), "not empty")
    assert recon(*command, "--overwrite") == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


class Poison:
    """Unpickling it would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def without_a_key(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return "lm_head.weight"


def with_an_extra_key(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "surprise.weight": torch.zeros(2)}, folder / "model.safetensors")
    return "surprise.weight"


def with_a_wrong_shape(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    return "lm_head.weight"


def with_a_pickle(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Poison(folder / "executed")))
    return "model.safetensors"


def truncated(folder: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return "model.safetensors"


def with_a_broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json"


DAMAGES = [
    without_weights,
    without_a_key,
    with_an_extra_key,
    with_a_wrong_shape,
    with_a_pickle,
    truncated,
    with_a_broken_config,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoints(damage, photos: Path, model_folder: Path, tmp_path: Path, capsys) -> None:
    folder = copy_of(model_folder, tmp_path / "model")
    named = damage(folder)
    assert_fails(5, capsys, recon(photos, "--model", folder, "-o", tmp_path / "out"), named)
    assert not (folder / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_without_a_model_the_demo_weights_reconstruct_at_their_own_width(
    photos: Path, demo_weights: Path, tmp_path: Path, caplog, capsys
) -> None:
    caplog.set_level("INFO")
    command = ["recon", str(photos), "-o", str(tmp_path / "out"), "--formats", "scene", "--device", "cpu"]
    assert main([*command, "--dry-run"]) == 0
    assert "3, brought to 84x56" in capsys.readouterr().out
    caplog.clear()
    assert main(command) == 0
    assert caplog.text.count("demo weights, trained on rendered rooms only; choose another with --model") == 1
    assert "the model's width, 84 pixels; choose another with --width" in caplog.text
    scene = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert (scene["model"], scene["resized_to"]) == ("demo weights", {"height": 56, "width": 84})
    assert main([*command, "--overwrite", "--width", "56"]) == 0
    assert json.loads((tmp_path / "out" / "scene.json").read_text())["resized_to"] == {"height": 42, "width": 56}
    capsys.readouterr()
    assert main(["info"]) == 0
    assert f"demo weights ({demo_weights})" in capsys.readouterr().out


def test_absent_demo_weights(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("g2vlm.checkpoint.DEMO_WEIGHTS", tmp_path / "assets" / "demo")
    assert_fails(5, capsys, recon(photos, "-o", tmp_path / "out"), "assets/demo")
    assert_fails(5, capsys, main(["info"]), "assets/demo")
    assert not (tmp_path / "out").exists()


def test_unknown_model(photos: Path, tmp_path: Path, capsys) -> None:
    assert_fails(2, capsys, recon(photos, "--model", "tinny", "-o", tmp_path / "out"), "tinny")


def assert_fails(code: int, capsys, actual: int, named: str) -> None:
    """The exit code, and three lines at most that name the culprit, without a traceback."""
    captured = capsys.readouterr()
    message = captured.err[captured.err.index("error:") :]
    assert actual == code, message
    assert named in message
    assert "Traceback" not in message
    assert "fix:" in message
    assert not captured.out


def test_usage_errors_exit_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recon", "photos", "--no-such-flag"])
    assert stop.value.code == 2


def test_unexpected_errors_leave_a_log(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("g2vlm.commands.recon", lambda args: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert recon(photos, "--model", "tiny", "-o", tmp_path / "out") == 70
    (log,) = tmp_path.glob("g2vlm-*.log")
    assert "ZeroDivisionError" in log.read_text()
    assert "Traceback" not in capsys.readouterr().err


def test_info_and_doctor(model_folder: Path, capsys) -> None:
    assert main(["info", str(model_folder)]) == 0
    assert "M parameters" in capsys.readouterr().out
    assert main(["info", "paper_2b"]) == 0
    assert "4,538.2 M parameters" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert re.search(r"^self-test +passed", capsys.readouterr().out, re.MULTILINE)


def test_convert_with_check(tmp_path: Path, model_folder: Path, capsys) -> None:
    assert main(["convert", str(model_folder), str(tmp_path / "released"), "--check"]) in (0, 5)


def test_module_and_script_agree() -> None:
    done = subprocess.run([sys.executable, "-m", "g2vlm", "info", "absent"], capture_output=True, text=True)
    assert done.returncode in (2, 5)
    assert done.stderr.startswith("error:")
