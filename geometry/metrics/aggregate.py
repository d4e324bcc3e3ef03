"""Datasets from sequences: the plain mean, field by field, of results that are dataclasses of numbers."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import TypeVar

import numpy as np

from geometry.metrics.points import DistanceMetrics, PointMetrics
from geometry.metrics.poses import TrajectoryMetrics

Result = TypeVar("Result", DistanceMetrics, PointMetrics, TrajectoryMetrics)


def plain_mean(results: Sequence[Result]) -> Result:
    """Mean of each field over the sequences that were evaluated; skipped ones do not count.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("results: needs at least one sequence")
    means = np.mean([astuple(result) for result in results], axis=0)
    return type(results[0])(*(float(mean) for mean in means))
