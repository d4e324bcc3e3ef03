"""Exact box distances against a convex solver and against dense samples."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from g2vlm.data.qa.boxes import Box, box_distances, point_distance
from tests.g2vlm.data.qa.oracle import between, from_point
from tests.g2vlm.data.qa.random_scenes import random_box


def surface(box: Box, spacing: float = 0.03) -> np.ndarray:
    """Points all over a box, at most `spacing` apart along its axes."""
    steps = [np.linspace(-0.5, 0.5, int(np.ceil(size / spacing)) + 1) * size for size in box.size]
    return box.centre + np.stack(np.meshgrid(*steps), -1).reshape(-1, 3) @ box.rotation.T


def pairs(count: int, spread: float) -> tuple[list[Box], list[Box]]:
    generator = np.random.default_rng(int(10 * spread))
    return [random_box(generator, spread) for _ in range(count)], [random_box(generator, spread) for _ in range(count)]


@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0])
def test_boxes_against_a_solver(spread: float) -> None:
    first, second = pairs(60, spread)
    expected = [between(a, b) for a, b in zip(first, second, strict=True)]
    assert box_distances(first, second) == pytest.approx(expected, abs=1e-6)
    assert box_distances(second, first) == pytest.approx(expected, abs=1e-6)


def test_boxes_against_samples() -> None:
    first, second = pairs(12, 1.0)
    for a, b, distance in zip(first, second, box_distances(first, second), strict=True):
        sampled = cKDTree(surface(a)).query(surface(b))[0].min()
        assert distance - 1e-9 <= sampled <= distance + 0.06


def test_some_pairs_meet_and_some_are_closest_at_edges() -> None:
    first, second = pairs(60, 1.0)
    distances = box_distances(first, second)
    corners = [
        min(point_distance(a.corners, b).min(), point_distance(b.corners, a).min())
        for a, b in zip(first, second, strict=True)
    ]
    assert (distances == 0).any()
    assert (distances < np.array(corners) - 1e-3)[distances > 0].any()


def test_crossing_boxes_without_a_corner_inside_each_other() -> None:
    flat, tall = (Box(np.zeros(3), np.array(size), np.eye(3)) for size in ((4.0, 1.0, 1.0), (0.5, 0.5, 4.0)))
    assert box_distances([flat], [tall])[0] == 0


def test_parallel_boxes() -> None:
    a = Box(np.zeros(3), np.ones(3), np.eye(3))
    for offset, distance in (((2.0, 0.2, 0.1), 1.0), ((2.0, 2.0, 0.0), np.sqrt(2)), ((1.0, 0.0, 0.0), 0.0)):
        assert box_distances([a], [Box(np.array(offset), np.ones(3), np.eye(3))])[0] == pytest.approx(distance)


def test_each_pair_is_independent_of_the_others() -> None:
    first, second = pairs(9, 1.0)
    alone = [box_distances([a], [b])[0] for a, b in zip(first, second, strict=True)]
    assert box_distances(first, second).tolist() == alone
    assert box_distances([], []).shape == (0,)


def test_points_against_a_solver() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        box, points = random_box(generator, 1.0), generator.uniform(-2, 2, (5, 3))
        assert point_distance(points, box) == pytest.approx([from_point(p, box) for p in points], abs=1e-7)
    assert point_distance(box.centre[None], box)[0] == 0
