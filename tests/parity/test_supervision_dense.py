"""Dense supervision losses against the peers' numbers (golden family `supervision`): depth, gradients, normals, DUSt3R.

Values agree to rtol 1e-5 / atol 1e-6, gradients to 1e-5 of their largest entry: the reference sums in another order.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from geometry import apply_rigid, invert_rigid
from geometry.losses import dense, surface, views
from geometry.losses.dense import ConfidenceWeights
from tests.parity import golden

pytestmark = pytest.mark.parity


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a fixture."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  (not a mapping)


def weights(metadata: dict[str, str]) -> ConfidenceWeights:
    return ConfidenceWeights(float(metadata["gamma"]), float(metadata["alpha"]))


def strides(metadata: dict[str, str]) -> list[int]:
    return [2**i for i in range(int(metadata["scales"]))]


def assert_value(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def assert_gradient(ours: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected.view_as(ours), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# ---- VGGT's trainer -------------------------------------------------------------------------------------------------

VGGT_CASES = golden.cases("supervision/depth_conf_grad_loss*.safetensors")
VARIANTS = [(gradient, trim) for gradient in ("grad", "grad_conf") for trim in ("vrnone", "vr098")]


@pytest.mark.parametrize("path", VGGT_CASES)
@pytest.mark.parametrize(("gradient", "trimmed"), VARIANTS)
def test_vggt_depth(path: Path, gradient: str, trimmed: str) -> None:
    case, metadata = load(path)
    name, weigh, scales, mask = f"{gradient}_{trimmed}", weights(metadata), strides(metadata), case["mask"]
    trim = {"vrnone": dense.keep_all, "vr098": partial(dense.trim_vggt, quantile=0.98)}[trimmed]
    prediction, confidence = case["pred"][..., 0].requires_grad_(), case["conf"].requires_grad_()
    target = case["gt"][..., 0]
    residual = dense.residual_norm(prediction[..., None], target[..., None], mask)
    maps = prediction, target, confidence, mask
    terms = {
        "conf": dense.confidence_regression_loss(residual, confidence, mask, weigh, trim),
        "reg": dense.regression_loss(residual, mask, trim),
        "grad": dense.confidence_gradient_loss(*maps, weigh, scales, dense.per_pixel, legacy_unmasked_log=True)
        if gradient == "grad_conf"
        else dense.gradient_loss(prediction, target, mask, scales, dense.per_pixel),
    }
    for term, value in terms.items():
        assert_value(value, case[f"{name}_{term}"])
    gradients = torch.autograd.grad(sum(terms.values()), (prediction, confidence))
    assert_gradient(gradients[0], case[f"{name}_dpred"])
    assert_gradient(gradients[1], case[f"{name}_dconf"])


@pytest.mark.parametrize("path", VGGT_CASES)
def test_vggt_gradient_strides(path: Path) -> None:
    case, metadata = load(path)
    prediction, target, mask = case["pred"][..., 0], case["gt"][..., 0], case["mask"]
    for i, stride in enumerate(strides(metadata)):
        plain = dense.gradient_loss(prediction, target, mask, [stride], dense.per_pixel)
        assert_value(plain, case[f"gradscale{i}"])
        maps = prediction, target, case["conf"], mask
        weighted = dense.confidence_gradient_loss(
            *maps, weights(metadata), [stride], dense.per_pixel, legacy_unmasked_log=True
        )
        assert_value(weighted, case[f"gradscale{i}_conf"])


# ---- GeoVR ----------------------------------------------------------------------------------------------------------

GEOVR_CASES = golden.cases("supervision/geovr_depth_loss*.safetensors")


@pytest.mark.parametrize("path", GEOVR_CASES)
def test_geovr_depth(path: Path) -> None:
    case, metadata = load(path)
    prediction, target = case["pred"].requires_grad_(), case["gt"]
    mask = torch.ones_like(target, dtype=torch.bool)
    trim = partial(dense.trim_geovr, quantile=float(metadata["quantile"]))
    residual = dense.residual_norm(prediction[..., None], target[..., None], mask)
    regression = dense.regression_loss(residual, mask, trim)
    gradient = dense.gradient_loss(prediction, target, mask, average=dense.per_direction)
    assert_value(regression, case["noconf_reg"])
    assert_value(gradient, case["noconf_grad"])
    assert_gradient(torch.autograd.grad(regression + gradient, prediction)[0], case["noconf_dpred"])


@pytest.mark.parametrize("path", GEOVR_CASES)
def test_geovr_depth_of_confident_teachers(path: Path) -> None:
    case, metadata = load(path)
    prediction, target = case["pred"], case["gt"]
    everything = torch.ones_like(target, dtype=torch.bool)
    mask = dense.require_pixels(dense.drop_least_confident(everything, case["teacher_conf"], 0.4), 100)
    trim = partial(dense.trim_geovr, quantile=float(metadata["quantile"]))
    residual = dense.residual_norm(prediction[..., None], target[..., None], mask)
    confidence = dense.confidence_regression_loss(residual, case["student_conf"], mask, weights(metadata), trim)
    assert_value(confidence, case["filt40_conf"])
    assert_value(dense.regression_loss(residual, mask, trim), case["filt40_reg"])
    assert_value(dense.gradient_loss(prediction, target, mask, average=dense.per_direction), case["filt40_grad"])


@pytest.mark.parametrize("path", GEOVR_CASES)
def test_silog(path: Path) -> None:
    case, _ = load(path)
    mask = torch.ones_like(case["gt"], dtype=torch.bool)
    ours = dense.silog_loss(case["pred"], case["gt"], mask, focus=0.5, epsilon=1e-6)
    assert_value(ours, case["silog_lambda05"])


# ---- normals of point maps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden.cases("supervision/point_normal_loss*.safetensors"))
def test_normals_and_point_task(path: Path) -> None:
    case, metadata = load(path)
    weigh, mask, confidence = weights(metadata), case["mask"], case["conf"]
    prediction, target = case["pred_points"].requires_grad_(), case["gt_points"]
    maps, scales = (prediction, target, confidence, mask), strides(metadata)
    one_stride = surface.corner_normal_loss(prediction, target, mask, [1])
    residual = dense.residual_norm(prediction, target, mask)
    ours = {
        "normal_loss": one_stride,
        "normal_loss_conf": surface.confidence_corner_normal_loss(*maps, weigh, [1]),
        "normal_loss_ms3": surface.corner_normal_loss(prediction, target, mask, scales),
        "normal_loss_ms3_conf": surface.confidence_corner_normal_loss(*maps, weigh, scales),
        "point_reg": dense.regression_loss(residual, mask),
        "point_conf": dense.confidence_regression_loss(residual, confidence, mask, weigh),
        "point_normal_conf": surface.confidence_corner_normal_loss(*maps, weigh, scales),
    }
    for name, value in ours.items():
        assert_value(value, case[name])
    assert_gradient(torch.autograd.grad(one_stride, prediction)[0], case["normal_loss_dpred"])


# ---- DUSt3R ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden.cases("supervision/dust3r_conf_loss*.safetensors"))
@pytest.mark.parametrize("prefix", ["", "gtscale_"])
def test_dust3r(path: Path, prefix: str) -> None:
    case, _ = load(path)
    points, world, valid, confidence = (
        torch.stack([case[f"{name}{view}"] for view in (1, 2)], dim=1) for name in ("pred", "gt", "valid", "conf")
    )
    prediction = views.unit_mean_distance(points, valid)
    target = apply_rigid(invert_rigid(case["camera1_c2w"]), world)
    if not prefix:
        target = views.unit_mean_distance(target, valid)
    assert_value(views.views_regression_loss(prediction, target, valid), case[f"{prefix}regr3d"])
    weighted = views.views_confidence_loss(prediction, target, confidence, valid, ConfidenceWeights(1.0, 0.2))
    assert_value(weighted, case[f"{prefix}confloss_a02"])
