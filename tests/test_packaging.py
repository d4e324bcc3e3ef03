"""What the distribution ships: two packages, nothing of the checkout; and what importing it costs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = "g2vlm/assets/demo"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> zipfile.ZipFile:
    """Built from the files of the checkout, with demo weights of random numbers."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [n for n in listed.stdout.splitlines() if n.startswith(("g2vlm/", "geometry/")) or "/" not in n]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(tiny_weights, source / DEMO, dirs_exist_ok=True)
    (source / DEMO / "README.md").write_text("model card")
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


def test_wheel_holds_the_demo_weights_and_an_installed_package_finds_them(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    assert {f"{DEMO}/{name}" for name in ("config.json", "model.safetensors", "README.md")} <= set(wheel.namelist())
    wheel.extractall(tmp_path)
    code = "import g2vlm; model = g2vlm.load(device='cpu'); print(g2vlm.__file__, model.name, sep='|')"
    file, name = run_python(code, cwd=tmp_path).split("|")
    assert Path(file).is_relative_to(tmp_path)
    assert name == "demo weights"


def run_python(code: str, cwd: Path = ROOT) -> str:
    """Run code that imports the packages in `cwd`."""
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=True).stdout.strip()


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
