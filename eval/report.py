"""How scores of reconstructions are told: a table for the terminal, the same as Markdown, and `results.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.baselines import BASELINES
from eval.evaluate import MODEL, Evaluation, Skipped
from eval.protocols import Protocol
from eval.reconstructions import Reconstructed
from eval.records import (
    ITEMS,
    NO_METRICS,
    append_lines,
    counted,
    markdown_rows,
    text_rows,
    told_skips,
    told_weights,
    write_record,
)
from eval.scoring import Row
from eval.summary import MACRO, MICRO

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
    """Add one item's line of every system to `items.jsonl`."""
    append_lines(folder, ({"system": name, **asdict(row)} for name, row in rows.items()))


def write(folder: Path, record: Mapping[str, Any], device: str) -> None:
    """Write `results.json` with a record from `results` or `outputs_only`, and what goes with it."""
    write_record(folder, record, markdown(record), device)


def table(record: Mapping[str, Any]) -> str:
    """Results as text: what was measured, then a line per metric with the model and its baselines side by side."""
    body = text_table(_systems(record)) if record["metrics"] else NO_METRICS
    return "\n".join([*_heading(record), "", body, "", *notes(record)])


def text_table(systems: Mapping[str, Mapping[str, float]]) -> str:
    """Systems by name and metrics by name as text: a line per metric, a column per system."""
    return text_rows([["", "better", *systems], *_metric_rows(systems)], names=2)


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    body = markdown_table(_systems(record)) if record["metrics"] else NO_METRICS
    return "\n".join([f"### {record['benchmark']}", "", *_heading(record)[1:], "", body, "", *notes(record), ""])


def markdown_table(systems: Mapping[str, Mapping[str, float]]) -> str:
    """The table of `text_table` as Markdown."""
    return markdown_rows([["", "better", *systems], *_metric_rows(systems)], names=2)


def _systems(record: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {MODEL: record["metrics"], **record["baselines"]}


def _heading(record: Mapping[str, Any]) -> list[str]:
    metrics = record["metrics"]
    counts = f"{counted(record['count'], 'scene')}, {len(record['skipped'])} skipped"
    if "num_pairs" in metrics:
        counts += f", {counted(metrics['num_pairs'], 'pair')} of views"
    return [record["benchmark"], f"{record['protocol']['about']}; {counts}; model: {record['model']}"]


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
    weights = [told_weights(record["provenance"])]
    if not record["metrics"]:
        return [f"- {note}" for note in [*weights, *told_skips(record)]]
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
    return [f"- {note}" for note in [*lines, *weights, *told_skips(record)]]


def _thinned(max_points: int | None) -> str:
    return "" if max_points is None else f"at most {max_points:,} of each cloud, "
