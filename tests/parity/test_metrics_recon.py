"""Point-map protocol against the peers' evaluator and Open3D (tests/golden/metrics/README.md, family recon_*)."""

from dataclasses import astuple
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from geometry.metrics.points import (
    PointEvaluation,
    completion_ratio,
    corresponding_points,
    distance_metrics,
    evaluate_points,
)
from geometry.registration import apply_similarity, estimate_normals, fit_similarity
from tests.parity.golden import cases

pytestmark = pytest.mark.parity
each_case = pytest.mark.parametrize("path", cases("metrics/recon_*.npz"))


@cache
def evaluation(path: Path) -> PointEvaluation:
    data = np.load(path)
    return evaluate_points(data["pred"], data["gt"], data["mask"], float(data["icp_threshold"]))


def close(given: object, expected: np.ndarray, tolerance: float, floor: float = 0.0) -> None:
    np.testing.assert_allclose(given, expected, rtol=tolerance, atol=floor)


@each_case
def test_umeyama(path: Path) -> None:
    data, similarity = np.load(path), evaluation(path).similarity
    extent = float(np.abs(data["gt"][data["mask"]]).max())  # the peers fit in float32: the error scales with the scene
    close(similarity.scale, data["umeyama_scale"], 1e-5)
    close(similarity.rotation, data["umeyama_R"], 1e-5, floor=1e-5)
    close(similarity.translation, data["umeyama_t"], 1e-5, floor=1e-5 * extent)


@each_case
def test_distances_before_icp(path: Path) -> None:
    data = np.load(path)
    source, target = corresponding_points(data["pred"], data["gt"], data["mask"])
    aligned = apply_similarity(fit_similarity(source, target), source)
    close(astuple(distance_metrics(aligned, target)), data["pre_icp"], 1e-4)


@each_case
def test_icp(path: Path) -> None:
    data, registration = np.load(path), evaluation(path).registration
    # 1e-4 for scenes in metres; translations of the millimetre-scale case are larger, the README allows 1e-3.
    tolerance = 1e-4 if float(data["icp_threshold"]) < 1 else 1e-3
    close(registration.transform, data["icp_transform"], tolerance, floor=tolerance)
    close(registration.fitness, data["icp_fitness"], 1e-4)
    close(registration.inlier_rmse, data["icp_inlier_rmse"], 1e-4)


@each_case
def test_scores(path: Path) -> None:
    close(astuple(evaluation(path).metrics), np.load(path)["post_icp"], 1e-4)


@each_case
def test_completion_ratio(path: Path) -> None:
    data = np.load(path)
    threshold, expected = data["completion_ratio"]
    given = completion_ratio(data["aligned_points"], data["gt"][data["mask"]], float(threshold))
    assert given == pytest.approx(expected, rel=1e-4)


@each_case
@pytest.mark.parametrize(("cloud", "normals"), [("aligned_points", "pred_normals"), ("gt", "gt_normals")])
def test_normals_up_to_sign(path: Path, cloud: str, normals: str) -> None:
    data = np.load(path)
    points = data["gt"][data["mask"]] if cloud == "gt" else data[cloud]
    cosine = np.abs(np.sum(estimate_normals(points) * data[normals], axis=-1))
    close(cosine, np.ones_like(cosine), 1e-4)
