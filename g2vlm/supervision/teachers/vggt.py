"""VGGT as a teacher (Wang et al. 2025), from a local installation; written from its published description, not run with
the released weights.

Its network takes frames in [0, 1] (sides multiples of 14) and gives per frame nine numbers of a world-to-camera pose
(`geometry.decode_pose`, principal point at the image centre), depth = exp(.) and a confidence 1 + exp(.); its
aggregator gives tokens of 24 blocks, [frame attention | global attention], behind one camera and four register tokens.

Shapes: S views, H W pixels, N tokens of a frame, C width of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import (
    Half,
    NetworkTeacher,
    Preparation,
    autocast,
    fingerprint,
    import_network,
    load_weights,
    patch_features,
    positive,
    without_special,
)
from geometry import invert_rigid
from geometry.pose_encoding import decode_pose

SOURCE = "https://github.com/facebookresearch/vggt"
PATCH, DEPTH, WIDTH = 14, 24, 2048
BLOCKS = (4, 11, 17, 23)


@dataclass(frozen=True, eq=False)
class VGGTOutput:
    """What the network says about one clip.

    Args:
        pose: (S, 9) of world-to-camera poses, the field of view as the network gives it.
        depth: (S, H, W).
        confidence: (S, H, W), from 1 upwards.
        tokens: block -> (S, N, C).
        special: tokens of a frame in front of its patches.
    """

    pose: Tensor
    depth: Tensor
    confidence: Tensor
    tokens: Mapping[int, Tensor]
    special: int


class VGGT(NetworkTeacher):
    """VGGT-1B.

    Args:
        weights: folder with model.safetensors, or that file.
        blocks: whose tokens are the features, 0-based.
        half: of the channels: `frame`, `global` or `both`.
        pool: features are averaged over pool x pool patches.
        long_side: of the input in pixels; by default the clip's.
    """

    def __init__(
        self,
        weights: str | None = None,
        blocks: Sequence[int] = BLOCKS,
        half: Half = "frame",
        pool: int = 2,
        long_side: int | None = None,
    ):
        network_class = import_network("vggt", "vggt.models.vggt", "VGGT", SOURCE, weights)
        network = load_weights(network_class(), str(weights))
        prepare = Preparation(PATCH * pool, long_side, pool, half)
        features = TeacherFeatures(tuple(blocks), DEPTH, WIDTH if half == "both" else WIDTH // 2) if blocks else None
        super().__init__("vggt", network, prepare, features, fingerprint(str(weights)))

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        with autocast(images):
            tokens, special = self.network.aggregator(images[None])
        tokens = [entry.float() for entry in tokens]
        depth, confidence = self.network.depth_head(tokens, images=images[None], patch_start_idx=special)
        output = VGGTOutput(
            pose=self.network.camera_head(tokens)[-1][0],
            depth=depth[0, ..., 0],
            confidence=confidence[0],
            tokens=chosen_tokens(tokens, self.features),
            special=special,
        )
        return targets_from_vggt(output, self.info(images), self.prepare)


def chosen_tokens(tokens: Sequence[Any], features: TeacherFeatures | None) -> dict[int, Tensor]:
    """Block -> (S, N, C), of tokens (1, S, N, C) per block, for the blocks that are wanted."""
    return {block: tokens[block][0] for block in (() if features is None else features.blocks)}


def targets_from_vggt(output: VGGTOutput, info: TeacherInfo, prepare: Preparation) -> TeacherTargets:
    """What the network said, in this project's conventions: the first camera is the world, special tokens are gone.

    Args:
        output: of the network.
        info: of the targets; its input size is that of the maps.
        prepare: pooling and half of the features, whose patch is `multiple / pool` pixels.
    """
    views, size = output.depth.shape[0], info.input_size
    patch = prepare.multiple // prepare.pool
    grid = (size[0] // patch, size[1] // patch)
    world_to_cam, intrinsics = decode_pose(output.pose, size)
    features = {
        block: patch_features(without_special(tokens, output.special, *grid), prepare)
        for block, tokens in output.tokens.items()
    }
    return TeacherTargets(
        num_views=views,
        size=size,
        info=info,
        depth=output.depth.float(),
        confidence=output.confidence.float(),
        valid=positive(output.depth),
        cam_to_world=invert_rigid(world_to_cam),
        intrinsics=intrinsics,
        features=features or None,
    ).in_first_camera()
