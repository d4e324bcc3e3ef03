"""Pi3 as a teacher, from a local installation; written from its published description, not run with its weights.

Its network takes frames in [0, 1] (sides multiples of 14) and gives local points, camera-to-world poses and the logit
of a confidence; intrinsics are recovered from the points. Its 36 decoder blocks attend within frames and across them in
turn, with five register tokens in front of a frame's patches.

Shapes: S views, H W pixels, N tokens of a frame, C width of a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from g2vlm.model.recorder import Recorder
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import (
    NetworkTeacher,
    Preparation,
    autocast,
    entry,
    fingerprint,
    import_network,
    load_weights,
    patch_features,
    without_special,
)
from g2vlm.supervision.teachers.point_maps import PointMaps, targets_from_point_maps

SOURCE = "https://github.com/yyfz/Pi3"
PATCH, DEPTH, WIDTH, SPECIAL = 14, 36, 1024, 5
BLOCKS = (8, 17, 26, 35)


class Pi3(NetworkTeacher):
    """Pi3.

    Args:
        weights: folder with model.safetensors, or that file.
        blocks: decoder blocks whose outputs are the features, 0-based; even ones attend within frames.
        pool: features are averaged over pool x pool patches.
        long_side: of the input in pixels; by default the clip's.
    """

    def __init__(
        self,
        weights: str | None = None,
        blocks: Sequence[int] = BLOCKS,
        pool: int = 1,
        long_side: int | None = None,
    ):
        network_class = import_network("pi3", "pi3.models.pi3", "Pi3", SOURCE, weights)
        network = load_weights(network_class(), str(weights))
        prepare = Preparation(PATCH * pool, long_side, pool)
        features = TeacherFeatures(tuple(blocks), DEPTH, WIDTH) if blocks else None
        super().__init__("pi3", network, prepare, features, fingerprint(str(weights)))

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        blocks = () if self.features is None else self.features.blocks
        with Recorder() as recorder, autocast(images):
            for block in blocks:
                recorder.keep_output(self.network.decoder[block])
            outputs = self.network(images[None])
        tokens = {block: recorder.output(self.network.decoder[block]) for block in blocks}
        return targets_from_pi3(outputs, tokens, self.info(images), self.prepare)


def targets_from_pi3(
    outputs: Mapping[str, Any], tokens: Mapping[int, Tensor], info: TeacherInfo, prepare: Preparation
) -> TeacherTargets:
    """What the network said, in this project's conventions.

    Args:
        outputs: of the network: local_points (1, S, H, W, 3), camera_poses (1, S, 4, 4), conf (1, S, H, W, 1).
        tokens: block -> (S, N, C) or (1, S N, C).
        info, prepare: as of `targets_from_vggt`.
    """
    local_points = entry(outputs, "local_points")
    patch = prepare.multiple // prepare.pool
    grid = (info.input_size[0] // patch, info.input_size[1] // patch)
    by_view = {
        block: states.reshape(len(local_points), -1, states.shape[-1])  # (S, N, C) of either kind of block
        for block, states in tokens.items()
    }
    maps = PointMaps(
        local_points=local_points,
        cam_to_world=entry(outputs, "camera_poses"),
        confidence=torch.sigmoid(entry(outputs, "conf")[..., 0]),
        confidence_kind="sigmoid",
        features={
            block: patch_features(without_special(states, SPECIAL, *grid), prepare) for block, states in by_view.items()
        },
    )
    return targets_from_point_maps(maps, info)
