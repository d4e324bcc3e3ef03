import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.losses import features, metric_scale, pose
from geometry.losses.metric_scale import MetricScaleRule

F64 = torch.float64


# ---- poses ----------------------------------------------------------------------------------------------------------

POSE_LOSSES = [pose.pose_l1, pose.pose_l2]
PoseLoss = Callable[..., pose.PoseTerms]


def poses() -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target, valid: two clips of four views."""
    prediction, target = torch.randn(2, 2, 4, 9, dtype=F64)
    return prediction.requires_grad_(), target, torch.tensor([[True, True, True, False], [True, False, False, True]])


@pytest.mark.parametrize("loss", POSE_LOSSES)
@pytest.mark.parametrize("sign_invariant", [False, True])
def test_pose_gradient(loss: PoseLoss, sign_invariant: bool) -> None:
    prediction, target, valid = poses()
    weights = pose.PoseWeights(0.9, 0.7, 0.3)
    assert torch.autograd.gradcheck(lambda p: loss(p, target, valid, sign_invariant).total(weights), prediction)


@pytest.mark.parametrize("loss", POSE_LOSSES)
def test_pose_of_views_that_do_not_count(loss: PoseLoss) -> None:
    prediction, target, valid = poses()
    value = loss(prediction, target, valid, False).total(pose.PoseWeights())
    expected = torch.autograd.grad(value, prediction)[0]
    with torch.no_grad():
        prediction[~valid], target[~valid] = torch.nan, torch.inf
    spoilt = loss(prediction, target, valid, False).total(pose.PoseWeights())
    assert spoilt.item() == value.item()
    assert torch.equal(torch.autograd.grad(spoilt, prediction)[0], expected)
    nothing = loss(prediction, target, torch.zeros_like(valid), True).total(pose.PoseWeights())
    assert nothing.item() == 0
    assert torch.equal(torch.autograd.grad(nothing, prediction)[0], torch.zeros_like(prediction))


@pytest.mark.parametrize("loss", POSE_LOSSES)
def test_pose_sign(loss: PoseLoss) -> None:
    prediction, target, valid = poses()
    opposite = target.clone()
    opposite[..., 3:7] *= -1
    invariant = [loss(prediction, t, valid, sign_invariant=True).rotation for t in (target, opposite)]
    assert invariant[0].item() == invariant[1].item()
    plain = [loss(prediction, t, valid, sign_invariant=False).rotation for t in (target, opposite)]
    assert plain[0].item() != plain[1].item()
    assert invariant[0] <= min(plain)


def test_nearest_sign_is_chosen_by_l1() -> None:
    target = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])
    quaternion = torch.tensor([[-0.9, 0.1, 0, 0], [0, 0, 0.1, 0.9]])
    assert pose.nearest_sign(quaternion, target).tolist() == [[-1, 0, 0, 0], [0, 0, 0, 1]]


def test_translation_clamps_by_hand() -> None:
    target, valid = torch.zeros(1, 9), torch.tensor([True])
    prediction = torch.tensor([[3.0, -400, 0, 0, 0, 0, 3, 4, 3]])
    l1 = pose.pose_l1(prediction, target, valid, False)
    assert l1.translation.item() == pytest.approx((3 + 100 + 0) / 3)
    assert (l1.rotation.item(), l1.field_of_view.item()) == pytest.approx((3 / 4, 7 / 2))
    l2 = pose.pose_l2(prediction, target, valid, False)
    assert (l2.translation.item(), l2.rotation.item(), l2.field_of_view.item()) == pytest.approx((100, 3, 5))
    assert l2.total(pose.PoseWeights(2, 3, 0.5)).item() == pytest.approx(2 * 100 + 3 * 3 + 0.5 * 5)


# ---- metric scale ---------------------------------------------------------------------------------------------------

RULE = MetricScaleRule()


def clip(*batch: int) -> dict[str, Tensor]:
    """Two views of 4x5 pixels whose metric depth is 2.5 times the relative one, except in the sky."""
    shape = (*batch, 2, 4, 5)
    relative, sky = 1 + torch.rand(shape, dtype=F64), torch.where(torch.rand(shape) < 0.2, 0.9, 0.1)
    metric = torch.where(sky < 0.3, 2.5 * relative, 400.0)
    return {"relative_depth": relative, "confidence": 1 + torch.rand(shape), "metric": metric, "sky": sky}


def test_scale_of_exact_depths() -> None:
    ours = metric_scale.fit_metric_scale(**clip(3), rule=RULE)
    assert ours.valid.all()
    assert ours.scale.tolist() == pytest.approx([2.5] * 3)


def test_scale_is_least_squares_over_the_confident_half() -> None:
    given = clip()
    given["metric"] = given["metric"] + torch.rand_like(given["metric"])
    ours = metric_scale.fit_metric_scale(**given, rule=RULE)
    not_sky = given["sky"] < 0.3
    median = torch.quantile(given["confidence"][not_sky], 0.5)
    chosen = not_sky & (given["confidence"] >= median)
    assert torch.equal(ours.pixels, chosen)
    relative, metric = given["relative_depth"][chosen], given["metric"][chosen]
    best = torch.linalg.lstsq(relative[:, None], metric[:, None]).solution.item()
    assert ours.scale.item() == pytest.approx(best)


@pytest.mark.parametrize("why", ["sky", "few", "no depth", "not finite"])
def test_a_clip_without_pixels_is_invalid_and_no_error(why: str) -> None:
    given = clip(2)
    if why == "sky":
        given["sky"][1] = 1.0
    elif why == "few":
        given["sky"][1], given["sky"][1, 0, 0, :], given["sky"][1, 1, 0, :4] = 1.0, 0.0, 0.0  # nine pixels
    elif why == "no depth":
        given["relative_depth"][1] = 0.0
    else:
        given["metric"][1] = torch.inf
    ours = metric_scale.fit_metric_scale(**given, rule=RULE)
    assert ours.valid.tolist() == [True, False]
    assert ours.scale.tolist() == pytest.approx([2.5, 1])
    if why == "few":
        given["sky"][1, 1, 0, 4] = 0.0  # the tenth
        given["metric"] = 2.5 * given["relative_depth"]
        assert metric_scale.fit_metric_scale(**given, rule=RULE).valid.all()


def test_pixels_without_depth_do_not_count() -> None:
    given = clip()
    given["confidence"] = torch.ones_like(given["confidence"])  # all as good as the median
    bad = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)]
    for name, value, pixel in zip(
        ("relative_depth", "metric", "relative_depth", "metric"), (1e-4, 1e-3, torch.nan, torch.inf), bad, strict=True
    ):
        given["sky"][pixel], given[name][pixel] = 0.0, value
    ours = metric_scale.fit_metric_scale(**given, rule=RULE)
    assert not any(ours.pixels[pixel] for pixel in bad)
    assert ours.scale.item() == pytest.approx(2.5)


def test_metric_depth_by_hand() -> None:
    intrinsics = torch.tensor([[400.0, 0, 8], [0, 500, 6], [0, 0, 1]])
    assert metric_scale.metric_depth(torch.full((2, 2), 6.0), intrinsics).tolist() == [[9, 9], [9, 9]]


SCALE_LOSSES = {metric_scale.log1p_scale_loss: math.log1p, metric_scale.log_scale_loss: math.log}


@pytest.mark.parametrize("loss", SCALE_LOSSES)
def test_scale_losses(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    scale = torch.tensor([2.0, 7.0, 0.5], dtype=F64, requires_grad=True)
    target, valid = torch.tensor([3.0, torch.nan, 0.9], dtype=F64), torch.tensor([True, False, True])
    log = SCALE_LOSSES[loss]
    expected = (log(3) - log(2) + log(0.9) - log(0.5)) / 2
    assert loss(scale, target, valid).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda s: loss(s, target, valid), scale)
    nothing = loss(scale, target, torch.zeros_like(valid))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, scale)[0].tolist() == [0, 0, 0]


# ---- features -------------------------------------------------------------------------------------------------------


def tokens(student_width: int = 5, teacher_width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features (T, N, C) of a student and a teacher, and which tokens count."""
    student = torch.randn(2, 6, student_width, dtype=F64, requires_grad=True)
    return student, torch.randn(2, 6, teacher_width, dtype=F64), torch.rand(2, 6) < 0.7


@pytest.mark.parametrize("loss", [features.cosine_loss, features.relational_loss])
def test_feature_losses(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    student, teacher, valid = tokens()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid), student)
    value = loss(student, teacher, valid)
    spoilt = loss(student, torch.where(valid[..., None], teacher, torch.nan), valid)
    assert spoilt.item() == value.item()
    assert torch.autograd.grad(spoilt, student)[0].isfinite().all()
    nothing = loss(student, torch.full_like(teacher, torch.nan), torch.zeros_like(valid))
    assert nothing.item() == 0
    assert torch.equal(torch.autograd.grad(nothing, student)[0], torch.zeros_like(student))
    scaled = 3 * student.detach()
    assert loss(student, scaled, valid).item() == pytest.approx(0, abs=1e-12)
    watched = teacher.requires_grad_()
    assert torch.autograd.grad(loss(student, watched, valid), watched, allow_unused=True)[0] is None


def test_cosine_loss_over_tokens() -> None:
    student, teacher, valid = tokens()
    expected = 1 - F.cosine_similarity(student, teacher, dim=-1)[valid].mean()
    torch.testing.assert_close(features.cosine_loss(student, teacher, valid), expected)


def test_relational_loss_over_pairs_of_a_view() -> None:
    student, teacher, valid = tokens(5, 8)
    differences = []
    for view in range(2):
        for i in range(6):
            for j in range(6):
                if valid[view, i] and valid[view, j]:
                    a, b = (F.cosine_similarity(x[view, i], x[view, j], dim=0) for x in (student, teacher))
                    differences.append((a - b).abs())
    torch.testing.assert_close(features.relational_loss(student, teacher, valid), torch.stack(differences).mean())


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_grids(batch: tuple[int, ...]) -> None:
    grid = torch.randn(*batch, 4, 6, 5, dtype=F64)
    means = grid.unflatten(-2, (3, 2)).unflatten(-4, (2, 2)).mean((-4, -2))
    torch.testing.assert_close(features.pool_patches(grid, 2), means)
    torch.testing.assert_close(features.pool_to_grid(grid, (2, 3)), means)
    torch.testing.assert_close(features.resize_to_grid(grid, (2, 3)), means)  # halves: the middle of four patches
    torch.testing.assert_close(features.resize_to_grid(grid, (4, 6)), grid)
    assert features.resize_to_grid(grid, (7, 5)).shape == (*batch, 7, 5, 5)
    assert features.pool_to_grid(grid, (3, 4)).shape == (*batch, 3, 4, 5)


def test_grid_that_cannot_be_pooled() -> None:
    with pytest.raises(ValueError, match="5 x 6"):
        features.pool_patches(torch.zeros(5, 6, 3), 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: features.resize_to_grid(x, (3, 5)),
        lambda x: features.pool_patches(x, 2),
        lambda x: features.pool_to_grid(x, (3, 2)),
    ],
)
def test_gradient_of_grids(change: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(change, torch.randn(4, 6, 2, dtype=F64, requires_grad=True))
