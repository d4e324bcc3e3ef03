"""LLaVA-NeXT-Video and LLaVA-OneVision of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from g2vlm.sequence import Grid
from g2vlm.supervision.backbones.tokens import Medium
from g2vlm.supervision.backbones.transformers_vlm import TransformersBackbone


class LlavaNextVideoBackbone(TransformersBackbone):
    """Frames are those of videos, each pooled to one grid. A still image is a video of one frame.

    As images they would be cut into tiles, whose tokens are no one grid.
    """

    trailing = 0
    """Placeholders after a video that are no patch."""

    def media(self, inputs: Mapping[str, Any]) -> dict[int, list[Medium]]:
        """From `pixel_values_videos` (videos, T, 3, H, W)."""
        if inputs.get("pixel_values") is not None:
            raise ValueError("images are cut into tiles, which are no one grid; give each as a video of one frame")
        videos = inputs.get("pixel_values_videos")
        shape = (0, 0) if videos is None else videos.shape[:2]
        return {self.config.video_token_id: [Medium((self.grid,) * shape[1], self.trailing)] * shape[0]}

    @property
    def grid(self) -> Grid:
        """Tokens of every frame."""
        side = self._patches // self.config.spatial_pool_stride
        return side, side

    @property
    def _patches(self) -> int:
        """Patches along a side of a frame."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size


class LlavaOnevisionBackbone(LlavaNextVideoBackbone):
    """The same with frames scaled to half their side; a video ends with a token for a line's end.

    The last frame's camera token and the scale token stand before that one.
    """

    trailing = 1

    @property
    def grid(self) -> Grid:
        """Tokens of every frame."""
        side = math.ceil(self._patches / 2)
        return side, side
