"""Depth metrics against the peers' evaluator (tests/golden/metrics/README.md, families depth_* and depth_aggregate)."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from geometry.metrics.depth import (
    ALIGNMENTS,
    DepthEvaluation,
    average_depth,
    evaluate_depth,
    resize_bicubic,
)
from tests.parity.golden import cases

pytestmark = pytest.mark.parity

# The fixture's mode -> our name and the README's tolerance. The peers compute in float32, and Adam and BFGS stop early.
MODES = {
    "metric": ("metric", 1e-5),
    "median": ("median", 1e-5),
    "lstsq": ("lstsq", 1e-5),
    "scale_irls": ("scale_irls", 1e-4),
    "lad_bfgs": ("lad", 5e-3),
    "lad2_adam_lr1e-4": ("lad2_adam_lr1e-4", 1e-4),
    "lad2_adam_lr1e-3": ("lad2_adam_lr1e-3", 1e-4),
}
SCALE_TOLERANCE = {"scale_irls": 1e-3}


def optional(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


def evaluate(path: Path, mode: str) -> DepthEvaluation:
    data = np.load(path)
    return evaluate_depth(
        data["pred"],
        data["gt"],
        ALIGNMENTS[MODES[mode][0]],
        max_depth=optional(data["max_depth"]),
        mask=data.get("custom_mask"),
        clip_max=optional(data["post_clip_max"]),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", cases("metrics/depth_*.npz"))
def test_scores(path: Path, mode: str) -> None:
    expected = np.load(path)[f"metrics_{mode}"]
    given = astuple(evaluate(path, mode).metrics)
    np.testing.assert_allclose(given, expected, rtol=MODES[mode][1], atol=MODES[mode][1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", cases("metrics/depth_*.npz"))
def test_scale_and_shift(path: Path, mode: str) -> None:
    alignment = evaluate(path, mode).alignment
    expected = np.load(path)[f"scale_shift_{mode}"]
    tolerance = SCALE_TOLERANCE.get(mode, MODES[mode][1])
    np.testing.assert_allclose([alignment.scale, alignment.shift], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", cases("metrics/depth_aggregate.json"))
def test_pixel_weighted_average(path: Path, mode: str) -> None:
    aggregate = json.loads(path.read_text(encoding="utf-8"))
    images = [evaluate(path.with_name(f"{case}.npz"), mode).metrics for case in aggregate["cases"]]
    given = astuple(average_depth(images))[:-1]
    np.testing.assert_allclose(given, aggregate["average"][mode], rtol=MODES[mode][1], atol=MODES[mode][1])


@pytest.mark.parametrize("path", cases("metrics/format_*.npz"))
def test_bicubic_resize(path: Path) -> None:
    data = np.load(path)
    height, width = (int(size) for size in data["cubic_out_hw"])
    np.testing.assert_allclose(resize_bicubic(data["cubic_in"], height, width), data["cubic_out"], rtol=1e-5, atol=1e-5)
