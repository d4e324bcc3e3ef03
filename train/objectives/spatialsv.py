"""SpatialSV: depth, ray and point maps out of the visual tokens of a decoder, and a teacher's features out of its last.

Shapes: S views of a clip, H W pixels of the targets, H' W' of every n-th of them, h w tokens, C width of the teacher.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.supervision.backbones.base import Backbone
from g2vlm.supervision.base import Fit, TeacherFeatures
from g2vlm.supervision.spatialsv import MapPrediction, SpatialSV, SpatialSVHeads, SpatialSVPrediction
from g2vlm.supervision.targets import TeacherTargets
from geometry.losses.dense import STRIDES, ConfidenceWeights, DenseForm, per_direction, per_pixel
from geometry.losses.features import cosine_loss, pool_to_grid
from geometry.losses.surface import NORMAL_STRIDES
from geometry.losses.task import depth_task_terms, map_task_terms, point_task_terms
from geometry.rays import make_ray_map, points_from_rays
from train.objectives.base import Needs, SupervisionObjective

TERMS = {
    "depth": ("depth_l2", "depth_confidence", "depth_gradient"),
    "ray": ("ray_l2", "ray_confidence"),
    "point": ("point_l2", "point_confidence", "point_normal"),
}
AVERAGES = {"per_pixel": per_pixel, "per_direction": per_direction}


@dataclass(frozen=True)
class SpatialSVConfig:
    """SpatialSV's heads and how they are compared with a teacher (its eq. 2, 5 and 6).

    Args:
        heads: what is predicted.
        depth, ray, point, distill: weights of the tasks' losses and of the distillation; 0 leaves out the heads, too.
        lambda_c: weight of the logarithm of the confidence.
        gradient_strides: of the depth gradients; one stride of 1 is the equation alone.
        gradient_average: per_pixel: both directions over the number of valid pixels (VGGT's, and as the paper has it);
            per_direction: the mean of each, added (GeoVR's).
        normal_strides: of the normals of points.
        normalise: measure lengths in units of the mean distance of the clip's points from its first camera.
        teacher_block: whose features are distilled, from 0; null: the teacher's last.
        lr: multiplier of the learning rate of the projectors and DPTs.
    """

    heads: SpatialSVHeads = field(default_factory=SpatialSVHeads)
    depth: float = 1.0
    ray: float = 1.0
    point: float = 1.0
    distill: float = 1.0
    lambda_c: float = 0.2
    gradient_strides: tuple[int, ...] = STRIDES
    gradient_average: Literal["per_pixel", "per_direction"] = "per_pixel"
    normal_strides: tuple[int, ...] = NORMAL_STRIDES
    normalise: bool = True
    teacher_block: int | None = None
    lr: float = 1.0


@dataclass(frozen=True, eq=False)
class MapTargets:
    """What the maps of a clip should be, at every n-th pixel; lengths in the unit of the loss, the first camera is the
    world.

    Args:
        depth: (S, H', W').
        rays: (S, H', W', 6), origin and direction.
        points: (S, H', W', 3).
        valid: (S, H', W') bool.
    """

    depth: Tensor
    rays: Tensor
    points: Tensor
    valid: Tensor

    @classmethod
    def of(cls, targets: TeacherTargets, stride: int, normalise: bool) -> Self:
        """From a teacher's depth and cameras (eq. 8 and 9); points that it predicts apart from them are not used, and
        views whose camera is not finite have nothing valid.
        """
        targets = replace(targets, points=None).in_first_camera()
        targets = targets.normalised() if normalise else targets
        assert targets.depth is not None
        assert targets.valid is not None
        assert targets.cam_to_world is not None
        assert targets.intrinsics is not None
        depth, valid = targets.depth[:, ::stride, ::stride], targets.valid[:, ::stride, ::stride]
        rays = make_ray_map(targets.cam_to_world, every(targets.intrinsics, stride), *depth.shape[1:])
        points = points_from_rays(rays, depth)
        return cls(depth, rays, points, valid & points.isfinite().all(-1))


def every(intrinsics: Tensor, stride: int) -> Tensor:
    """Intrinsics (..., 3, 3) for the map of every n-th pixel, the pixel at (0, 0) being the first."""
    scale = intrinsics.new_tensor([1 / stride, 1 / stride, 1])
    return intrinsics * scale[:, None]


def weighted(config: SpatialSVConfig) -> SpatialSVHeads:
    """The heads that have a weight.

    Raises:
        ValueError: none.
    """
    tasks = tuple(task for task in config.heads.tasks if getattr(config, task))
    return replace(config.heads, tasks=tasks, distill=config.heads.distill and config.distill > 0)


def distilled_block(config: SpatialSVConfig, features: TeacherFeatures | None) -> int:
    """The teacher's block whose features are distilled.

    Raises:
        InputError: the teacher does not give it.
    """
    assert features is not None
    block = features.depth - 1 if config.teacher_block is None else config.teacher_block
    if block not in features.blocks:
        given = ", ".join(map(str, features.blocks))
        fix = "set objectives.spatialsv.teacher_block, or the teacher's blocks"
        raise InputError(f"spatialsv distils block {block}", f"the teacher gives the blocks {given}", fix)
    return block


class SpatialSVObjective(SupervisionObjective):
    """SpatialSV's terms. Distillation is reported as 1 - cosine; eq. 2 has - cosine, whose gradient is the same.

    Args:
        config: of the run.
        module: the heads.
        teacher_block: whose features are distilled; None without distillation.
    """

    name = "spatialsv"

    def __init__(self, config: SpatialSVConfig, module: SpatialSV, teacher_block: int | None):
        weights = {"depth": config.depth, "ray": config.ray, "point": config.point}
        factors = {term: weights[task] for task in config.heads.tasks for term in TERMS[task]}
        super().__init__(module, factors | ({"distill": config.distill} if config.heads.distill else {}))
        self.config, self.teacher_block = config, teacher_block

    @classmethod
    def build(cls, config: SpatialSVConfig, backbone: Backbone, features: TeacherFeatures | None) -> Self:
        """For a backbone, and the teacher whose features are distilled.

        Raises:
            InputError: nothing to learn, layers that the backbone does not have, or a teacher without the features that
                are distilled.
        """
        try:
            config = replace(config, heads=weighted(config))
            module = SpatialSV(config.heads, Fit.of(backbone, features if config.heads.distill else None))
        except ValueError as error:
            raise InputError("objectives.spatialsv does not fit", str(error), "change objectives.spatialsv") from None
        module.initialise(backbone)
        return cls(config, module, distilled_block(config, features) if config.heads.distill else None)

    @property
    def needs(self) -> Needs:
        """Depth and cameras for any task, one block's features for distillation."""
        fields = frozenset({"depth", "valid", "cam_to_world", "intrinsics"}) if self.config.heads.tasks else frozenset()
        return Needs(fields, () if self.teacher_block is None else (self.teacher_block,))

    def clip_terms(self, prediction: SpatialSVPrediction, targets: TeacherTargets) -> dict[str, tuple[Tensor, Tensor]]:
        """As in `SupervisionObjective`: terms of every task over the clip's valid pixels, and of all its tokens."""
        terms: dict[str, tuple[Tensor, Tensor]] = {}
        if prediction.maps:
            maps = MapTargets.of(targets, self.config.heads.out_stride, self.config.normalise)
            counted = maps.valid.any().float()
            for task, own in prediction.maps.items():
                terms |= {f"{task}_{name}": (term, counted) for name, term in self._task_terms(task, own, maps).items()}
        if prediction.features is not None:
            terms["distill"] = self._distillation(prediction.features, targets)
        return terms

    def _task_terms(self, task: str, prediction: MapPrediction, targets: MapTargets) -> dict[str, Tensor]:
        config, (values, confidence) = self.config, prediction
        weights = ConfidenceWeights(alpha=config.lambda_c)
        if task == "depth":
            form = DenseForm(average=AVERAGES[config.gradient_average])
            found = values[..., 0], targets.depth, confidence, targets.valid
            return depth_task_terms(*found, weights, form, config.gradient_strides)
        if task == "ray":
            return map_task_terms(values, targets.rays, confidence, targets.valid, weights)
        return point_task_terms(
            values, targets.points, confidence, targets.valid, weights, strides=config.normal_strides
        )

    def _distillation(self, features: Tensor, targets: TeacherTargets) -> tuple[Tensor, Tensor]:
        """1 - cosine of projected tokens (S, h, w, C) and the teacher's, averaged over each token's cells."""
        assert self.teacher_block is not None
        assert targets.features is not None
        height, width = features.shape[1:3]
        teacher = pool_to_grid(targets.features[self.teacher_block], (height, width))
        known = teacher.isfinite().all(-1)
        return cosine_loss(features, teacher, known), known.any().float()
