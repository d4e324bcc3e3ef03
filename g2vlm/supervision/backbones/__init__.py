"""One small protocol through which geometric supervision reads any decoder VLM, and an adapter per model.

An objective says what it needs (`Taps`: hidden states by layer, queries and keys by block, probe tokens) and gets it
for the visual patch tokens alone, frame by frame (`Tapped`), whichever model computed it (`Backbone`).

    backbone = backbone_of(model)                       # by the model's `config.model_type`
    tapped = backbone(inputs, Taps(hidden=(6, 14), probes=Probes(camera=camera_embeddings)))
    first_frame = split_frames(tapped.hidden[6][0], tapped.frames[0])[0]                          # (h, w, d)

One grid of tokens is one physical frame; inputs in which it is not are refused.

Adding a model of transformers: subclass `TransformersBackbone`, say which placeholders belong to which frames (`media`)
and, if positions are more than the place in the row, what they are (`positions`); add it to `BACKBONES` and to the
families of tests/g2vlm/supervision/vlms.py, whose tests hold the contract with its internals.
"""

from typing import cast

from torch import nn

from g2vlm.supervision.backbones.base import (
    Backbone,
    HeadStates,
    Probes,
    QueryProjection,
    Tapped,
    Taps,
    clip,
    split_frames,
)
from g2vlm.supervision.backbones.g2vlm import G2VLMBackbone
from g2vlm.supervision.backbones.internvl import InternVLBackbone
from g2vlm.supervision.backbones.llava import LlavaNextVideoBackbone, LlavaOnevisionBackbone
from g2vlm.supervision.backbones.qwen import QwenBackbone

BACKBONES: dict[str, type[nn.Module]] = {
    "g2vlm": G2VLMBackbone,
    "qwen2_vl": QwenBackbone,
    "qwen2_5_vl": QwenBackbone,
    "qwen3_vl": QwenBackbone,
    "llava_next_video": LlavaNextVideoBackbone,
    "llava_onevision": LlavaOnevisionBackbone,
    "internvl": InternVLBackbone,
}
"""Adapter of every `config.model_type`."""


def backbone_of(model: nn.Module) -> Backbone:
    """The adapter of a model.

    Raises:
        ValueError: no adapter knows it.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in BACKBONES:
        raise ValueError(f"no backbone adapter for {kind!r}; there are adapters for {', '.join(sorted(BACKBONES))}")
    return cast(Backbone, BACKBONES[kind](model))


__all__ = [
    "BACKBONES",
    "Backbone",
    "HeadStates",
    "Probes",
    "QueryProjection",
    "Tapped",
    "Taps",
    "backbone_of",
    "clip",
    "split_frames",
]
