"""GeoVR: cameras, depth, metric scale and multi-layer features of a teacher, from a VLM's own hidden states.

The defaults are the released code's form; where the paper's differs it is a value (docs/paper_map.md).
Shapes: T frames of a clip, H W pixels, h w cells of the teacher's features, C their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.supervision.backbones import Backbone
from g2vlm.supervision.base import Fit, TeacherFeatures
from g2vlm.supervision.geovr import GeoVR, GeoVRHeads, GeoVRPrediction, TermName, compared_channels
from g2vlm.supervision.targets import TeacherTargets
from geometry.losses.dense import (
    GEOVR,
    VGGT,
    ConfidenceWeights,
    DenseForm,
    confidence_gradient_loss,
    confidence_regression_loss,
    drop_least_confident,
    gradient_loss,
    regression_loss,
    require_pixels,
    residual_norm,
    silog_loss,
)
from geometry.losses.features import cosine_loss, pool_to_grid, relational_loss
from geometry.losses.metric_scale import log1p_scale_loss, log_scale_loss
from geometry.losses.pose import TRANSLATION_LIMIT, PoseWeights, pose_l1
from train.objectives.base import Needs, SupervisionObjective

ClipTerms = dict[str, tuple[Tensor, Tensor]]
"""Name -> mean of one clip, and 1 if there was anything to compare, else 0."""

FORMS: dict[str, DenseForm] = {"geovr": GEOVR, "vggt": VGGT, "plain": DenseForm()}
SCALE_LOSSES = {"log1p": log1p_scale_loss, "log": log_scale_loss}


@dataclass(frozen=True)
class CameraTerm(PoseWeights):
    """L1 between pose encodings (GeoVR eq. 2): `weight` times the sum of the weighted parts.

    Args:
        translation, rotation, field_of_view: weights of the parts.
        weight: of the term; 0 leaves it out, its head too.
        limit: of the error of one component of a translation.
        sign_invariant: compare with q or -q, whichever is nearer; the peers do not.
    """

    weight: float = 2.5
    limit: float = TRANSLATION_LIMIT
    sign_invariant: bool = True


@dataclass(frozen=True)
class DepthTerm:
    """Depth (GeoVR eq. 3): `weight` times the sum of the weighted parts.

    The released form is regression + gradient (+ confidence where one is predicted). Equation 3 as the paper has it is
    confidence + gradient, with `regression: 0`, `weigh_gradient: true` and a head that predicts a confidence.

    Args:
        weight: of the term; 0 leaves it out, its head too.
        regression: of the mean absolute error.
        gradient: of the gradient matching at strides 1, 2, 4, 8.
        confidence: of the mean of gamma e c - alpha log c, for a head that predicts the confidence c.
        silog: of the scale-invariant logarithmic error (Table 5).
        form: how outliers are trimmed and gradients averaged: as GeoVR's released code, as VGGT's, or plain (no
            trimming, VGGT's average).
        weigh_gradient: multiply the gradient's errors by the confidence.
        gamma, alpha: of the confidence.
        filter_ratio: share of the pixels, those that the teacher is least sure of, that do not count.
        min_pixels: pixels below which a clip does not count.
    """

    weight: float = 1.0
    regression: float = 1.0
    gradient: float = 1.0
    confidence: float = 1.0
    silog: float = 0.0
    form: Literal["geovr", "vggt", "plain"] = "geovr"
    weigh_gradient: bool = False
    gamma: float = 1.0
    alpha: float = 0.2
    filter_ratio: float = 0.0
    min_pixels: int = 100


@dataclass(frozen=True)
class ScaleTerm:
    """Metres per unit (GeoVR eq. 4).

    Args:
        weight: of the term; 0 leaves it out, its head too.
        logarithm: log1p (released) or log (the paper) of the scales whose difference counts.
    """

    weight: float = 1.0
    logarithm: Literal["log1p", "log"] = "log1p"


@dataclass(frozen=True)
class AlignmentTerm:
    """Features (GeoVR eq. 5): `weight` times the mean over layers of 1 - cosine.

    Args:
        weight: of the term; 0 leaves it out, its heads too.
        relational: of the difference between the cosines of all pairs of a frame's cells, student's and teacher's, in
            relation to the other (3DRS: 1).
    """

    weight: float = 1.0
    relational: float = 0.0


@dataclass(frozen=True)
class GeoVRConfig:
    """The sum of four terms (GeoVR eq. 6).

    Args:
        camera, depth, scale, alignment: the terms.
        heads: what predicts them.
        normalise: targets in units of the mean distance of a clip's points from its first camera, so that clips and
            teachers compare; otherwise in the teacher's unit (released: VGGT's, which is about the same).
        lr: learning-rate multiplier of the heads and the probe tokens (released: 1e-4 beside 2e-5).
    """

    camera: CameraTerm = field(default_factory=CameraTerm)
    depth: DepthTerm = field(default_factory=DepthTerm)
    scale: ScaleTerm = field(default_factory=ScaleTerm)
    alignment: AlignmentTerm = field(default_factory=AlignmentTerm)
    heads: GeoVRHeads = field(default_factory=GeoVRHeads)
    normalise: bool = True
    lr: float = 5.0

    def factors(self) -> dict[TermName, dict[str, float]]:
        """Term -> part -> what its mean is multiplied by; of the terms that have a head and a weight."""
        camera, depth = self.camera, self.depth
        confident = self.heads.predict_confidence
        parts: dict[TermName, dict[str, float]] = {
            "camera": {
                "translation": camera.weight * camera.translation,
                "rotation": camera.weight * camera.rotation,
                "field_of_view": camera.weight * camera.field_of_view,
            },
            "depth": {
                "depth": depth.weight * depth.regression,
                "depth_gradient": depth.weight * depth.gradient,
                "depth_confidence": depth.weight * depth.confidence * confident,
                "silog": depth.weight * depth.silog,
            },
            "scale": {"scale": self.scale.weight},
            "alignment": {
                "alignment": self.alignment.weight,
                "relations": self.alignment.weight * self.alignment.relational,
            },
        }
        found: dict[TermName, dict[str, float]] = {}
        for term, own in parts.items():
            weighty = {name: factor for name, factor in own.items() if factor}
            if weighty and term in self.heads.terms:
                found[term] = weighty
        return found


class GeoVRObjective(SupervisionObjective):
    """The terms of GeoVR.

    Args:
        config: weights and forms.
        module: heads for its terms.
    """

    name = "geovr"

    def __init__(self, config: GeoVRConfig, module: GeoVR):
        self.config = config
        parts = config.factors()
        super().__init__(module, {name: factor for own in parts.values() for name, factor in own.items()})
        self.terms, self.blocks = frozenset(parts), module.blocks

    @classmethod
    def build(cls, config: GeoVRConfig, backbone: Backbone, features: TeacherFeatures | None = None) -> Self:
        """With new heads for a backbone; a term without weight has none.

        Raises:
            InputError: nothing has a weight, the alignment has no features or other ones than the config says, or a
                confidence is asked for that no head predicts or nothing trains.
        """
        terms = tuple(config.factors())
        _check(config, terms, features)
        heads = replace(config.heads, terms=terms)
        fit = Fit.of(backbone, features if "alignment" in terms else None)
        try:
            module = GeoVR(heads, fit)
        except ValueError as error:
            what, fix = "unusable objectives.geovr.heads", "see configs/extensions/geovr.yaml"
            raise InputError(what, str(error), fix) from None
        module.initialise(backbone)
        return cls(config, module)

    @property
    def needs(self) -> Needs:
        """Poses, depth, scale and features as far as there are terms for them."""
        fields: set[str] = set()
        if "camera" in self.terms:
            fields |= {"cam_to_world", "intrinsics"}
        if "depth" in self.terms:
            fields |= {"depth", "valid"} | ({"confidence"} if self.config.depth.filter_ratio else set())
        if "scale" in self.terms:
            fields |= {"metric_scale"}
        if fields and self.config.normalise:
            fields |= {"cam_to_world", "intrinsics", "depth", "valid"}
        return Needs(frozenset(fields), self.blocks)

    def clip_terms(self, prediction: GeoVRPrediction, targets: TeacherTargets) -> ClipTerms:
        """As in `SupervisionObjective`.

        Raises:
            ValueError: the prediction and the targets are not of equally many frames.
        """
        config = self.config
        if self.terms & {"camera", "depth", "scale"} and config.normalise:
            targets = targets.normalised()
        terms: ClipTerms = {}
        if prediction.camera is not None:
            terms |= camera_terms(prediction.camera, targets, config.camera)
        if prediction.depth is not None:
            terms |= depth_terms(prediction.depth, prediction.confidence, targets, config.depth)
        if prediction.scale is not None:
            terms |= scale_terms(prediction.scale, targets, config.scale)
        if prediction.features:
            terms |= alignment_terms(prediction.features, targets, config)
        return terms


def _check(config: GeoVRConfig, terms: tuple[TermName, ...], features: TeacherFeatures | None) -> None:
    """Raises:
    InputError: see `GeoVRObjective.build`.
    """
    key = "objectives.geovr"
    if not terms:
        raise InputError(f"{key} has no term", "every weight is 0", "give one a weight, or leave the objective out")
    if "alignment" in terms and features is None:
        raise InputError(
            f"{key}.alignment has nothing to compare with", "none of the teachers gives features",
            f"add a teacher that does, or set {key}.alignment.weight: 0",
        )  # fmt: skip
    if "depth" not in terms:
        return
    if config.heads.predict_confidence and not config.depth.confidence:
        raise InputError(
            f"{key}.heads.predict_confidence without a loss", f"{key}.depth.confidence is 0",
            "give it a weight, or predict no confidence",
        )  # fmt: skip
    if config.depth.weigh_gradient and not config.heads.predict_confidence:
        raise InputError(
            f"{key}.depth.weigh_gradient has nothing to weigh with", "the head predicts no confidence",
            f"set {key}.heads.predict_confidence: true",
        )  # fmt: skip


def camera_terms(camera: Tensor, targets: TeacherTargets, config: CameraTerm) -> ClipTerms:
    """Errors of pose encodings (T, 9), world to camera, of frames whose true pose is finite; the world is frame 0."""
    encoding = targets.in_first_camera().pose_encoding
    _same_frames(camera, encoding)
    valid = encoding.isfinite().all(-1)
    terms = pose_l1(camera, encoding, valid, config.sign_invariant, config.limit)
    parts = {
        "translation": terms.translation,
        "rotation": terms.rotation,
        "field_of_view": terms.field_of_view,
    }
    return {name: (value, _counts(valid)) for name, value in parts.items()}


def depth_terms(depth: Tensor, confidence: Tensor | None, targets: TeacherTargets, config: DepthTerm) -> ClipTerms:
    """Errors of depth maps (T, H, W) at the pixels that count, which are as many for each part."""
    assert targets.depth is not None
    assert targets.valid is not None
    _same_frames(depth, targets.depth)
    mask = targets.valid
    if config.filter_ratio:
        assert targets.confidence is not None
        mask = drop_least_confident(mask, targets.confidence, config.filter_ratio)
    mask = require_pixels(mask, config.min_pixels)
    form, weights = FORMS[config.form], ConfidenceWeights(config.gamma, config.alpha)
    residual = residual_norm(depth[..., None], targets.depth[..., None], mask)
    parts: dict[str, Tensor] = {}
    if config.regression:
        parts["depth"] = regression_loss(residual, mask, form.trim)
    if config.gradient and config.weigh_gradient:
        assert confidence is not None
        weighed = ConfidenceWeights(config.gamma, alpha=0.0)  # equation 3 has one logarithm
        parts["depth_gradient"] = confidence_gradient_loss(
            depth, targets.depth, confidence, mask, weighed, average=form.average
        )
    elif config.gradient:
        parts["depth_gradient"] = gradient_loss(depth, targets.depth, mask, average=form.average)
    if confidence is not None:
        parts["depth_confidence"] = confidence_regression_loss(residual, confidence, mask, weights, form.trim)
    if config.silog:
        parts["silog"] = silog_loss(depth, targets.depth, mask)
    return {name: (value, _counts(mask)) for name, value in parts.items()}


def scale_terms(scale: Tensor, targets: TeacherTargets, config: ScaleTerm) -> ClipTerms:
    """Error of the metric scale (); one that could not be found does not count."""
    assert targets.metric_scale is not None
    valid = targets.metric_scale.isfinite() & (targets.metric_scale > 0)
    return {"scale": (SCALE_LOSSES[config.logarithm](scale, targets.metric_scale, valid), _counts(valid))}


def alignment_terms(predicted: Mapping[int, Tensor], targets: TeacherTargets, config: GeoVRConfig) -> ClipTerms:
    """1 - cosine between features (T, rows, columns, C) and the teacher's, averaged on that grid; mean over layers."""
    assert targets.features is not None
    cosine, relations, found = [], [], []
    for block, student in predicted.items():
        features = compared_channels(targets.features[block], config.heads.teacher_half)
        teacher = pool_to_grid(features, (student.shape[1], student.shape[2]))
        _same_frames(student, teacher)
        valid = teacher.isfinite().all(-1)
        found.append(valid.any())
        cosine.append(cosine_loss(student, teacher, valid))
        if config.alignment.relational:
            relations.append(relational_loss(student.flatten(1, 2), teacher.flatten(1, 2), valid.flatten(1, 2)))
    parts = {"alignment": cosine, "relations": relations}
    counted = _counts(torch.stack(found))
    return {name: (torch.stack(own).mean(), counted) for name, own in parts.items() if own}


def _counts(valid: Tensor) -> Tensor:
    """1 if anything is valid, else 0."""
    return valid.any().float()


def _same_frames(prediction: Tensor, target: Tensor) -> None:
    if len(prediction) != len(target):
        raise ValueError(f"{len(prediction)} frames of tokens, targets of {len(target)}; one grid must be one frame")
