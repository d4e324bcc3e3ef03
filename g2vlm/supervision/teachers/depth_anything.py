"""Metric depth models of transformers as teachers (Depth Anything V2's metric variants): frame by frame, no cameras.

Shapes: S views, H W pixels.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForDepthEstimation

from g2vlm.errors import InputError
from g2vlm.processing import normalise_views
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.network import NetworkTeacher, Preparation, autocast, fingerprint, load_folder, positive

SOURCE = "https://huggingface.co/depth-anything"


class DepthAnything(NetworkTeacher):
    """Depth in metres, nothing else.

    Args:
        weights: folder with config.json and model.safetensors of a metric variant.
        long_side: of the input in pixels; by default the clip's.

    Raises:
        InputError: no weights, or those of a variant that gives inverse depth up to scale and shift, which is no depth.
    """

    def __init__(self, weights: str | None = None, long_side: int | None = None):
        if weights is None:
            fix = f"set the teacher's option weights to a folder with a metric variant (see {SOURCE})"
            raise InputError("no weights of Depth Anything", "nothing is downloaded", fix)
        network: Any = load_folder(AutoModelForDepthEstimation, weights)
        kind = getattr(network.config, "depth_estimation_type", "relative")
        if kind != "metric":
            why = f"its depth_estimation_type is {kind}: inverse depth up to scale and shift"
            raise InputError(f"cannot learn depth from {weights}", why, "give the weights of a metric variant")
        patch = network.config.backbone_config.patch_size
        super().__init__("depth_anything", network, Preparation(patch, long_side), None, fingerprint(weights))

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        with autocast(images):
            depth = self.network(normalise_views(images)).predicted_depth.float()
        info = self.info(images)
        return TeacherTargets(
            num_views=len(images),
            size=info.input_size,
            info=info,
            depth=depth,
            valid=positive(depth),
            metric_scale=torch.ones((), device=depth.device),
        )
