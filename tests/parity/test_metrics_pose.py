"""Relative-pose metrics against the peers' evaluators (tests/golden/metrics/README.md, family pose_*)."""

import json
from pathlib import Path

import numpy as np
import pytest

from geometry.metrics.poses import (
    RELATIVE_POSES,
    PairErrors,
    PoseMetrics,
    mean_pose_metrics,
    pair_errors,
    pool_pairs,
    pose_metrics,
    view_pairs,
)
from tests.parity.golden import cases

pytestmark = pytest.mark.parity
ERROR_DEG = 1e-8
EXACT = 1e-12  # accuracies are counts over pairs: equal up to the rounding of one division
COLUMNS = {"racc": "rra", "tacc": "rta", "auc": "auc"}


def errors(path: Path, convention: str) -> PairErrors:
    data = np.load(path)
    return pair_errors(data["pred_w2c"], data["gt_w2c"], RELATIVE_POSES[convention])


def value(metrics: PoseMetrics, column: str) -> float:
    """The metric that the fixture calls, for example, `racc_15`."""
    name, threshold = column.split("_")
    return getattr(metrics, COLUMNS[name])[int(threshold)]


def metrics_for(pairs: PairErrors, columns: list[str]) -> PoseMetrics:
    limits = {int(column.split("_")[1]) for column in columns}
    return pose_metrics(pairs, sorted(limits), sorted(limits))


@pytest.mark.parametrize("path", cases("metrics/pose_*.npz"))
def test_pairs(path: Path) -> None:
    data = np.load(path)
    np.testing.assert_array_equal(view_pairs(len(data["gt_w2c"])), data["pairs"])


@pytest.mark.parametrize("convention", RELATIVE_POSES)
@pytest.mark.parametrize("path", cases("metrics/pose_*.npz"))
def test_rotation_errors(path: Path, convention: str) -> None:
    expected = np.load(path)[f"rot_err_deg_{convention}"]
    np.testing.assert_allclose(errors(path, convention).rotation_deg, expected, rtol=0, atol=ERROR_DEG)


@pytest.mark.parametrize("convention", RELATIVE_POSES)
@pytest.mark.parametrize("path", cases("metrics/pose_*.npz"))
def test_translation_errors(path: Path, convention: str) -> None:
    pairs = errors(path, convention)
    covered = ~pairs.zero_baseline  # without a true baseline the peers' value is round-off noise
    expected = np.load(path)[f"trans_err_deg_{convention}"]
    np.testing.assert_allclose(pairs.translation_deg[covered], expected[covered], rtol=0, atol=ERROR_DEG)


@pytest.mark.parametrize("convention", RELATIVE_POSES)
@pytest.mark.parametrize("path", cases("metrics/pose_*.npz"))
def test_accuracies(path: Path, convention: str) -> None:
    data = np.load(path)
    columns = [key.removesuffix(f"_{convention}") for key in data if is_accuracy(key, convention)]
    metrics = metrics_for(errors(path, convention), columns)
    expected = [float(data[f"{column}_{convention}"]) for column in columns]
    assert columns
    np.testing.assert_allclose([value(metrics, column) for column in columns], expected, rtol=EXACT, atol=0)


def is_accuracy(key: str, convention: str) -> bool:
    """`racc_15_pi3` and the like; not the unreported `auc_30_torch_histc_pi3`."""
    parts = key.split("_")
    return len(parts) == 3 and parts[0] in COLUMNS and parts[2] == convention


@pytest.mark.parametrize("convention", RELATIVE_POSES)
@pytest.mark.parametrize("rule", ["pooled", "mean_of_cases"])
@pytest.mark.parametrize("path", cases("metrics/pose_aggregate.json"))
def test_dataset_value(path: Path, rule: str, convention: str) -> None:
    expected = json.loads(path.read_text(encoding="utf-8"))[f"{rule}_{convention}"]
    columns = list(expected)
    sequences = [errors(case, convention) for case in sorted(path.parent.glob("pose_*.npz"))]
    if rule == "pooled":
        metrics = metrics_for(pool_pairs(sequences), columns)
    else:
        metrics = mean_pose_metrics([metrics_for(sequence, columns) for sequence in sequences])
    given = [value(metrics, column) for column in columns]
    np.testing.assert_allclose(given, list(expected.values()), rtol=EXACT, atol=0)
