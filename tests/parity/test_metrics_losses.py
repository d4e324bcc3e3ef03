"""Losses and alignment solvers against numbers of the loss's origin (golden `metrics/loss_*` and `metrics/roe_*`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geometry import (
    GeometryLossWeights,
    GeometryPrediction,
    GeometryTargets,
    align_depth_affine,
    align_depth_scale,
    align_points_scale,
    geometry_losses,
)
from geometry.losses import normalize_prediction, normalize_targets
from tests.parity import golden

pytestmark = pytest.mark.parity

RTOL = 1e-5
TERMS = {
    "loss_points": ("points", RTOL),
    "loss_normal": ("normal", RTOL),
    "loss_trans_huber": ("translation", RTOL),
    "loss_rot": ("rotation", 1e-4),  # arccos of float32 cosines near one
}
TOTALS = {"total_pi3": (0.1, 100.0), "total_g2vlm_code": (0.2, 100.0), "total_g2vlm_paper": (0.2, 200.0)}


def read(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def load(path: Path) -> tuple[GeometryPrediction, GeometryTargets, dict[str, Tensor]]:
    given = read(path)
    points = given["pred_local_points"]
    prediction = GeometryPrediction(points, given["pred_camera_poses_c2w"], torch.zeros_like(points))
    targets = GeometryTargets(
        given["gt_world_points"], given["gt_camera_poses_c2w"], given["gt_valid_mask"], given["uses_normal_loss"]
    )
    return prediction, targets, given


LOSSES = golden.cases("metrics/loss_*.npz")


@pytest.mark.parametrize("path", LOSSES)
def test_normalised_tensors(path: Path) -> None:
    prediction, targets, expected = load(path)
    ours = normalize_prediction(prediction, targets.valid)
    truth = normalize_targets(targets)
    compare = {
        "gt_norm_local_points": truth.local_points,
        "gt_norm_camera_poses_c2w": truth.cam_to_world,
        "pred_norm_local_points": ours.local_points,
        "pred_norm_camera_poses_c2w": ours.cam_to_world,
    }
    for name, tensor in compare.items():
        where = targets.valid if "points" in name else slice(None)
        largest = expected[name][where].abs().max().item()
        torch.testing.assert_close(tensor[where], expected[name][where], rtol=0, atol=RTOL * largest)


@pytest.mark.parametrize("path", LOSSES)
def test_terms_and_scale(path: Path) -> None:
    prediction, targets, expected = load(path)
    result = geometry_losses(prediction, targets, GeometryLossWeights())
    torch.testing.assert_close(result.scale, expected["optimal_scale"], rtol=RTOL, atol=0)
    for name, (term, rtol) in TERMS.items():
        assert result.terms[term].item() == pytest.approx(expected[name].item(), rel=rtol, abs=1e-12), name


@pytest.mark.parametrize("path", LOSSES)
@pytest.mark.parametrize("name", TOTALS)
def test_totals(path: Path, name: str) -> None:
    prediction, targets, expected = load(path)
    camera, translation = TOTALS[name]
    weights = GeometryLossWeights(points=1.0, normal=1.0, camera=camera, translation=translation, depth_floor=0.1)
    result = geometry_losses(prediction, targets, weights)
    noise = 1e-4 * camera * expected["loss_rot"].item()  # of the rotation term inside the total
    assert result.total.item() == pytest.approx(expected[name].item(), rel=RTOL, abs=noise)


@pytest.mark.parametrize("path", golden.cases("metrics/roe_*.npz"))
def test_alignment(path: Path) -> None:
    given = read(path)
    points = given["src_points"], given["tgt_points"], given["weight"]
    depth = given["src_depth"], given["tgt_depth"], given["weight"]
    ours = {
        "points_scale": align_points_scale(*points),
        "points_scale_trunc1": align_points_scale(*points, limit=1.0),
        "depth_scale": align_depth_scale(*depth),
        "depth_affine": torch.stack(align_depth_affine(*depth), dim=-1),
    }
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, given[name], rtol=RTOL, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
