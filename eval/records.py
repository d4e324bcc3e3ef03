"""Files and tables that every evaluation writes: `results.json`, one line per item, a report, the record of the run."""

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from g2vlm import __version__
from geometry.io.common import atomic_file

RESULTS, ITEMS, REPORT, RUN = "results.json", "items.jsonl", "report.md", "run.json"
PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "roma", "pillow")
NO_METRICS = "nothing was scored"


def append_lines(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to `items.jsonl`: what is scored stays, whatever happens next."""
    with (folder / ITEMS).open("a", encoding="utf-8") as file:
        file.write("".join(_json(line) + "\n" for line in lines))


def write_record(folder: Path, record: Mapping[str, Any], report: str, device: str) -> None:
    """Write `results.json`, the report and the record of the run; each file whole or not at all.

    Args:
        folder: an existing folder.
        record: what `results.json` holds.
        report: Markdown.
        device: what the model ran on.
    """
    write_text(folder / REPORT, report)
    write_text(folder / RUN, _json(run_record(device), indent=1) + "\n")
    write_text(folder / RESULTS, _json(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


def run_record(device: str) -> dict[str, Any]:
    """When, with which command, on what and with which packages."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": device,
        "python": platform.python_version(),
        "packages": {"g2vlm": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def text_rows(rows: Sequence[Sequence[str]], names: int) -> str:
    """Cells in aligned columns, the first `names` of each row to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_padded(row, widths, names)).rstrip() for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int], names: int) -> list[str]:
    return [cell.ljust(w) if i < names else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


def markdown_rows(rows: Sequence[Sequence[str]], names: int) -> str:
    """The same as a Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * names + ["---:"] * (len(head) - names), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def told_weights(provenance: Mapping[str, Any]) -> str:
    """Names and beginnings of the SHA-256 of the weight files, and the commit."""
    files = provenance["checkpoint"]["files"]
    named = ", ".join(f"{name} sha256 {digest[:12]}" for name, digest in files.items()) or "random"
    commit = provenance["commit"]
    changed = " with local changes" if commit and commit["dirty"] else ""
    return f"weights: {named}" + (f"; commit {commit['hash'][:12]}{changed}" if commit else "")


def told_skips(record: Mapping[str, Any]) -> list[str]:
    """What was skipped, and why."""
    return [f"skipped {skipped['item']}: {skipped['reason']}" for skipped in record["skipped"]]


def _json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not a number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
