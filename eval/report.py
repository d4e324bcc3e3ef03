"""How results are told: a table for the terminal, the same as Markdown, `results.json`, and one line per item."""

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.baselines import BASELINES
from eval.evaluate import MODEL, Evaluation, Skipped
from eval.protocols import Protocol
from eval.reconstructions import Reconstructed
from eval.scoring import Row
from eval.summary import MACRO, MICRO
from g2vlm import __version__
from geometry.io.common import atomic_file

RESULTS, ITEMS, REPORT, RUN = "results.json", "items.jsonl", "report.md", "run.json"
PACKAGES = ("torch", "transformers", "timm", "numpy", "scipy", "roma", "pillow")
LABELS = {
    "abs_rel": ("AbsRel", "lower", "{:.4f}"),
    "delta_1": ("delta < 1.25", "higher", "{:.4f}"),
    "accuracy_mean": ("accuracy, mean", "lower", "{:.4f}"),
    "accuracy_median": ("accuracy, median", "lower", "{:.4f}"),
    "completion_mean": ("completion, mean", "lower", "{:.4f}"),
    "completion_median": ("completion, median", "lower", "{:.4f}"),
    "nc_mean": ("normal consistency, mean", "higher", "{:.4f}"),
    "nc_median": ("normal consistency, median", "higher", "{:.4f}"),
    "normal_derived_mean_deg": ("normals of points, mean deg", "lower", "{:.2f}"),
    "normal_derived_median_deg": ("normals of points, median deg", "lower", "{:.2f}"),
    "normal_output_mean_deg": ("normals put out, mean deg", "lower", "{:.2f}"),
    "normal_output_median_deg": ("normals put out, median deg", "lower", "{:.2f}"),
    "rotation_median_deg": ("rotation, median deg", "lower", "{:.2f}"),
    "translation_median_deg": ("translation, median deg", "lower", "{:.2f}"),
    "rra": ("RRA @ {} deg, %", "higher", "{:.2f}"),
    "rta": ("RTA @ {} deg, %", "higher", "{:.2f}"),
    "auc": ("AUC @ {} deg, %", "higher", "{:.2f}"),
}
NO_METRICS = "nothing was scored"
COUNTS = ("num_pairs", "num_zero_baseline")


def results(evaluation: Evaluation, model: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What `results.json` holds for scores.

    Args:
        evaluation: the scores.
        model: what to call the model.
        provenance: checkpoint and commit; equal runs have equal ones, so that equal runs write equal files.
    """
    return {
        "benchmark": evaluation.protocol.label,
        "protocol": evaluation.protocol.record(),
        "model": model,
        "count": evaluation.count,
        "skipped": [asdict(skipped) for skipped in evaluation.skipped],
        "metrics": evaluation.metrics(MODEL),
        "baselines": {name: evaluation.metrics(name) for name in evaluation.rows if name != MODEL},
        "per_item": ITEMS,
        "provenance": dict(provenance),
    }


def outputs_only(
    protocol: Protocol,
    done: Sequence[Reconstructed],
    skipped: Sequence[Skipped],
    model: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """What `results.json` holds for scenes without ground truth: counts, no metrics."""
    empty = Evaluation(protocol, {MODEL: []}, list(skipped))
    return {**results(empty, model, provenance), "count": len(done)}


def append_rows(folder: Path, rows: Mapping[str, Row]) -> None:
    """Add one item's line of every system to `items.jsonl`: what is scored stays, whatever happens next."""
    append_lines(folder, ({"system": name, **asdict(row)} for name, row in rows.items()))


def append_lines(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to `items.jsonl`."""
    with (folder / ITEMS).open("a", encoding="utf-8") as file:
        file.write("".join(_json(line) + "\n" for line in lines))


def write(folder: Path, record: Mapping[str, Any], device: str) -> None:
    """Write `results.json`, the report and the record of the run; each file whole or not at all.

    Args:
        folder: an existing folder.
        record: from `results` or `outputs_only`.
        device: what the model ran on.
    """
    _write_text(folder / REPORT, markdown(record))
    _write_text(folder / RUN, _json(run_record(device), indent=1) + "\n")
    _write_text(folder / RESULTS, _json(record, indent=1) + "\n")


def run_record(device: str) -> dict[str, Any]:
    """When, with which command, on what and with which packages."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": device,
        "python": platform.python_version(),
        "packages": {"g2vlm": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(record: Mapping[str, Any]) -> str:
    """Results as text: what was measured, then a line per metric with the model and its baselines side by side."""
    body = text_table(_systems(record)) if record["metrics"] else NO_METRICS
    return "\n".join([*_heading(record), "", body, "", *notes(record)])


def text_table(systems: Mapping[str, Mapping[str, float]]) -> str:
    """Systems by name and metrics by name as text: a line per metric, a column per system."""
    rows = [["", "better", *systems], *_metric_rows(systems)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_padded(row, widths)).rstrip() for row in rows)


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    body = markdown_table(_systems(record)) if record["metrics"] else NO_METRICS
    return "\n".join([f"### {record['benchmark']}", "", *_heading(record)[1:], "", body, "", *notes(record), ""])


def markdown_table(systems: Mapping[str, Mapping[str, float]]) -> str:
    """The table of `text_table` as Markdown."""
    rows = [["", "better", *systems], ["---"] * 2 + ["---:"] * len(systems), *_metric_rows(systems)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _systems(record: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {MODEL: record["metrics"], **record["baselines"]}


def _heading(record: Mapping[str, Any]) -> list[str]:
    metrics = record["metrics"]
    counts = f"{_counted(record['count'], 'scene')}, {len(record['skipped'])} skipped"
    if "num_pairs" in metrics:
        counts += f", {_counted(metrics['num_pairs'], 'pair')} of views"
    return [record["benchmark"], f"{record['protocol']['about']}; {counts}; model: {record['model']}"]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _metric_rows(systems: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Label, direction and a cell per system, for every metric that any system has.

    The other averages follow the protocol's own, where they print differently.
    """
    columns = list(systems.values())
    names = dict.fromkeys(name for metrics in columns for name in metrics if name not in COUNTS)
    rows = {name: _metric_row(name, columns) for name in sorted(names, key=_rank)}
    return [row for name, row in rows.items() if _stem(name) == name or row[2:] != rows[_stem(name)][2:]]


def _metric_row(name: str, systems: Sequence[Mapping[str, float]]) -> list[str]:
    label, better, number = _style(_stem(name))
    kind = f" ({name.rsplit('_', 1)[1]})" if name != _stem(name) else ""
    return [label + kind, better, *(number.format(m[name]) if name in m else "-" for m in systems)]


def _stem(name: str) -> str:
    """The metric without the name of its average."""
    return name.removesuffix(f"_{MACRO}").removesuffix(f"_{MICRO}")


def _style(name: str) -> tuple[str, str, str]:
    if name in LABELS:
        return LABELS[name]
    stem, threshold = name.split("_")
    label, better, number = LABELS[stem]
    return label.format(threshold), better, number


def _rank(name: str) -> tuple[bool, int, int]:
    """Position of a metric in the table: the protocol's averages first, then as in `LABELS`, thresholds ascending."""
    metric, order = _stem(name), list(LABELS)
    if metric in LABELS:
        return metric != name, order.index(metric), 0
    stem, threshold = metric.split("_")
    return metric != name, order.index(stem), int(threshold)


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers of a record mean, and what is missing from them, as Markdown items."""
    weights = [f"weights: {_weights(record['provenance'])}"]
    if not record["metrics"]:
        return [f"- {note}" for note in [*weights, *_skips(record)]]
    protocol = record["protocol"]
    depth, points, poses = protocol["depth"], protocol["points"], protocol["poses"]
    lines = [
        f"depth: one scale per scene ({depth['alignment']}), {depth['average']} average; "
        f"points: {_thinned(points['max_points'])}Umeyama, then ICP at {points['icp_distance']:g}, macro average; "
        f"poses: {poses['relative']} order, {poses['average']} average",
        "macro: mean over scenes; micro: over all pixels, or all pairs of views, together",
        "accuracy alone rewards a cloud that collapses; read it together with completion",
        *(f"{name}: {BASELINES[name]}" for name in record["baselines"] if name in BASELINES),
    ]
    if protocol["options"].get("split", "test") != "test":
        lines.append("not the published test sequences: do not compare with published tables")
    if protocol["modified"]:
        lines.append("MODIFIED protocol: comparable only with runs that changed the same constants")
    return [f"- {note}" for note in [*lines, *weights, *_skips(record)]]


def _weights(provenance: Mapping[str, Any]) -> str:
    """Names and beginnings of the SHA-256 of the weight files, and the commit."""
    files = provenance["checkpoint"]["files"]
    named = ", ".join(f"{name} sha256 {digest[:12]}" for name, digest in files.items()) or "random"
    commit = provenance["commit"]
    changed = " with local changes" if commit and commit["dirty"] else ""
    return named + (f"; commit {commit['hash'][:12]}{changed}" if commit else "")


def _thinned(max_points: int | None) -> str:
    return "" if max_points is None else f"at most {max_points:,} of each cloud, "


def _skips(record: Mapping[str, Any]) -> list[str]:
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


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())
