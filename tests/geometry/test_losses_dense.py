import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from geometry.losses import dense, surface, task, views
from geometry.losses.dense import ConfidenceWeights
from geometry.losses.masked import masked_quantile, order_statistic

F64 = torch.float64
WEIGHTS = ConfidenceWeights(gamma=0.7, alpha=0.3)
SIZE = (2, 3, 7, 9)  # B, S, H, W


def maps(channels: int = 1, size: tuple[int, ...] = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction and target (..., C), confidence above 1, and a mask with holes; no channel axis for one channel."""
    prediction, target = 1 + torch.rand(2, *size, channels, dtype=F64)
    confidence = 1 + torch.rand(*size, dtype=F64)
    mask = torch.rand(size) < 0.8
    if channels == 1:
        prediction, target = prediction[..., 0], target[..., 0]
    return prediction.requires_grad_(), target, confidence.requires_grad_(), mask


def residual(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return dense.residual_norm(prediction[..., None], target[..., None], mask)


LOSSES: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]] = {
    "regression": (1, lambda p, t, c, m: dense.regression_loss(residual(p, t, m), m)),
    "regression trimmed by VGGT": (
        1,
        lambda p, t, c, m: dense.regression_loss(residual(p, t, m), m, partial(dense.trim_vggt, minimum=5)),
    ),
    "confidence": (1, lambda p, t, c, m: dense.confidence_regression_loss(residual(p, t, m), c, m, WEIGHTS)),
    "confidence trimmed by GeoVR": (
        1,
        lambda p, t, c, m: dense.confidence_regression_loss(
            residual(p, t, m), c, m, WEIGHTS, partial(dense.trim_geovr, minimum=5)
        ),
    ),
    "silog": (1, lambda p, t, c, m: dense.silog_loss(p, t, m)),
    "gradient per pixel": (1, lambda p, t, c, m: dense.gradient_loss(p, t, m)),
    "gradient per direction": (1, lambda p, t, c, m: dense.gradient_loss(p, t, m, average=dense.per_direction)),
    "confidence gradient": (1, lambda p, t, c, m: dense.confidence_gradient_loss(p, t, c, m, WEIGHTS)),
    "ray task": (6, lambda p, t, c, m: total(task.map_task_terms(p, t, c, m, WEIGHTS))),
    "depth task": (1, lambda p, t, c, m: total(task.depth_task_terms(p, t, c, m, WEIGHTS))),
    "point task": (3, lambda p, t, c, m: total(task.point_task_terms(p, t, c, m, WEIGHTS))),
    "normals": (3, lambda p, t, c, m: surface.corner_normal_loss(p, t, m)),
    "views": (3, lambda p, t, c, m: views.views_regression_loss(views.unit_mean_distance(p, m), t, m)),
    "views with confidence": (
        3,
        lambda p, t, c, m: views.views_confidence_loss(
            views.unit_mean_distance(p, m), views.unit_mean_distance(t, m), c, m, WEIGHTS
        ),
    ),
}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# ---- every loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str) -> None:
    channels, loss = LOSSES[name]
    prediction, target, confidence, mask = maps(channels, (1, 2, 5, 6))
    assert torch.autograd.gradcheck(lambda p, c: loss(p, target, c, mask), (prediction, confidence))


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_outside_the_mask_does_not_matter(name: str) -> None:
    channels, loss = LOSSES[name]
    prediction, target, confidence, mask = maps(channels)
    value = loss(prediction, target, confidence, mask)
    expected = torch.autograd.grad(value, (prediction, confidence), allow_unused=True)
    hole = (~mask)[..., None].expand(*mask.shape, channels).reshape(target.shape)
    with torch.no_grad():
        prediction[hole], target[hole], confidence[~mask] = torch.nan, torch.inf, 0.0
    spoilt = loss(prediction, target, confidence, mask)
    assert spoilt.item() == value.item()
    for ours, before in zip(
        torch.autograd.grad(spoilt, (prediction, confidence), allow_unused=True), expected, strict=True
    ):
        assert before is None or torch.equal(ours, before)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid_is_zero_with_a_gradient(name: str) -> None:
    channels, loss = LOSSES[name]
    prediction, target, confidence, mask = maps(channels)
    value = loss(prediction, torch.full_like(target, torch.nan), confidence, torch.zeros_like(mask))
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, prediction)[0], torch.zeros_like(prediction))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    channels, loss = LOSSES[name]
    prediction, target, confidence, mask = maps(channels)
    half = [tensor.detach().bfloat16() for tensor in (prediction, target, confidence)]
    value = loss(half[0], half[1], half[2], mask)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*(tensor.double() for tensor in half), mask).item(), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_to_the_target(name: str) -> None:
    channels, loss = LOSSES[name]
    prediction, target, confidence, mask = maps(channels)
    value = loss(prediction, target.requires_grad_(), confidence, mask)
    assert torch.autograd.grad(value, target, allow_unused=True)[0] is None


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_confidence_regression_by_hand() -> None:
    residual = torch.tensor([[2.0, 0.5, 9.0]])
    confidence, mask = torch.tensor([[1.5, 3.0, 1.0]]), torch.tensor([[True, True, False]])
    expected = (0.7 * 3 - 0.3 * math.log(1.5) + 0.7 * 1.5 - 0.3 * math.log(3)) / 2
    assert dense.confidence_regression_loss(residual, confidence, mask, WEIGHTS).item() == pytest.approx(expected)


def test_gradient_by_hand() -> None:
    """One row 0 1 3 6 with its last pixel invalid: steps 1 and 2, three valid pixels; the column has no step."""
    prediction, target = torch.tensor([[0.0, 1, 3, 6]]), torch.zeros(1, 4)
    mask = torch.tensor([[True, True, True, False]])
    assert dense.gradient_loss(prediction, target, mask, [1]).item() == pytest.approx(3 / 3)
    assert dense.gradient_loss(prediction, target, mask, [2]).item() == pytest.approx(3 / 2)
    assert dense.gradient_loss(prediction, target, mask, [1, 2]).item() == pytest.approx((1 + 3 / 2) / 2)
    assert dense.gradient_loss(1000 * prediction, target, mask, [1]).item() == pytest.approx(2 * dense.LIMIT / 3)


def test_gradient_per_direction_leaves_out_thin_strides() -> None:
    prediction = torch.arange(16.0).view(4, 4)  # steps 1 and 4; at stride 2 only 4 pixels
    target, mask = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)
    value = dense.gradient_loss(prediction, target, mask, [1, 2], dense.per_direction)
    assert value.item() == pytest.approx(1 + 4)
    assert dense.gradient_loss(prediction, target, mask, [2], dense.per_direction).item() == 0


def test_confidence_of_a_step_is_that_of_its_later_pixel() -> None:
    prediction, target = torch.tensor([[0.0, 1], [5, 7]]), torch.zeros(2, 2)
    confidence = torch.tensor([[10.0, 2], [3, 4]])
    mask = torch.tensor([[True, True], [True, False]])
    value = dense.confidence_gradient_loss(prediction, target, confidence, mask, ConfidenceWeights(1, 0.5), [1])
    counted = 1 * 2 - 0.5 * math.log(2) + 5 * 3 - 0.5 * math.log(3)
    assert value.item() == pytest.approx(counted / 3)
    legacy = dense.confidence_gradient_loss(
        prediction, target, confidence, mask, ConfidenceWeights(1, 0.5), [1], legacy_unmasked_log=True
    )
    assert legacy.item() == pytest.approx((counted - 2 * 0.5 * math.log(4)) / 3)


def test_legacy_logarithm_without_pixels_is_zero() -> None:
    prediction, target, confidence, mask = maps()
    nothing = torch.zeros_like(mask)
    value = dense.confidence_gradient_loss(prediction, target, confidence, nothing, WEIGHTS, legacy_unmasked_log=True)
    assert value.item() == 0
    gradients = torch.autograd.grad(value, (prediction, confidence))
    assert not any(gradient.any() for gradient in gradients)


def test_silog_by_hand() -> None:
    target = torch.rand(3, 4, dtype=F64) + 1
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert dense.silog_loss(5 * target, target, mask, focus=1.0, epsilon=1e-6).item() == pytest.approx(1e-3)
    expected = math.sqrt(0.5 * math.log(5) ** 2 + 1e-6)
    assert dense.silog_loss(5 * target, target, mask).item() == pytest.approx(expected)


def test_normals_do_not_depend_on_distance_or_scale() -> None:
    prediction, _, _, mask = maps(3)
    target = 3 * prediction.detach() + torch.tensor([1.0, 2, 3])
    assert surface.corner_normal_loss(prediction, target, mask).item() == pytest.approx(0, abs=1e-12)
    mirrored = -target
    mirrored[..., 0] *= -1  # turned by pi about x: every normal turns with it
    assert surface.corner_normal_loss(prediction, mirrored, mask) > 0.1


def test_views_are_summed_and_scale_free() -> None:
    prediction, target, _, mask = maps(3)
    mask[0, 0] = False
    value = views.views_regression_loss(
        views.unit_mean_distance(7 * prediction, mask), views.unit_mean_distance(target, mask), mask
    )
    norm = [torch.stack([p[m].norm(dim=-1).mean() for p, m in zip(x, mask, strict=True)]) for x in (prediction, target)]
    error = (prediction / norm[0].view(-1, 1, 1, 1, 1) - target / norm[1].view(-1, 1, 1, 1, 1)).norm(dim=-1)
    expected = sum(error[:, s][mask[:, s]].mean() for s in range(SIZE[1]))
    torch.testing.assert_close(value, expected)


def test_task_terms() -> None:
    prediction, target, confidence, mask = maps()
    terms = task.depth_task_terms(prediction, target, confidence, mask, WEIGHTS)
    assert set(terms) == {"l2", "confidence", "gradient"}
    error = (prediction - target).abs()[mask]
    assert terms["l2"].item() == pytest.approx(error.mean().item())
    maps_and_weights = prediction, target, confidence, mask, WEIGHTS
    torch.testing.assert_close(terms["gradient"], dense.confidence_gradient_loss(*maps_and_weights, [1, 2, 4, 8]))
    points = maps(3)
    terms = task.point_task_terms(*points, WEIGHTS)
    assert set(terms) == {"l2", "confidence", "normal"}
    torch.testing.assert_close(terms["normal"], surface.confidence_corner_normal_loss(*points, WEIGHTS, [1, 2, 4]))
    assert terms["l2"].item() == pytest.approx((points[0] - points[1]).norm(dim=-1)[points[3]].mean().item())


# ---- which entries count --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.98, 1.0])
def test_masked_quantile_is_torch_quantile(quantile: float) -> None:
    values, mask = torch.randn(4, 50, dtype=F64), torch.rand(4, 50) < 0.5
    mask[3] = False
    ours = masked_quantile(values, mask, quantile)
    for row in range(3):
        assert ours[row].item() == pytest.approx(torch.quantile(values[row][mask[row]], quantile).item())
    assert ours[3] == torch.inf


def test_order_statistic_is_sorting() -> None:
    values, mask = torch.randn(50), torch.rand(50) < 0.5
    ranked = values[mask].sort().values
    for rank in range(len(ranked)):
        assert order_statistic(values, mask, torch.tensor(rank)) == ranked[rank]
    assert order_statistic(values, mask, torch.tensor(1000)) == ranked[-1]


def by_indexing_vggt(values: Tensor, quantile: float, limit: float, minimum: int) -> Tensor:
    if len(values) <= minimum:
        return values
    values = values.clamp_max(limit)
    kept = values[values < values.sort().values[round(quantile * (len(values) - 1))]]
    return kept if len(kept) > minimum else values


def by_indexing_geovr(values: Tensor, quantile: float, limit: float, minimum: int) -> Tensor:
    if len(values) <= minimum:
        return values
    clamped = values.clamp_max(limit)
    kept = values[values <= clamped.sort().values[math.ceil(quantile * (len(values) - 1))]]
    return kept if len(kept) >= minimum else clamped


@pytest.mark.parametrize("minimum", [10, 88, 89, 91, 92, 97, 99, 100, 101])  # around the numbers that are kept
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize(
    ("trim", "oracle"), [(dense.trim_vggt, by_indexing_vggt), (dense.trim_geovr, by_indexing_geovr)]
)
def test_trimming_is_indexing(
    trim: dense.Trim, oracle: Callable[..., Tensor], quantile: float, minimum: int, ties: bool
) -> None:
    mask = torch.zeros(150, dtype=torch.bool)
    mask[torch.randperm(150)[:100]] = True
    values = 20 * torch.rand(150)
    values, limit = (values.round(), 18.0) if ties else (values, 100.0)
    kept_values, kept = trim(values, mask, quantile=quantile, limit=limit, minimum=minimum)
    expected = oracle(values[mask], quantile, limit, minimum)
    assert torch.equal(kept_values[kept].sort().values, expected.sort().values)
    assert not (kept & ~mask).any()


def test_least_confident_pixels_are_dropped() -> None:
    confidence = torch.tensor([[5.0, 1, 4], [2, 3, torch.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.equal(dense.drop_least_confident(mask, confidence, 0.0), mask)
    kept = dense.drop_least_confident(mask, confidence, 0.4)  # the quantile lies between 2 and 3
    assert confidence[kept].tolist() == [5, 4, 3]
    assert torch.equal(dense.require_pixels(mask, 5), mask)
    assert not dense.require_pixels(mask, 6).any()
