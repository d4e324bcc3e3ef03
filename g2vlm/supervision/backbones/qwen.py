"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from g2vlm.supervision.backbones.base import Probes
from g2vlm.supervision.backbones.tokens import Medium, VisualTokens
from g2vlm.supervision.backbones.transformers_vlm import TransformersBackbone


class QwenBackbone(TransformersBackbone):
    """Frames are images, or the steps of videos whose every frame is given twice.

    The tower merges `temporal_patch_size` = 2 frames of a video into one grid of tokens, so each frame is repeated
    before the processor sees it (and the sampling rate doubled, so that timestamps stay). Of the features that Qwen3-VL
    adds after its first blocks probe tokens get none, since they have no visual placeholder.
    """

    def media(self, inputs: Mapping[str, Any]) -> dict[int, list[Medium]]:
        """From `image_grid_thw` (images, 3) and `video_grid_thw` (videos, 3), in patches before merging."""
        grids = {name: inputs.get(f"{name}_grid_thw") for name in ("image", "video")}
        if any(own is not None for own in grids.values()) and inputs.get("mm_token_type_ids") is None:
            raise ValueError("images without mm_token_type_ids; without them the model places image tokens as text")
        self._check_pairs(inputs.get("pixel_values_videos"))
        merge = self.config.vision_config.spatial_merge_size
        found: dict[int, list[Medium]] = {}
        for name, own in grids.items():
            rows = [] if own is None else own.tolist()
            media = [Medium(((height // merge, width // merge),) * times) for times, height, width in rows]
            found[getattr(self.config, f"{name}_token_id")] = media
        return found

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """(3, B, S): time, row, column."""
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask", "mm_token_type_ids")
        known = {name: inputs[name] for name in names if inputs.get(name) is not None}
        return self._core.get_rope_index(inputs["input_ids"], **known)[0]

    def with_probes(self, inputs: Mapping[str, Any], probes: Probes) -> tuple[dict[str, Any], VisualTokens]:
        """As of all backbones; the difference between positions and counted tokens is the expanded sequence's."""
        expanded, visual = super().with_probes(inputs, probes)
        if any(visual.frames):
            attended = expanded["attention_mask"]
            highest = expanded["position_ids"][-3:].amax((0, 2))  # of padding it is 0
            self._core.rope_deltas = (highest + 1 - attended.sum(1))[:, None]
        return expanded, visual

    @property
    def _core(self) -> Any:
        """The module that computes positions, whatever wraps it."""
        return next(module for module in self.model.modules() if hasattr(type(module), "get_rope_index"))

    def _check_pairs(self, patches: Tensor | None) -> None:
        """Video patches (patches, channels * 2 * side^2) hold one frame twice."""
        if patches is None:
            return
        vision = self.config.vision_config
        steps = patches.unflatten(-1, (-1, vision.temporal_patch_size, vision.patch_size**2))
        if not torch.equal(steps, steps[:, :, :1].expand_as(steps)):
            raise ValueError(
                f"a video's token grids mix {vision.temporal_patch_size} different frames; "
                "repeat every frame that often, or give the frames as images"
            )
