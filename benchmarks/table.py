"""Committed results as Markdown: `python -m benchmarks.table [FOLDER]`."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
NOT_RUN = "not run"


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table with a column for every key; a missing or empty value reads "-"."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


def render(result: Mapping[str, Any]) -> str:
    """One result file: where it comes from, its rows, what was not run."""
    machine = result["machine"]
    commit = f"{result['code']['commit'] or 'commit unknown'}{' with changes' if result['code']['dirty'] else ''}"
    lines = [
        f"## {result['benchmark']} on {machine['card']}",
        "",
        f"{result['date']}, {commit}, {_listed(machine['versions'])}",
        f"attention {result['attention_backend']}, {_listed(result['config'])}",
        *([f"ceilings: {_listed(result['ceilings'])}"] if result["ceilings"] else []),
        "",
        markdown_table(result["rows"]) if result["rows"] else NOT_RUN,
        *(["", *(f"- {NOT_RUN}: {text}" for text in result["not_run"])] if result["not_run"] else []),
        *(["", *(f"- {text}" for text in result["notes"])] if result["notes"] else []),
    ]
    return "\n".join(lines)


def _listed(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in facts.items())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file of a folder, in the order of the names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results of a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    results = read_results(parser.parse_args(arguments).folder)
    print("\n\n".join(map(render, results)) if results else NOT_RUN)


if __name__ == "__main__":
    main()
