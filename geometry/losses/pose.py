"""Losses of pose encodings: nine numbers per view, translation (3), quaternion (4, scalar last), field of view (2).

Shape legend: ... any batch, usually B samples of S views.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from geometry.losses.masked import masked_mean
from geometry.rotations import at_least_float32
from geometry.transforms import length

TRANSLATION_LIMIT = 100.0  # largest translation error of one entry
_TRANSLATION, _QUATERNION, _VIEW = slice(0, 3), slice(3, 7), slice(7, 9)


@dataclass(frozen=True)
class PoseWeights:
    """Weights of the three terms (VGGT's trainer and GeoVR's released code)."""

    translation: float = 1.0
    rotation: float = 1.0
    field_of_view: float = 0.5


@dataclass(frozen=True, eq=False)
class PoseTerms:
    """Unweighted scalars."""

    translation: Tensor
    rotation: Tensor
    field_of_view: Tensor

    def total(self, weights: PoseWeights) -> Tensor:
        """Weighted sum (GeoVR eq. 2)."""
        return (
            weights.translation * self.translation
            + weights.rotation * self.rotation
            + weights.field_of_view * self.field_of_view
        )


def pose_l1(
    prediction: Tensor, target: Tensor, valid: Tensor, sign_invariant: bool, limit: float = TRANSLATION_LIMIT
) -> PoseTerms:
    """Mean absolute errors over views and components; each translation component is clamped at the limit.

    Args:
        prediction, target: pose encodings (..., 9) of one convention.
        valid: (...) bool, views that count.
        sign_invariant: compare with q or -q, whichever is nearer (`nearest_sign`); the peers do not.
        limit: of one component of the translation error.

    Returns:
        The three terms.
    """
    translation, rotation, view = _errors(prediction, target, valid, sign_invariant)
    clamped = translation.abs().clamp_max(limit)
    return PoseTerms(*(masked_mean(e, _each(valid, e)) for e in (clamped, rotation.abs(), view.abs())))


def pose_l2(
    prediction: Tensor, target: Tensor, valid: Tensor, sign_invariant: bool, limit: float = TRANSLATION_LIMIT
) -> PoseTerms:
    """Mean over views of the Euclidean norm of each group's error (VGGT's `l2`); the translation's norm is clamped.

    Args:
        prediction, target: pose encodings (..., 9) of one convention.
        valid: (...) bool, views that count.
        sign_invariant: as in `pose_l1`.
        limit: of the norm of the translation error.

    Returns:
        The three terms.
    """
    translation, rotation, view = (length(e) for e in _errors(prediction, target, valid, sign_invariant))
    return PoseTerms(*(masked_mean(e, valid) for e in (translation.clamp_max(limit), rotation, view)))


def nearest_sign(quaternion: Tensor, target: Tensor) -> Tensor:
    """The target (..., 4) or its negative, the same rotation, whichever has the smaller L1 distance; no gradient."""
    same, opposite = ((quaternion.detach() - sign * target).abs().sum(-1, keepdim=True) for sign in (1, -1))
    return torch.where(opposite < same, -target, target)


def _errors(prediction: Tensor, target: Tensor, valid: Tensor, sign_invariant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Differences (..., 3), (..., 4), (..., 2), 0 where a view does not count."""
    prediction, target = (torch.where(valid[..., None], at_least_float32(x), 0) for x in (prediction, target.detach()))
    quaternion, true_quaternion = prediction[..., _QUATERNION], target[..., _QUATERNION]
    if sign_invariant:
        true_quaternion = nearest_sign(quaternion, true_quaternion)
    translation, view = (prediction[..., group] - target[..., group] for group in (_TRANSLATION, _VIEW))
    return translation, quaternion - true_quaternion, view


def _each(valid: Tensor, errors: Tensor) -> Tensor:
    """The mask of the views (...) for each component of (..., k)."""
    return valid[..., None].expand_as(errors)
