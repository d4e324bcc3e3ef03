"""How correspondence is told: `results.json`, one table, and charts over layers and over the steps of a walk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.charts import Colour, Series, line_chart
from eval.correspondence_run import best_layer, layers_of, pck_name
from eval.correspondence_scores import (
    AFTER,
    ATTENTION,
    BASELINES,
    BEFORE,
    COLOUR,
    DISTANCES,
    EXPERT,
    HIDDEN,
    IDENTITY,
    RANDOM,
    SERIES,
)
from eval.records import NO_METRICS, counted, markdown_rows, text_rows, told_skips, told_weights
from g2vlm.preview import MUTED
from geometry.io.common import atomic_file

TRAINED = "trained_size/"
PCK = pck_name(DISTANCES[0])
KEPT_AT = (8, 16, 24)
LABELS = {
    AFTER: "q.k after rotary",
    BEFORE: "q.k before rotary",
    ATTENTION: "attention",
    HIDDEN: "hidden states",
    EXPERT: "geometric expert",
}
CONFIDENT = {AFTER: "r after", BEFORE: "r before", ATTENTION: "r attention"}
COLOURS: dict[str, Colour] = {
    AFTER: (36, 99, 190), BEFORE: (120, 176, 232), ATTENTION: (22, 160, 150), HIDDEN: (232, 119, 34),
    EXPERT: (140, 80, 170), IDENTITY: (60, 64, 72), RANDOM: (150, 156, 166), COLOUR: (190, 150, 120),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- table


def table(record: Mapping[str, Any]) -> str:
    """Results as text: what was measured, then PCK by layer and series, baselines, and what a walk leaves of it."""
    body = text_rows(rows(record), names=1) if record["metrics"] else NO_METRICS
    return "\n".join([*_heading(record), "", body, "", *(f"- {note}" for note in notes(record))])


def markdown(record: Mapping[str, Any]) -> str:
    """The same as a Markdown fragment."""
    body = markdown_rows(rows(record), names=1) if record["metrics"] else NO_METRICS
    lines = [f"### {record['benchmark']}", "", *_heading(record)[1:], "", body, ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(record)), ""])


def _heading(record: Mapping[str, Any]) -> list[str]:
    counts = f"{counted(record['count'], 'clip')}, {len(record['skipped'])} skipped"
    return [record["benchmark"], f"{record['protocol']['about']}; {counts}; model: {record['model']}"]


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A line per layer and baseline for each size of the views, then the shares that are kept along a walk."""
    values, protocol = record["metrics"], record["protocol"]
    series = [name for name in SERIES if best_layer(values, name) is not None]
    confident = [name for name in series if name in CONFIDENT]
    head = ["PCK@2, %", *(LABELS[name] for name in series), *(CONFIDENT[name] for name in confident)]
    found = [head]
    for prefix, size in (("", protocol["size"]), (TRAINED, protocol["trained_size"])):
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if not layers_of(own):
            continue
        grid = " x ".join(map(str, protocol["grids"][str(size)]))
        found.append([f"views of {size} px, {grid} cells", *[""] * (len(head) - 1)])
        found += [_layer_row(own, layer, series, confident) for layer in layers_of(own)]
        for name in BASELINES:
            value = f"{record['baselines'][name][prefix + PCK]:.1f}"
            found.append([f"  {name}", *[value] * len(series), *[""] * len(confident)])
    if protocol["paths"]:
        best = {name: best_layer(values, name) for name in series}
        found.append([f"walk, layer {', '.join(str(best[name]) for name in series)}", *[""] * (len(head) - 1)])
        for offset in KEPT_AT:
            names = [f"kept/{name}/{best[name]}/{offset}" for name in series]
            if all(name in values for name in names):
                cells = [_cell(values.get(name), "{:.0f}") for name in names]
                found.append([f"  kept at offset {offset}, %", *cells, *[""] * len(confident)])
    return found


def _layer_row(values: Mapping[str, float], layer: int, series: Sequence[str], confident: Sequence[str]) -> list[str]:
    shares = [_cell(values.get(f"{PCK}/{name}/{layer}"), "{:.1f}") for name in series]
    return [
        f"  layer {layer}",
        *shares,
        *(_cell(values.get(f"confidence_r/{n}/{layer}"), "{:+.2f}") for n in confident),
    ]


def _cell(value: float | None, number: str) -> str:
    return "-" if value is None or not np.isfinite(value) else number.format(value)


def notes(record: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, and what is missing from them."""
    lines = [
        f"PCK@{DISTANCES[0]}: share of the points seen in both views whose cell is at most {DISTANCES[0]} cells off; "
        "in a small grid most cells are, so read it beside `random cell`",
        *(f"{LABELS[name]}: {meaning}" for name, meaning in SERIES.items()),
        "r: correlation over all these points of the largest attention with being right; - where all or none are",
        *(f"{name}: {meaning}" for name, meaning in BASELINES.items()),
        "kept: PCK at an offset along a walk as a share of that one step on, in the layer of the largest PCK; a model "
        "at chance keeps nearly all of it, so read walk.png too",
    ]
    if record["protocol"]["modified"]:
        lines.append("MODIFIED protocol: comparable only with runs that changed the same constants")
    return [*lines, told_weights(record["provenance"]), *told_skips(record)]


# ---------------------------------------------------------------------------------------------- charts


def write_charts(record: Mapping[str, Any], folder: Path) -> None:
    """Write `pck.png`, `confidence.png`, and of walks `walk.png` and `kept.png`."""
    pictures = {"pck.png": pck_chart(record), "confidence.png": confidence_chart(record)}
    if record["curves"]["pck2"]:
        pictures |= {"walk.png": walk_chart(record), "kept.png": kept_chart(record)}
    for name, picture in pictures.items():
        with atomic_file(folder / name) as file:
            picture.save(file, format="PNG")


def pck_chart(record: Mapping[str, Any]) -> Image.Image:
    """PCK by layer, baselines as level lines."""
    values = record["metrics"]
    ends = [layers_of(values)[0], layers_of(values)[-1]]
    level = {name: np.array([(x, record["baselines"][name][PCK]) for x in ends]) for name in BASELINES}
    lines = [Series(name, points, COLOURS[name], 1.5) for name, points in level.items()]
    lines += [Series(LABELS[name], by_layer(values, PCK, name), COLOURS[name], 2.5, dots=True) for name in SERIES]
    title = f"Points matched within {DISTANCES[0]} cells, % ({record['model']}, {record['protocol']['size']} px)"
    return line_chart(title, "layer", lines, (0, 100))


def confidence_chart(record: Mapping[str, Any]) -> Image.Image:
    """Correlation of confidence and being right by layer."""
    values = record["metrics"]
    ends = [0, layers_of(values)[-1]]
    lines = [Series("none", np.array([(x, 0.0) for x in ends]), MUTED, 1)]
    lines += [
        Series(LABELS[name], by_layer(values, "confidence_r", name), COLOURS[name], 2.5, dots=True)
        for name in CONFIDENT
    ]
    return line_chart("Correlation of confidence with being right", "layer", lines, (-1, 1))


def walk_chart(record: Mapping[str, Any]) -> Image.Image:
    """PCK by offset along a walk: each series in its best layer, and the baselines."""
    curves = record["curves"]["pck2"]
    lines = [Series(name, _by_offset(curves[name]), COLOURS[name], 1.5) for name in BASELINES]
    for name, layer in _best(record).items():
        curve = _by_offset(curves[f"{name}/{layer}"])
        lines.append(Series(f"{LABELS[name]}, layer {layer}", curve, COLOURS[name], 2.5, dots=True))
    title = f"Points matched within {DISTANCES[0]} cells along a walk, %"
    return line_chart(title, "offset from the first frame", lines, (0, 100))


def kept_chart(record: Mapping[str, Any]) -> Image.Image:
    """The same as shares of the value at offset 1; a baseline that cannot fall shows what that is worth."""
    curves = record["curves"]["pck2"]
    lines = [Series(n, _relative(curves[n]), COLOURS[n], 1.5) for n in BASELINES]
    for name, layer in _best(record).items():
        curve = _relative(curves[f"{name}/{layer}"])
        lines.append(Series(f"{LABELS[name]}, layer {layer}", curve, COLOURS[name], 2.5, dots=True))
    return line_chart("Kept of the share at offset 1, %", "offset from the first frame", lines)


def by_layer(values: Mapping[str, float], metric: str, series: str) -> np.ndarray:
    """(layers, 2) layer and value; without rows where the series has none."""
    names = [(layer, f"{metric}/{series}/{layer}") for layer in layers_of(values)]
    return np.array([(layer, values[name]) for layer, name in names if name in values]).reshape(-1, 2)


def _best(record: Mapping[str, Any]) -> dict[str, int]:
    found = {name: best_layer(record["metrics"], name) for name in SERIES}
    return {name: layer for name, layer in found.items() if layer is not None}


def _by_offset(curve: Sequence[float]) -> np.ndarray:
    return np.column_stack([np.arange(1, len(curve) + 1), np.asarray(curve, dtype=np.float64)])


def _relative(curve: Sequence[float]) -> np.ndarray:
    points = _by_offset(curve)
    first = points[0, 1]
    points[:, 1] = 100 * points[:, 1] / first if first > 0 else np.nan
    return points
