"""What the distribution ships: two packages, nothing of the checkout; and what importing it costs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.splitlines() if n.startswith(("g2vlm/", "geometry/")) or "/" not in n]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", *build, str(source)], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_exactly_two_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"g2vlm", "geometry"}


def test_wheel_holds_every_module_and_the_type_markers(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("g2vlm", "geometry"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert modules <= names
        assert f"{package}/py.typed" in names


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip()


def test_help_loads_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "g2vlm", "recon", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "jsonargparse" in loaded
    assert not loaded & {"torch", "transformers", "timm", "numpy"}


def test_import_needs_no_optional_package() -> None:
    code = """
import sys
for name in ("flash_attn", "xformers", "deepspeed", "peft", "av", "viser", "webdataset", "tensorboard"):
    sys.modules[name] = None
import geometry, g2vlm.pipeline, g2vlm.commands
print("ok")
"""
    assert run_python(code) == "ok"
