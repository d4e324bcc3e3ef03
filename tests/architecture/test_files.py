"""No file carries the traces of an unfinished merge."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (".py", ".md", ".yaml", ".sh", ".toml", ".json", "")
MARKS = tuple(sign * 7 for sign in "<>|")


def texts() -> list[Path]:
    """Tracked text files; none outside a git checkout."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    names = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [
        path for path in names if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml", ".json", "") and path.is_file()
    ]


def test_no_marks_of_a_merge() -> None:
    files = texts()
    if not files:
        pytest.skip("not a git checkout")
    marked = [path for path in files if any(line.startswith(MARKS) for line in path.read_text("utf-8").splitlines())]
    assert not marked
