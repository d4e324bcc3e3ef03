import numpy as np
import pytest

from geometry.metrics.matching import confidence_correlation, match_metrics, temporal_robustness

RNG = np.random.default_rng(0)


def test_share_of_correct_points() -> None:
    gt = np.zeros((2, 3, 2))
    pred = np.array([[[2, 0], [0, 2.001], [1, 1]], [[2, 2], [0, 0], [-2, 0]]])
    visible = np.array([[True, True, False], [True, True, False]])
    found = match_metrics(pred, gt, visible)
    assert found.correct.tolist() == [[True, False, True], [False, True, True]]
    assert found.per_view.tolist() == [0.5, 0.5]
    assert (found.pck, found.visible_points) == (0.5, 4)
    assert match_metrics(pred, gt, visible, max_distance=3).pck == 1


def test_points_count_alike_whatever_their_view() -> None:
    gt, pred = np.zeros((2, 4, 2)), np.zeros((2, 4, 2))
    pred[1] = 9
    visible = np.array([[True] * 4, [True] + [False] * 3])
    found = match_metrics(pred, gt, visible)
    assert found.per_view.tolist() == [1, 0]
    assert found.pck == 0.8


def test_what_is_not_visible_counts_nothing() -> None:
    gt, visible = RNG.uniform(0, 8, (3, 5, 2)), RNG.random((3, 5)) < 0.6
    visible[1] = False
    visible[0, 0] = True
    pred = np.round(gt + RNG.normal(size=gt.shape))
    dirty = np.where(visible[..., None], gt, np.nan)
    clean, found = match_metrics(pred, gt, visible), match_metrics(pred, dirty, visible)
    np.testing.assert_array_equal(clean.per_view, found.per_view)
    assert clean.pck == found.pck
    assert np.isnan(found.per_view[1])


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no visible point"):
        match_metrics(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), np.zeros((1, 2), dtype=bool))
    with pytest.raises(ValueError, match="expected shape"):
        match_metrics(np.zeros((2, 2)), np.zeros((2, 2)), np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        match_metrics(np.zeros((1, 2, 2)), np.full((1, 2, 2), np.nan), np.ones((1, 2), dtype=bool))


def test_correlation_against_its_definition() -> None:
    confidence, correct, visible = RNG.random((3, 40)), RNG.random((3, 40)) < 0.4, RNG.random((3, 40)) < 0.7
    x, y = confidence[visible], correct[visible].astype(float)
    expected = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert confidence_correlation(confidence, correct, visible) == pytest.approx(expected)
    assert confidence_correlation(correct.astype(float), correct, visible) == pytest.approx(1)
    assert confidence_correlation(1 - correct.astype(float), correct, visible) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("confidence", "correct"), [([0.1, 0.2], [True, True]), ([0.1, 0.2], [False, False]), ([0.1, 0.1], [True, False])]
)
def test_no_variance_has_no_correlation(confidence: list[float], correct: list[bool]) -> None:
    assert np.isnan(confidence_correlation(np.array(confidence), np.array(correct), np.ones(2, dtype=bool)))


def test_no_visible_point_has_no_correlation() -> None:
    assert np.isnan(confidence_correlation(np.array([0.1, 0.2]), np.array([True, False]), np.zeros(2, dtype=bool)))


def test_robustness_is_relative_to_the_first_distance() -> None:
    assert temporal_robustness(np.array([0.4, 0.8, 0.1])).tolist() == [1, 2, 0.25]
    assert np.isnan(temporal_robustness(np.array([0.0, 0.4]))).all()
    assert np.isnan(temporal_robustness(np.array([np.nan, 0.4]))).all()
    with pytest.raises(ValueError, match="at least one"):
        temporal_robustness(np.array([]))
