"""From what the model predicts for the views of a scene to what its user gets."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from g2vlm.images import SourceImage
from g2vlm.scene import Scene
from geometry import GeometryPrediction

log = logging.getLogger(__name__)


def scene_of(prediction: GeometryPrediction, pixels: Tensor, sources: Sequence[SourceImage], model: str) -> Scene:
    """The scene that a model saw.

    Args:
        prediction: for the S views.
        pixels: (S, 3, H, W) in [0, 1], the views before normalisation.
        sources: the S images as read.
        model: name of the model.
    """
    prediction = prediction.to("cpu")
    return Scene.from_prediction(
        prediction.local_points.numpy(),
        prediction.cam_to_world.numpy(),
        prediction.normals.numpy(),
        usable_intrinsics(prediction.intrinsics, pixels.shape[-1]).numpy(),
        pixels.numpy(),
        sources,
        units="relative",
        model=model,
        confidence=None if prediction.confidence is None else torch.sigmoid(prediction.confidence).numpy(),
    )


def usable_intrinsics(intrinsics: Tensor, width: int) -> Tensor:
    """Intrinsics (S, 3, 3) whose focal lengths are positive and at most 100 image widths.

    Points that follow no pinhole camera, as an untrained model's, may have no such fit; those views get a focal length
    of one image width, and the log says so.
    """
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[:, :2]  # (S, 2)
    usable = ((focal > 0) & (focal < 100 * width)).all(dim=-1)
    if not usable.all():
        log.warning(
            "%d of %d views: the points fit no pinhole camera (untrained weights?); focal length set to %d pixels",
            int((~usable).sum()),
            len(usable),
            width,
        )
    default = intrinsics.clone()
    default[:, 0, 0] = default[:, 1, 1] = width
    return torch.where(usable[:, None, None], intrinsics, default)
