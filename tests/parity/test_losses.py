"""The geometry loss against numbers of the released code (golden family `losses`).

A sample without a valid pixel (and a single view) turns the released totals into NaN. Ours gives it zero weight, so for
such a case the numbers that are finite are compared, and the rest with our own result on the samples that remain.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from geometry import GeometryLosses, GeometryLossWeights, GeometryPrediction, GeometryTargets, geometry_losses
from geometry.alignment import align_points_scale
from geometry.losses import normalize_prediction, normalize_targets
from tests.parity import golden

pytestmark = pytest.mark.parity

RELEASED = GeometryLossWeights(
    points=1.0, normal=1.0, global_points=1.0, camera=0.2, translation=100.0, normal_head=0.0, depth_floor=0.1
)
SCALARS_RTOL = 1e-4
GRADIENTS_TOL = 1e-3  # of the largest entry of each tensor
KINK = 3e-6  # |s p - g| of normalised points below which float32 does not decide the sign


class Case(NamedTuple):
    """One fixture: what goes in, and the released outputs in float32."""

    prediction: GeometryPrediction
    targets: GeometryTargets
    expected: dict[str, Tensor]

    @property
    def counted(self) -> Tensor:
        return self.targets.valid.flatten(1).any(1)


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)


def load(path: Path) -> Case:
    tensors = read(path)
    given = {name.removeprefix("in."): tensor for name, tensor in tensors.items() if name.startswith("in.")}
    prefix = "out.fp32."
    expected = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    fields = {
        "local_points": given["pred_local_points"],
        "cam_to_world": given["pred_camera_poses"],
        "global_points": given.get("pred_global_points"),
    }
    fields = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in fields.items()}
    prediction = GeometryPrediction(**fields, normals=torch.zeros_like(given["pred_local_points"]))
    targets = GeometryTargets(
        given["gt_world_points"],
        given["gt_camera_poses_c2w"],
        given["gt_masks"].bool(),
        given["normal_enabled"].bool(),
    )
    return Case(prediction, targets, expected)


def run(case: Case) -> tuple[GeometryLosses, dict[str, Tensor]]:
    """Losses, and gradients of the total by the fixture's names."""
    names = {
        "grad_pred_local_points": case.prediction.local_points,
        "grad_pred_camera_poses": case.prediction.cam_to_world,
        "grad_pred_global_points": case.prediction.global_points,
    }
    tensors = {name: tensor for name, tensor in names.items() if tensor is not None}
    result = geometry_losses(case.prediction, case.targets, RELEASED)
    return result, dict(zip(tensors, torch.autograd.grad(result.total, list(tensors.values())), strict=True))


def scalars(result: GeometryLosses) -> dict[str, Tensor]:
    """Our terms and their sums by the fixture's names."""
    terms = result.terms
    point_terms = [terms[name] for name in ("points", "normal", "global_points") if name in terms]
    named = {
        "local_pts_loss": terms["points"],
        "normal_loss": terms["normal"],
        "trans_loss": terms["translation"],
        "rot_loss": terms["rotation"],
        "point_loss_sum": torch.stack(point_terms).sum(),
        "camera_loss": 100 * terms["translation"] + terms["rotation"],
        "total": result.total,
    }
    return named | ({"global_pts_loss": terms["global_points"]} if "global_points" in terms else {})


def at_kinks(case: Case) -> dict[str, Tensor]:
    """Entries where a point term sits on the kink of |s p - g|: there the gradient is one of two, by rounding.

    The entry that decides the scale always does.
    """
    prediction, target = normalize_prediction(case.prediction, case.targets.valid), normalize_targets(case.targets)
    scale = case.expected["s_star"][:, None, None, None, None]
    pairs = {"grad_pred_local_points": (prediction.local_points, target.local_points)}
    if prediction.global_points is not None:
        pairs["grad_pred_global_points"] = (prediction.global_points, target.global_points)
    return {name: (scale * points - true).abs() < KINK for name, (points, true) in pairs.items()}


CASES = golden.cases("losses/case*.safetensors")


@pytest.mark.parametrize("path", CASES)
def test_normalised_tensors(path: Path) -> None:
    case = load(path)
    prediction, target = normalize_prediction(case.prediction, case.targets.valid), normalize_targets(case.targets)
    ours = {
        "gt_local_points": target.local_points,
        "gt_global_points": target.global_points,
        "gt_camera_poses": target.cam_to_world,
        "pred_norm_local_points": prediction.local_points,
        "pred_norm_camera_poses": prediction.cam_to_world,
    }
    for name, tensor in ours.items():
        tensor, expected = tensor[case.counted], case.expected[name][case.counted]
        if "points" in name:
            valid = case.targets.valid[case.counted]
            tensor, expected = tensor[valid], expected[valid]
        difference = (tensor - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("path", CASES)
def test_scale(path: Path) -> None:
    case = load(path)
    result, _ = run(case)
    torch.testing.assert_close(result.scale, case.expected["s_star"], rtol=SCALARS_RTOL, atol=0)


@pytest.mark.parametrize("path", CASES)
def test_scalars(path: Path) -> None:
    case = load(path)
    ours = scalars(run(case)[0])
    expected = {name: tensor[0] for name, tensor in case.expected.items() if name in ours}
    assert ours.keys() == expected.keys()
    assert expected["local_pts_loss"].isfinite()
    for name, value in expected.items():
        assert ours[name].isfinite(), name
        if value.isfinite():
            assert ours[name].item() == pytest.approx(value.item(), rel=SCALARS_RTOL, abs=1e-12), name


@pytest.mark.parametrize("path", CASES)
def test_gradients(path: Path) -> None:
    case = load(path)
    if not case.expected["total"].isfinite():
        pytest.skip("the released total, and with it the gradient, is NaN")
    _, gradients = run(case)
    kinks = at_kinks(case)
    for name, gradient in gradients.items():
        expected = case.expected[name]
        difference = (gradient - expected).abs() / expected.abs().max()
        if name in kinks:
            assert kinks[name].float().mean() < 2e-3, f"{name}: too many entries on a kink to compare"
            difference = difference[~kinks[name]]
        assert difference.max() < GRADIENTS_TOL, f"{name}: {difference.max():.1e}"


@pytest.mark.parametrize("path", CASES)
def test_empty_samples_have_zero_weight(path: Path) -> None:
    case = load(path)
    kept = case.counted
    if kept.all():  # empty the last sample ourselves
        kept = torch.ones_like(kept)
        kept[-1] = False
        targets = replace(case.targets, valid=case.targets.valid & kept[:, None, None, None])
        case = case._replace(targets=targets)
    result, gradients = run(case)
    assert result.total.isfinite()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert (gradient[~kept] == 0).all(), name
    if not kept.any():
        assert result.total == 0
        return
    alone, alone_gradients = run(keep(case, kept))
    for name, value in scalars(result).items():
        torch.testing.assert_close(value, scalars(alone)[name], rtol=1e-5, atol=1e-12)
    for name, gradient in gradients.items():
        limit = 1e-5 * alone_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient[kept], alone_gradients[name], rtol=0, atol=limit)


def keep(case: Case, samples: Tensor) -> Case:
    """The case with some samples only."""

    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()[samples].requires_grad_(value.requires_grad)

    prediction = replace(case.prediction, **{name: pick(value) for name, value in vars(case.prediction).items()})
    targets = replace(case.targets, **{name: pick(value) for name, value in vars(case.targets).items()})
    return Case(prediction, targets, case.expected)


@pytest.mark.parametrize("path", golden.cases("losses/align_vectors.safetensors"))
def test_aligner(path: Path) -> None:
    tensors = read(path)
    names = sorted({name.split(".")[0] for name in tensors})
    assert names
    for name in names:
        given = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        limit = given["trunc"].item() if "trunc" in given else None
        scale = align_points_scale(given["src"], given["tgt"], given["w"], limit)
        torch.testing.assert_close(
            scale, given["scale"], rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        residual = (scale[:, None, None] * given["src"] - given["tgt"]) * given["w"][..., None]
        residual = residual.abs().clamp_max(limit if limit else torch.inf)
        objective = torch.where(given["src"] == 0, 0, residual).sum((1, 2))  # the released one drops constants
        torch.testing.assert_close(objective, given["objective"], rtol=1e-5, atol=0)
