"""GASP's diagnostics against independent arithmetic (golden family `supervision`, keys `diag_*`)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from geometry.matching import attention_scores, best_cells, cosine_scores
from geometry.metrics.matching import confidence_correlation, match_metrics, temporal_robustness
from tests.parity import golden

pytestmark = pytest.mark.parity

CASES = golden.cases("supervision/gasp_spec_derived*.safetensors")


@pytest.mark.parametrize("path", CASES)
def test_matched_cells(path: Path) -> None:
    case = load_file(path)
    queries, keys = case["diag_Q_f64"][:, None], case["diag_K_f64"][:, :, None]  # one head
    columns = math.isqrt(keys.shape[1])  # the fixture's grid is square
    assert torch.equal(best_cells(cosine_scores(queries, keys), columns), case["diag_pred_xy"])
    confidence = attention_scores(queries, keys).amax(-1)
    torch.testing.assert_close(confidence, case["diag_conf_f64"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", CASES)
def test_metrics(path: Path) -> None:
    case = load_file(path)
    with safe_open(path, "pt") as file:
        limit = float(file.metadata()["delta_patches"])
    found = match_metrics(case["diag_pred_xy"], case["diag_gt_xy_f64"], case["diag_visible"], limit)
    assert np.array_equal(found.correct, case["diag_correct"].numpy())
    np.testing.assert_allclose(found.per_view, case["diag_pck_f64"].numpy(), rtol=1e-12)
    np.testing.assert_allclose(temporal_robustness(found.per_view), case["diag_temporal_f64"].numpy(), rtol=1e-12)
    pearson = confidence_correlation(case["diag_conf_f64"], case["diag_correct"], case["diag_visible"])
    assert pearson == pytest.approx(case["diag_pearson_f64"].item(), rel=1e-9, nan_ok=True)
