"""SpatialSV's task losses: what a student's depth, ray and point maps are compared with, and how.

Every task has `l2`, the mean Euclidean residual, and `confidence`, the same weighted by the predicted confidence; depth
adds `gradient`, points add `normal`, both confidence-weighted. The paper sums them with unit weights.

Shape legend: ... any batch, H W pixels, C channels.
"""

from collections.abc import Sequence

from torch import Tensor

from geometry.losses.dense import (
    STRIDES,
    ConfidenceWeights,
    DenseForm,
    confidence_gradient_loss,
    confidence_regression_loss,
    regression_loss,
    residual_norm,
)
from geometry.losses.surface import NORMAL_STRIDES, confidence_corner_normal_loss

SPATIALSV = DenseForm()
"""As the paper writes them: no trimming, and VGGT's average of the gradients."""


def map_task_terms(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    mask: Tensor,
    weights: ConfidenceWeights,
    form: DenseForm = SPATIALSV,
) -> dict[str, Tensor]:
    """The terms common to all tasks; for ray maps (C = 6, origin and direction in one norm) they are all.

    Args:
        prediction, target: (..., H, W, C).
        confidence: (..., H, W), the prediction's, positive inside the mask.
        mask: (..., H, W).
        weights: of the confidence term (the paper's lambda_c is alpha).
        form: its trimming is used.

    Returns:
        Scalars `l2` and `confidence`.
    """
    residual = residual_norm(prediction, target, mask)
    return {
        "l2": regression_loss(residual, mask, form.trim),
        "confidence": confidence_regression_loss(residual, confidence, mask, weights, form.trim),
    }


def depth_task_terms(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    mask: Tensor,
    weights: ConfidenceWeights,
    form: DenseForm = SPATIALSV,
    strides: Sequence[int] = STRIDES,
) -> dict[str, Tensor]:
    """Terms of a depth map.

    Args:
        prediction, target, confidence, mask: (..., H, W).
        weights: of the confidence and gradient terms.
        form: trimming of the first two terms, average of the gradient term.
        strides: of the gradient term.

    Returns:
        Scalars `l2`, `confidence` and `gradient`.
    """
    terms = map_task_terms(prediction[..., None], target[..., None], confidence, mask, weights, form)
    gradient = confidence_gradient_loss(prediction, target, confidence, mask, weights, strides, form.average)
    return {**terms, "gradient": gradient}


def point_task_terms(
    prediction: Tensor,
    target: Tensor,
    confidence: Tensor,
    mask: Tensor,
    weights: ConfidenceWeights,
    form: DenseForm = SPATIALSV,
    strides: Sequence[int] = NORMAL_STRIDES,
) -> dict[str, Tensor]:
    """Terms of a point map.

    Args:
        prediction, target: (..., H, W, 3).
        confidence, mask: (..., H, W).
        weights: of the confidence and normal terms.
        form: trimming of the first two terms.
        strides: of the normal term.

    Returns:
        Scalars `l2`, `confidence` and `normal`.
    """
    terms = map_task_terms(prediction, target, confidence, mask, weights, form)
    normal = confidence_corner_normal_loss(prediction, target, confidence, mask, weights, strides)
    return {**terms, "normal": normal}
