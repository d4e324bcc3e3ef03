"""ATE and RPE against evo (tests/golden/metrics/README.md, families traj_* and traj_aggregate)."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from geometry.metrics.aggregate import plain_mean
from geometry.metrics.poses import TrajectoryMetrics, trajectory_metrics
from tests.parity.golden import cases

pytestmark = pytest.mark.parity
TOLERANCE = 1e-9


def evaluate(path: Path) -> TrajectoryMetrics:
    data = np.load(path)
    return trajectory_metrics(data["pred_c2w"], data["gt_c2w"])


@pytest.mark.parametrize("path", cases("metrics/traj_*.npz"))
def test_trajectory(path: Path) -> None:
    data = np.load(path)
    expected = [data["ate_rmse"], data["rpe_trans_rmse"], data["rpe_rot_deg_rmse"]]
    np.testing.assert_allclose(astuple(evaluate(path)), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("path", cases("metrics/traj_aggregate.json"))
def test_mean_over_sequences(path: Path) -> None:
    aggregate = json.loads(path.read_text(encoding="utf-8"))
    sequences = [evaluate(case) for case in sorted(path.parent.glob("traj_*.npz"))]
    np.testing.assert_allclose([astuple(s) for s in sequences], aggregate["per_case"], rtol=TOLERANCE, atol=TOLERANCE)
    mean = astuple(plain_mean(sequences))
    np.testing.assert_allclose(mean, aggregate["mean_over_sequences"], rtol=TOLERANCE, atol=TOLERANCE)
