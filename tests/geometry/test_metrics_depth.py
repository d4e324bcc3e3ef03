"""Properties of the depth metrics and alignments, and inputs they must refuse."""

import numpy as np
import pytest
import torch

from geometry.metrics.depth import (
    ALIGNMENTS,
    ScaleShift,
    align_l1_scale,
    align_lad,
    align_scale_irls,
    average_depth,
    best_constant_depth,
    depth_metrics,
    evaluate_depth,
    lower_median,
    valid_depth,
)

SCALE_MODES = ["median", "scale_irls", "l1_scale"]
AFFINE_MODES = ["lstsq", "lad"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def gt(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(1, 9, size=(12, 17))


@pytest.fixture
def pred(gt: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.4 * gt * np.exp(0.2 * rng.normal(size=gt.shape))


def abs_rel(scale: float, pred: np.ndarray, gt: np.ndarray) -> float:
    return float(np.mean(np.abs(scale * pred - gt) / gt))


@pytest.mark.parametrize("mode", ALIGNMENTS)
def test_perfect_prediction_scores_perfectly(mode: str, gt: np.ndarray) -> None:
    metrics = evaluate_depth(gt, gt, ALIGNMENTS[mode]).metrics
    errors = [metrics.abs_rel, metrics.sq_rel, metrics.rmse, metrics.log_rmse]
    np.testing.assert_allclose(errors, 0, atol=1e-6)
    assert (metrics.delta_1, metrics.delta_2, metrics.delta_3) == (1, 1, 1)
    assert metrics.delta_0 == 0
    assert metrics.valid_pixels == gt.size


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_scale_alignment_undoes_scale(mode: str, gt: np.ndarray) -> None:
    result = evaluate_depth(gt / 2.5, gt, ALIGNMENTS[mode])
    assert result.alignment.scale == pytest.approx(2.5, rel=1e-6)
    assert result.metrics.abs_rel < 1e-6


@pytest.mark.parametrize("mode", AFFINE_MODES)
def test_affine_alignment_undoes_scale_and_shift(mode: str, gt: np.ndarray) -> None:
    alignment = evaluate_depth((gt - 0.7) / 2.5, gt, ALIGNMENTS[mode]).alignment
    np.testing.assert_allclose([alignment.scale, alignment.shift], [2.5, 0.7], atol=1e-5)


def test_scores_by_hand() -> None:
    metrics = depth_metrics(np.array([1.2, 2.0]), np.array([1.0, 4.0]))
    assert metrics.abs_rel == pytest.approx((0.2 + 0.5) / 2)
    assert metrics.sq_rel == pytest.approx((0.04 + 1.0) / 2)
    assert metrics.rmse == pytest.approx(np.sqrt((0.04 + 4) / 2))
    assert metrics.log_rmse == pytest.approx(np.sqrt((np.log(1.2) ** 2 + np.log(2) ** 2) / 2))
    assert (metrics.delta_1, metrics.delta_2, metrics.delta_3) == (0.5, 0.5, 0.5)  # 2 > 1.25^3


def test_delta_is_strict() -> None:
    assert depth_metrics(np.array([1.25]), np.array([1.0])).delta_1 == 0


def test_negative_prediction_is_raised_for_logarithm_and_ratios_only() -> None:
    metrics = depth_metrics(np.array([-1.0]), np.array([1.0]))
    assert metrics.abs_rel == 2
    assert metrics.log_rmse == pytest.approx(-np.log(1e-5))


def test_clip_acts_after_alignment() -> None:
    gt = np.array([[1.0, 2.0, 4.0]])
    result = evaluate_depth(gt, gt, lambda p, g: ScaleShift(10.0), clip_max=4.0)
    assert result.alignment.scale == 10
    assert result.metrics.abs_rel == pytest.approx((3 + 1 + 0) / 3)


def test_ground_truth_decides_what_is_valid() -> None:
    gt = np.array([0, -1, np.nan, np.inf, 70, 69, 1])
    np.testing.assert_array_equal(valid_depth(gt, 70), [False] * 5 + [True] * 2)
    np.testing.assert_array_equal(valid_depth(gt), [False] * 4 + [True] * 3)


def test_mask_restricts_scores_but_not_alignment(pred: np.ndarray, gt: np.ndarray) -> None:
    mask = np.zeros(gt.shape, dtype=bool)
    mask[:4] = True
    whole = evaluate_depth(pred, gt, align_scale_irls)
    part = evaluate_depth(pred, gt, align_scale_irls, mask=mask)
    assert part.alignment == whole.alignment
    assert part.metrics.valid_pixels == mask.sum()
    assert part.metrics != whole.metrics


def test_invalid_pixels_do_not_matter(pred: np.ndarray, gt: np.ndarray) -> None:
    gt[0] = 0
    before = evaluate_depth(pred, gt, align_scale_irls)
    pred[0] = np.nan
    assert evaluate_depth(pred, gt, align_scale_irls) == before


def test_tensors_and_arrays_agree(pred: np.ndarray, gt: np.ndarray) -> None:
    tensors = evaluate_depth(torch.from_numpy(pred).requires_grad_(), torch.from_numpy(gt), align_lad)
    assert tensors == evaluate_depth(pred, gt, align_lad)


def test_l1_scale_is_the_best_scale(pred: np.ndarray, gt: np.ndarray) -> None:
    p, g = pred.ravel(), gt.ravel()
    best = align_l1_scale(p, g).scale
    others = np.concatenate([g / p, best * np.linspace(0.5, 1.5, 101)])  # the minimum is at one of the ratios
    assert abs_rel(best, p, g) <= min(abs_rel(scale, p, g) for scale in others) + 1e-15


def test_best_constant_is_the_best_constant(gt: np.ndarray) -> None:
    best = best_constant_depth(gt)
    ones = np.ones(gt.size)
    assert abs_rel(best, ones, gt.ravel()) <= min(abs_rel(depth, ones, gt.ravel()) for depth in gt.ravel()) + 1e-15


def test_lower_median_of_an_even_count() -> None:
    values = np.array([4.0, 1, 3, 2])
    assert lower_median(values) == 2 == float(torch.from_numpy(values).median())


def test_average_weights_by_valid_pixels() -> None:
    good = depth_metrics(np.ones(3), np.ones(3))
    bad = depth_metrics(np.full(1, 2.0), np.ones(1))
    average = average_depth([good, bad])
    assert average.abs_rel == pytest.approx(0.25)
    assert average.valid_pixels == 4


@pytest.mark.parametrize("mode", ALIGNMENTS)
def test_a_pixel_that_is_not_finite_is_named(mode: str, pred: np.ndarray, gt: np.ndarray) -> None:
    pred[3, 3] = np.nan
    with pytest.raises(ValueError, match="pred"):
        evaluate_depth(pred, gt, ALIGNMENTS[mode])


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_zero_prediction_has_no_scale(mode: str, gt: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pred"):
        evaluate_depth(np.zeros_like(gt), gt, ALIGNMENTS[mode])


def test_no_valid_pixel(gt: np.ndarray) -> None:
    with pytest.raises(ValueError, match="gt: no valid pixel"):
        evaluate_depth(gt, gt * 0, align_lad)
    with pytest.raises(ValueError, match="gt: no valid pixel"):
        evaluate_depth(gt, gt, align_lad, mask=np.zeros(gt.shape, dtype=bool))
    with pytest.raises(ValueError, match="gt: no valid pixel"):
        best_constant_depth(gt * 0)
    with pytest.raises(ValueError, match="results"):
        average_depth([])


def test_shapes_are_checked(gt: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pred: expected shape"):
        evaluate_depth(gt[:-1], gt, align_lad)
    with pytest.raises(ValueError, match="mask: expected a boolean"):
        evaluate_depth(gt, gt, align_lad, mask=np.ones(gt.shape))
