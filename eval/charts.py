"""Line charts with numpy and PIL alone.

Pictures are drawn at twice their size and reduced, which smooths the lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from g2vlm.preview import INK, MUTED, NOTHING, PAGE, font

WIDTH, HEIGHT = 960, 420
LEFT, TOP, RIGHT, BOTTOM = 60, 46, 24, 52
LEGEND_ROW, ENTRY_GAP = 26, 26
FINE = 2
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: in the legend; an empty one has no entry.
        points: (N, 2) x and y; points that are not finite are left out.
        colour: of the line.
        width: of the line in pixels.
        dots: mark every point.
    """

    name: str
    points: np.ndarray
    colour: Colour
    width: float = 2.0
    dots: bool = False


def running_mean(points: np.ndarray, window: int) -> np.ndarray:
    """Points (N, 2) with each y replaced by the mean over the `window` points around it, fewer at the ends."""
    half = window // 2
    means = [points[max(0, i - half) : i + half + 1, 1].mean() for i in range(len(points))]
    return np.column_stack([points[:, 0], means])


def line_chart(
    title: str, x_label: str, series: Sequence[Series], y_range: tuple[float, float] | None = None
) -> Image.Image:
    """Series over a common x axis. The legend stands beside the title, or in rows under it where it is too long.

    Args:
        title: above the chart.
        x_label: under it.
        series: drawn in this order, those without a finite point not at all.
        y_range: of the y axis; by default from zero to where 99 % of the values lie below.
    """
    finite = [Series(s.name, _finite(s.points), s.colour, s.width, s.dots) for s in series]
    shown = [s for s in finite if len(s.points)]
    axes = _Axes.around(np.concatenate([s.points for s in shown]) if shown else np.ones((1, 2)))
    rows = _legend_rows(title, [s for s in shown if s.name])
    axes = replace(axes, y=y_range or axes.y, top=TOP + LEGEND_ROW * (len(rows) - 1))
    page = Image.new("RGB", (FINE * WIDTH, FINE * HEIGHT), PAGE)
    draw = ImageDraw.Draw(page)
    _draw_frame(draw, axes, x_label)
    for one in shown:
        _draw_series(draw, axes, one)
    _draw_heading(draw, title, rows)
    return page.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def ticks(low: float, high: float, count: int = 6) -> np.ndarray:
    """About `count` round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return np.arange(np.ceil(low / step), np.floor(high / step + 1e-9) + 1) * step


@dataclass(frozen=True)
class _Axes:
    """Ranges of the data, and where they lie on the page."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: int = TOP

    @classmethod
    def around(cls, points: np.ndarray) -> "_Axes":
        """Axes that show points (N, 2)."""
        left, right = points[:, 0].min(), points[:, 0].max()
        top = 1.05 * float(np.percentile(points[:, 1], 99))
        return cls((float(left), float(max(right, left + 1))), (0.0, top if top > 0 else 1.0))

    def place(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Pixels on the page of points (N, 2); what is above the chart is drawn at its upper edge."""
        share_x = (points[:, 0] - self.x[0]) / (self.x[1] - self.x[0])
        share_y = np.clip((points[:, 1] - self.y[0]) / (self.y[1] - self.y[0]), 0, 1)
        x = LEFT + share_x * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - share_y * (HEIGHT - self.top - BOTTOM)
        return [(FINE * a, FINE * b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _finite(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _draw_frame(draw: ImageDraw.ImageDraw, axes: _Axes, x_label: str) -> None:
    """Grid lines, their numbers, and the name of the x axis."""
    small = font(14 * FINE)
    for value in ticks(*axes.y):
        start, end = axes.place(np.array([(axes.x[0], value), (axes.x[1], value)]))
        draw.line((start, end), NOTHING, FINE)
        draw.text((start[0] - 8 * FINE, start[1]), f"{value:g}", MUTED, small, anchor="rm")
    for value in ticks(*axes.x):
        ((x, y),) = axes.place(np.array([(value, axes.y[0])]))
        draw.line((x, y, x, y + 5 * FINE), MUTED, FINE)
        draw.text((x, y + 8 * FINE), f"{value:,.6g}", MUTED, small, anchor="ma")
    middle = FINE * (LEFT + (WIDTH - LEFT - RIGHT) / 2)
    draw.text((middle, FINE * (HEIGHT - 6)), x_label, MUTED, small, anchor="md")


def _draw_series(draw: ImageDraw.ImageDraw, axes: _Axes, series: Series) -> None:
    places = axes.place(series.points)
    if len(places) > 1:
        draw.line(places, series.colour, round(FINE * series.width), joint="curve")
    if series.dots or len(places) == 1:
        radius = 4 * FINE
        for x, y in places:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), series.colour)


def _legend_rows(title: str, series: Sequence[Series]) -> list[list[Series]]:
    """The series in rows of the legend; the first row is beside the title, and empty where not all have room there."""
    page = WIDTH - LEFT - RIGHT
    if sum(map(_entry_width, series)) <= page - font(19 * FINE).getlength(title) / FINE - ENTRY_GAP:
        return [[*series]]
    rows: list[list[Series]] = [[], []]
    for one in series:
        if rows[-1] and sum(map(_entry_width, [*rows[-1], one])) > page:
            rows.append([])
        rows[-1].append(one)
    return rows


def _entry_width(series: Series) -> float:
    """Pixels of an entry with its line and the gap before it."""
    return font(14 * FINE).getlength(series.name) / FINE + 2 * ENTRY_GAP


def _draw_heading(draw: ImageDraw.ImageDraw, title: str, rows: Sequence[Sequence[Series]]) -> None:
    """The title to the left, the rows of the legend to the right."""
    draw.text((FINE * LEFT, FINE * 12), title, INK, font(19 * FINE))
    small = font(14 * FINE)
    for number, row in enumerate(rows):
        right, middle = FINE * (WIDTH - RIGHT), FINE * (22 + LEGEND_ROW * number)
        for one in reversed(row):
            right -= draw.textlength(one.name, small)
            draw.text((right, middle), one.name, MUTED, small, anchor="lm")
            draw.line((right - 32 * FINE, middle, right - 8 * FINE, middle), one.colour, 4 * FINE)
            right -= 2 * ENTRY_GAP * FINE
