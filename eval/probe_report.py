"""How probes are told: one table, charts of their training and of answers by their quality, pictures of depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from eval.baselines import CONSTANT, UNTRAINED
from eval.charts import Colour, Series, line_chart, running_mean
from eval.evaluate import MODEL
from eval.probe_data import Features
from eval.records import counted, markdown_rows, text_rows, told_skips, told_weights
from g2vlm.preview import (
    INK,
    MARGIN,
    MUTED,
    PAGE,
    WIDTH,
    depth_colours,
    depth_legend,
    font,
    grid,
    percentile_range,
    stack,
)
from geometry.io.common import atomic_file

GREY = "grey images"
BASELINES = {
    CONSTANT: "the best constant depth of each room, seen by no model",
    UNTRAINED: "a probe of the same architecture with random weights",
    GREY: "a probe of the same model when both encoders see grey and no views are given",
}
METRICS = {
    "rmse": ("RMSE, m", "lower", "{:.3f}"),
    "abs_rel": ("AbsRel", "lower", "{:.3f}"),
    "abs_rel_scaled": ("AbsRel, one scale per room", "lower", "{:.3f}"),
}
BIN_METRICS = {"bin_accuracy": ("answers, %", "higher", "{:.1f}"), "bin_rmse": ("RMSE, m", "", "{:.3f}")}
COLOURS: tuple[Colour, ...] = ((36, 99, 190), (232, 119, 34), (22, 160, 150), (140, 80, 170), (200, 60, 90))
SHOWN_VIEWS = 4


# ---------------------------------------------------------------------------------------------- one model


def table(record: Mapping[str, Any]) -> str:
    """Results as text: what was measured, then a line per metric with the probe and its baselines side by side."""
    return "\n".join([*_heading(record), "", text_rows(rows(record), names=2), "", *_items(notes(record))])


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    head = [f"### {record['benchmark']}", "", *_heading(record)[1:]]
    return "\n".join([*head, "", markdown_rows(rows(record), names=2), "", *_items(notes(record)), ""])


def _items(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _heading(record: Mapping[str, Any]) -> list[str]:
    size = record["protocol"]["size"]
    told = f"{counted(record['count'], 'room')}, views of {size} px; model: {record['model']}"
    return [record["benchmark"], f"{record['protocol']['about']}; {told}"]


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Head, a line per metric, and of answers a line per bin."""
    systems = {MODEL: record["metrics"], **record["baselines"]}
    found = [["", "better", *systems]]
    for name, (label, better, number) in METRICS.items():
        found.append([label, better, *(number.format(own[name]) if name in own else "-" for own in systems.values())])
    for bin_number in _bins(record["metrics"]):
        for name, (label, better, number) in BIN_METRICS.items():
            value = number.format(record["metrics"][f"{name}/{bin_number}"])
            found.append([f"bin {bin_number}: {label}", better, value, *["-"] * len(record["baselines"])])
    return found


def _bins(metrics: Mapping[str, float]) -> list[int]:
    return sorted(int(name.rsplit("/", 1)[1]) for name in metrics if name.startswith("bin_accuracy/"))


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers mean."""
    protocol = record["protocol"]
    lines = [
        f"probe: one DPT head (depth alone, {protocol['probe']['channels']} channels) on layers "
        f"{', '.join(map(str, protocol['layers']))} of the frozen model, {protocol['probe']['steps']} steps on "
        f"{counted(protocol['training_rooms'], 'training room')}",
        "RMSE: plain, over all pixels together; AbsRel: mean over rooms",
        *(f"{name}: {BASELINES[name]}" for name in record["baselines"]),
    ]
    if _bins(record["metrics"]):
        lines.append("bins: questions in four equal parts by the probe's RMSE in their room, bin 1 the worst")
    if protocol["modified"]:
        lines.append("MODIFIED protocol: comparable only with runs that changed the same constants")
    return [*lines, told_weights(record["provenance"]), *told_skips(record)]


# ---------------------------------------------------------------------------------------------- several models


def models_table(record: Mapping[str, Any]) -> str:
    """A line per model, and the rank correlation of error and answers, as text."""
    lines = [record["benchmark"], record["protocol"]["about"], "", text_rows(_model_rows(record), names=1)]
    return "\n".join([*lines, "", *_items(_model_notes(record))])


def models_markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    lines = [f"### {record['benchmark']}", "", record["protocol"]["about"], ""]
    return "\n".join([*lines, markdown_rows(_model_rows(record), names=1), "", *_items(_model_notes(record)), ""])


def _model_rows(record: Mapping[str, Any]) -> list[list[str]]:
    answered = all("answers" in own["metrics"] for own in record["models"].values())
    found = [["", *(label for label, _, _ in METRICS.values()), *(["answers, %"] if answered else [])]]
    for name, own in record["models"].items():
        cells = [number.format(own["metrics"][metric]) for metric, (_, _, number) in METRICS.items()]
        found.append([name, *cells, *([f"{own['metrics']['answers']:.1f}"] if answered else [])])
    return found


def _model_notes(record: Mapping[str, Any]) -> list[str]:
    value = record["metrics"].get("spearman")
    told = "" if value is None else f"{value:+.2f}" if np.isfinite(value) else "needs three models that differ"
    notes = [f"Spearman correlation of RMSE and answers over {len(record['models'])} models: {told}"]
    if value is None:
        notes = ["no answers were given or asked for (--answers, --benchmark): no correlation"]
    sizes = {name: own["protocol"]["size"] for name, own in record["models"].items()}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{name} {size} px" for name, size in sizes.items())
        notes.append(f"NOT COMPARABLE: views of different sizes ({listed}); give one --size")
    return notes


# ---------------------------------------------------------------------------------------------- charts


def training_chart(curves: Mapping[str, np.ndarray], heldout: Mapping[str, np.ndarray]) -> Image.Image:
    """Error on training batches, smoothed, and RMSE on held-out rooms, per system.

    Args:
        curves: (steps, 2) per system.
        heldout: (n, 2) per system.
    """
    lines = []
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        lines.append(Series("", running_mean(curve, max(1, len(curve) // 20)), colour, 1))
        lines.append(Series(name, heldout[name], colour, 2.5, dots=True))
    title = "Dots: RMSE of held-out rooms; thin: mean error of training batches; metres"
    return line_chart(title, "step", lines)


def bins_chart(metrics: Mapping[str, float]) -> Image.Image:
    """Answers by bin."""
    points = np.array([(number, metrics[f"bin_accuracy/{number}"]) for number in _bins(metrics)])
    mean = np.array([(x, metrics["answers"]) for x in points[[0, -1], 0]])
    lines = [Series("all questions", mean, MUTED, 1), Series("bin", points, COLOURS[0], 2.5, dots=True)]
    return line_chart(
        "Answers by how well depth is probed in their room, %",
        "bin, 1: largest error",
        lines,
        around(points[:, 1].tolist()),
    )


def models_chart(record: Mapping[str, Any]) -> Image.Image:
    """A dot per model: RMSE to the right, answers upwards."""
    lines = [
        Series(name, np.array([(100 * own["metrics"]["rmse"], own["metrics"]["answers"])]), COLOURS[i % len(COLOURS)])
        for i, (name, own) in enumerate(record["models"].items())
    ]
    values = [own["metrics"]["answers"] for own in record["models"].values()]
    return line_chart("Answers by the probe's RMSE, %", "RMSE, cm", lines, around(values))


def around(values: Sequence[float], margin: float = 5.0) -> tuple[float, float]:
    """Range of an axis that shows percentages with room around them."""
    return max(0.0, min(values) - margin), min(100.0, max(values) + margin)


# ---------------------------------------------------------------------------------------------- depth


def depth_picture(room: str, images: np.ndarray, depths: Mapping[str, Tensor], features: Features) -> Image.Image:
    """Views of a room, true depth, and every probe's, all in the same colours.

    Args:
        room: its name.
        images: (S, H, W, 3) uint8.
        depths: per probe, (F, H, W) of all rooms.
        features: with the truth.
    """
    own = features.room == features.names.index(room)
    views = range(min(SHOWN_VIEWS, len(images)))
    truth = features.depth[own].numpy()
    shown = percentile_range(truth[features.valid[own].numpy()])
    maps = {"truth": truth, **{name: depth[own].numpy() for name, depth in depths.items()}}
    cells = [[images[view] for view in views]]
    cells += [[depth_colours(depth[view], shown) for view in views] for depth in maps.values()]
    names, columns = ["input", *maps], [f"view {view + 1}" for view in views]
    heading = Image.new("RGB", (WIDTH - 2 * MARGIN, 34), PAGE)
    ImageDraw.Draw(heading).text((0, 0), f"{room}: true depth, and what probes read out of the layers", INK, font(24))
    pictures = grid(cells, [[None] * len(columns)] * len(names), names, columns)
    return stack([heading, pictures, depth_legend(shown, "metre")])


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
