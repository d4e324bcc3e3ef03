"""How scores of replies are told: a table for the terminal, and the same as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.evaluate import MODEL
from eval.qa_blind import BASELINES, NUM_TRAINING
from eval.records import NO_METRICS, counted, markdown_rows, text_rows, told_skips, told_weights
from eval.vqa_gate import told
from eval.vqa_summary import GROUP

WELL_FORMED = 90.0  # percent of the replies, below which the table says that few are of the asked form
GEOMETRY = {
    "on": "the geometry encoder sees the views",
    "off": "no geometry tokens",
    "shuffled": "the geometry encoder sees the views of another scene",
}
IMAGES = {"shown": "", "blank": "; every image and view is grey"}


def table(record: Mapping[str, Any]) -> str:
    """Results as text: what was measured, then a line per task with the model and its baselines side by side."""
    body = text_rows(rows(record), names=1) if record["metrics"] else NO_METRICS
    return "\n".join([*_heading(record), "", body, "", *notes(record)])


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    body = markdown_rows(rows(record), names=1) if record["metrics"] else NO_METRICS
    return "\n".join([f"### {record['benchmark']}", "", *_heading(record)[1:], "", body, "", *notes(record), ""])


def _heading(record: Mapping[str, Any]) -> list[str]:
    protocol = record["protocol"]
    height, width = protocol["view_size"]
    asked = f"{counted(record['count'], 'question')}, {len(record['skipped'])} skipped"
    shown = f"{protocol['num_views']} views of {width} x {height}"
    condition = f"geometry {protocol['geometry']}, images {protocol['images']}"
    return [
        record["benchmark"],
        f"{protocol['about']}; {asked}; {shown}; {condition}; model: {record['model']}",
    ]


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Head, a line per task, the averages, and the model's lead over every other column; needs a scored question."""
    systems = {MODEL: record["metrics"], **record["baselines"], **record["compared"]}
    items, columns = record["items"], list(systems.values())

    def line(name: str, count: str, cell: Callable[[Mapping[str, float]], str]) -> list[str]:
        return [name, count, *map(cell, columns)]

    groups = [name for name in items if name.startswith(GROUP)]
    lines = [["", "items", *systems]]
    lines += [line(g.removeprefix(GROUP), f"{items[g]:,}", lambda own, g=g: f"{own[g]:.1f}") for g in groups]
    lines.append(line("macro", f"{record['count']:,}", lambda own: f"{own['macro']:.1f}"))
    lines.append(line("  95 % interval", "", lambda own: span(own["macro_low"], own["macro_high"])))
    for name, title in (("choice_accuracy", "all choices"), ("number_mra", "all numbers")):
        if name in record["metrics"]:
            lines.append(line(title, "", lambda own, name=name: f"{own[name]:.1f}"))
    leads = [record["leads"][name] for name in systems if name != MODEL]
    lines.append(["model is ahead by", "", "", *(f"{own['macro']:+.1f}" for own in leads)])
    lines.append(["  95 % interval", "", "", *(span(own["low"], own["high"], "+") for own in leads)])
    return lines


def span(low: float, high: float, sign: str = "") -> str:
    """An interval in words; `sign` "+" for differences."""
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers of a record mean, and what is missing from them, as Markdown items."""
    lines = [*_meaning(record), told_weights(record["provenance"]), *told_skips(record)]
    return [f"- {line}" for line in lines]


def _meaning(record: Mapping[str, Any]) -> Sequence[str]:
    own, protocol = record["metrics"], record["protocol"]
    shown = GEOMETRY[protocol["geometry"]] + IMAGES[protocol["images"]]
    if not own:
        return [shown]
    form = f"replies: {own['of_form']:.0f} % begin as asked with a letter or number, {own['cut']:.0f} % reach "
    form += f"{protocol['max_new_tokens']} tokens, {own['repetitive']:.0f} % repeat themselves"
    blind = [f"{name}: {BASELINES[name]}" for name in record["baselines"] if name in BASELINES]
    lines = [
        f"percent; {protocol['scoring']}",
        f"baselines never look; fitted on {NUM_TRAINING} training rooms",
        *blind,
        f"shown: {shown}",
        form,
    ]
    if own["of_form"] < WELL_FORMED:
        lines.append("FEW REPLIES OF THE ASKED FORM: the model has not learned to answer like this")
    if protocol["modified"]:
        lines.append("MODIFIED protocol: comparable only with runs that changed the same constants")
    gate = record.get("gate")
    return lines if gate is None else [*lines, f"gate {'passed' if gate['passed'] else 'MISSED'}: {told(gate)}"]
