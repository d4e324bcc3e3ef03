"""VGGT-Omega as a teacher, from a local installation; written from its published description, not run with the released
weights.

As VGGT (`targets_from_vggt`), but patches of 16 pixels, one camera and sixteen register tokens, and tokens kept of the
blocks 4, 11, 17 and 23 alone. Its camera head adds 0.01 to the field of view, so that it is never zero: what the
network returns is the angle itself, and nothing is added here.

Shapes: S views, H W pixels.
"""

from collections.abc import Sequence

from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.network import (
    Half,
    NetworkTeacher,
    Preparation,
    autocast,
    fingerprint,
    import_network,
    load_weights,
)
from g2vlm.supervision.teachers.vggt import BLOCKS, DEPTH, WIDTH, VGGTOutput, chosen_tokens, targets_from_vggt

SOURCE = "https://github.com/facebookresearch/vggt-omega"
PATCH = 16


class VGGTOmega(NetworkTeacher):
    """VGGT-Omega-1B.

    Args:
        weights: folder with model.safetensors, or that file.
        blocks: whose tokens are the features, 0-based, among 4, 11, 17, 23.
        half: of the channels: `frame`, `global` or `both`.
        pool: features are averaged over pool x pool patches.
        long_side: of the input in pixels; by default the clip's.

    Raises:
        InputError: a block whose tokens the network does not keep.
    """

    def __init__(
        self,
        weights: str | None = None,
        blocks: Sequence[int] = BLOCKS,
        half: Half = "frame",
        pool: int = 2,
        long_side: int | None = None,
    ):
        if not set(blocks) <= set(BLOCKS):
            raise InputError(f"no features of the blocks {list(blocks)}", "", f"VGGT-Omega keeps {list(BLOCKS)}")
        network_class = import_network("vggt_omega", "vggt_omega.models.vggt_omega", "VGGTOmega", SOURCE, weights)
        network = load_weights(network_class(), str(weights))
        prepare = Preparation(PATCH * pool, long_side, pool, half)
        features = TeacherFeatures(tuple(blocks), DEPTH, WIDTH if half == "both" else WIDTH // 2) if blocks else None
        super().__init__("vggt_omega", network, prepare, features, fingerprint(str(weights)))

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        with autocast(images):
            tokens, special = self.network.aggregator(images[None])
        tokens = [None if entry is None else entry.float() for entry in tokens]
        depth, confidence = self.network.dense_head(tokens, images=images[None], patch_token_start=special)
        output = VGGTOutput(
            pose=self.network.camera_head(tokens, patch_token_start=special)[0],
            depth=depth[0, ..., 0],
            confidence=confidence[0],
            tokens=chosen_tokens(tokens, self.features),
            special=special,
        )
        return targets_from_vggt(output, self.info(images), self.prepare)
