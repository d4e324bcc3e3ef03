"""Charts: what is drawn is where the numbers are."""

import numpy as np
import pytest
from PIL import Image

from eval.charts import HEIGHT, WIDTH, Series, line_chart, running_mean, ticks

RED, BLUE = (220, 0, 0), (0, 0, 220)


def rows_of(picture: Image.Image, colour: tuple[int, int, int], left: float, right: float) -> np.ndarray:
    """Rows of the chart's area with pixels of a colour, between two shares of its width."""
    pixels = np.asarray(picture).astype(int)[46:-52, int(left * WIDTH) : int(right * WIDTH)]
    return np.nonzero(np.abs(pixels - colour).max(-1) < 40)[0]


def test_a_falling_line_falls_and_a_higher_one_is_above() -> None:
    steps = np.arange(1, 101)
    falling, low = np.column_stack([steps, 300 / (50 + steps)]), np.column_stack([steps, np.full(100, 0.3)])
    picture = line_chart("loss", "step", [Series("a", falling, RED), Series("b", low, BLUE)])
    assert picture.size == (WIDTH, HEIGHT)
    start, end, flat = (
        rows_of(picture, RED, 0.08, 0.15),
        rows_of(picture, RED, 0.85, 0.95),
        rows_of(picture, BLUE, 0.2, 0.9),
    )
    assert start.max() < end.min() < end.max() < flat.min()
    assert np.ptp(flat) < 4


def test_values_that_are_no_numbers_leave_no_mark_and_spikes_do_not_squash_the_rest() -> None:
    steps = np.arange(1000.0)
    values = np.full(1000, 2.0)
    values[5], values[6], values[7] = np.nan, np.inf, 1e6
    rows = rows_of(line_chart("", "", [Series("a", np.column_stack([steps, values]), RED)]), RED, 0.3, 0.9)
    assert 0 < rows.mean() < 40  # 2 is near the top of its own range


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_and_one_point_can_be_drawn(count: int) -> None:
    picture = line_chart("loss", "step", [Series("a", np.full((count, 2), 3.0), RED)])
    assert len(rows_of(picture, RED, 0, 1)) > 10 * count - 1


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 3.4).tolist() == [0, 1, 2, 3]
    assert ticks(1, 1500).tolist() == [500, 1000, 1500]
    assert ticks(0, 0.07) == pytest.approx([0, 0.02, 0.04, 0.06])


def test_running_mean() -> None:
    points = np.column_stack([np.arange(5), [0.0, 3, 6, 3, 0]])
    assert running_mean(points, 3)[:, 1].tolist() == [1.5, 3, 4, 3, 1.5]
    assert running_mean(points, 1).tolist() == points.tolist()
