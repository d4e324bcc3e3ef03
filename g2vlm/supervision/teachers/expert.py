"""A G2VLM's geometric expert as a teacher: what it reconstructs, and the hidden states of its tokens meanwhile.

Shapes: S views, H W pixels, h w patches, D width of the decoder.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from g2vlm.checkpoint import load_model, or_demo
from g2vlm.errors import InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.recorder import Recorder
from g2vlm.processing import recon_inputs
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.network import NetworkTeacher, Preparation, fingerprint, patch_features
from g2vlm.supervision.teachers.point_maps import PointMaps, targets_from_point_maps
from geometry import GeometryPrediction


class ExpertTeacher(NetworkTeacher):
    """The geometric expert of a checkpoint.

    Args:
        model: its folder, hub id or preset; by default the demo weights of the package.
        blocks: of the decoder, 0-based, whose raw outputs are the features; by default the last; none: no features.
        pool: features are averaged over pool x pool patches.
        long_side: of the input in pixels; by default the clip's.
        dtype: of its weights.

    Raises:
        CheckpointError, InputError: as of `load_model`; or it has no such block.
    """

    def __init__(
        self,
        model: str | None = None,
        blocks: Sequence[int] | None = None,
        pool: int = 1,
        long_side: int | None = None,
        dtype: str = "float32",
    ):
        source = or_demo(model)
        network = load_model(source, dtype)
        config = network.config
        depth = config.decoder.num_layers
        chosen = (depth - 1,) if blocks is None else tuple(blocks)
        if not all(0 <= block < depth for block in chosen):
            raise InputError(f"no features of the blocks {list(chosen)}", f"the decoder has {depth} blocks", "")
        folder = config.name_or_path
        revision = fingerprint(folder) if folder and Path(folder).is_dir() else f"random {folder}"
        features = TeacherFeatures(chosen, depth, config.hidden_size) if chosen else None
        prepare = Preparation(config.geometry_encoder.patch_size * pool, long_side, pool)
        super().__init__("expert", network, prepare, features, revision)

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        features, geometry = self._run(images, predict_geometry=True)
        assert geometry is not None
        (prediction,) = geometry
        logit = prediction.confidence
        maps = PointMaps(
            local_points=prediction.local_points,
            cam_to_world=prediction.cam_to_world,
            confidence=None if logit is None else torch.sigmoid(logit),
            confidence_kind="sigmoid",
            features=features,
        )
        return targets_from_point_maps(maps, self.info(images))

    def features_alone(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`: the decoder runs, the geometry heads do not."""
        features, _ = self._run(images, predict_geometry=False)
        height, width = images.shape[-2:]
        return TeacherTargets(len(images), (height, width), self.info(images), features=features)

    def _run(
        self, images: Tensor, predict_geometry: bool
    ) -> tuple[dict[int, Tensor], tuple[GeometryPrediction, ...] | None]:
        """Block -> features, and the reconstruction if it is asked for."""
        blocks = () if self.features is None else self.features.blocks
        model: G2VLMForConditionalGeneration = self.network
        with Recorder() as recorder:
            for block in blocks:
                recorder.keep_output(model.decoder.layers[block])
            inputs = recon_inputs(images.to(model.dtype), model.config, images.device)
            geometry = model(**inputs, predict_geometry=predict_geometry).geometry
        states = {block: recorder.output(model.decoder.layers[block])[0] for block in blocks}
        return {block: self._patches(entry, images) for block, entry in states.items()}, geometry

    def _patches(self, states: Tensor, images: Tensor) -> Tensor:
        """Features (S, h, w, D) of a block's states, the geometry tokens first and in the order of the views."""
        patch = self.prepare.multiple // self.prepare.pool
        views, rows, columns = len(images), images.shape[-2] // patch, images.shape[-1] // patch
        patches = states[: views * rows * columns].unflatten(0, (views, rows, columns))
        return patch_features(patches, self.prepare)
