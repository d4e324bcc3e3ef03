"""InternVL of transformers."""

from collections.abc import Mapping
from typing import Any

from g2vlm.supervision.backbones.tokens import Medium, VisualTokens
from g2vlm.supervision.backbones.transformers_vlm import TransformersBackbone


class InternVLBackbone(TransformersBackbone):
    """Frames are images, or frames of a video, that the processor left whole (`max_patches=1`)."""

    def media(self, inputs: Mapping[str, Any]) -> dict[int, list[Medium]]:
        """From `pixel_values` (frames, 3, H, W)."""
        vision, ratio = self.config.vision_config, self.config.downsample_ratio
        rows, columns = (int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        pixels = inputs.get("pixel_values")
        return {self.config.image_token_id: [Medium(((rows, columns),))] * (0 if pixels is None else len(pixels))}

    def locate(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """As of all backbones; tiles of one image, which follow each other without a word, are refused."""
        visual = super().locate(inputs)
        ids = inputs["input_ids"]
        for sample, row in enumerate(ids):
            following = visual.last_patches(sample) + 1
            if (row[following[following < len(row)]] == self.config.image_token_id).any():
                raise ValueError(f"sample {sample} has an image of several tiles; let the processor use max_patches=1")
        return visual
