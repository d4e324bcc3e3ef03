"""Geometry tokens that a run's model is given: from a cache or a frozen teacher to the images of a pack."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from g2vlm.config import G2VLMConfig
from g2vlm.data.chat.batch import ChatBatch, shown_clip
from g2vlm.data.chat.types import ChatSource
from g2vlm.errors import InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.geometry_tokens import Clip, GeometryTokenSource, frames_of_samples
from g2vlm.model.fusion import frame_sizes
from g2vlm.token_sources import build_token_source
from train.config import RunConfig
from train.objectives.supervision import first_clip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenTokens:
    """What the images of packs read: the tokens of the clip that they show; images of no known clip read none.

    Args:
        source: asked about every clip, without gradients.
        fusion: of the model.
        merge_size: of its semantic encoder.
    """

    source: GeometryTokenSource
    fusion: FusionConfig
    merge_size: int

    @torch.no_grad()
    def complete(self, batch: ChatBatch) -> ChatBatch:
        """A batch with its tokens.

        Raises:
            InputError: the source has none of a clip.
        """
        if batch.image_grid_thw is None:
            return replace(batch, tokens=())
        counts = frames_of_samples(batch.sequence, frame_sizes(batch.image_grid_thw, self.merge_size))
        tokens: list[Tensor | None] = []
        for scene, count in zip(batch.clips, counts, strict=True):
            tokens += [None] * count if scene is None else self._of(Clip.of(scene).to(batch.image_grid_thw.device))
        return replace(batch, tokens=tuple(tokens))

    def _of(self, clip: Clip) -> list[Tensor]:
        return self.source.tokens(clip).only(self.fusion.tokens).frames(self.fusion.scope)


def given_tokens(config: RunConfig, model: G2VLMConfig, device: torch.device) -> GivenTokens | None:
    """The tokens that a run's model is given; None where its fusion takes its own, or there is none.

    Raises:
        InputError: `geometry_tokens` without a fusion that is given tokens, or such a fusion without them, or tokens of
            another width than it takes.
    """
    wanted = model.fusion is not None and model.fusion.source == "given"
    asked = config.geometry_tokens
    if wanted != (asked is not None):
        pair = ["fusion.source: given", "geometry_tokens"]
        given, lacking = pair if wanted else pair[::-1]
        raise InputError(f"{given} without {lacking}", "the fusion reads what geometry_tokens names", "give both")
    if model.fusion is None or asked is None:
        return None
    source = build_token_source(asked.name, asked.root and Path(asked.root), device, **asked.options)
    if source.token_dim != model.fusion.token_dim:
        why = f"the tokens of {asked.name} have {source.token_dim} values, the fusion takes {model.fusion.token_dim}"
        raise InputError("geometry tokens of another width", why, f"set fusion.token_dim to {source.token_dim}")
    return GivenTokens(source, model.fusion, model.semantic_encoder.merge_size)


def check_clips(sources: Sequence[ChatSource], given: GivenTokens, device: torch.device) -> None:
    """Ask for the tokens of a clip of every source before anything is trained, as a step will ask.

    Raises:
        InputError: no source shows clips, or the tokens of one are not there.
    """
    shown = [(source, first_clip(source)) for source in sources]
    for source, sample in shown:
        scene = None if sample is None else shown_clip(sample)
        if scene is None:
            log.info("%s shows no clips: its images are not fused", source.name)
        else:
            given.source.tokens(Clip.of(scene).to(device))
    if not any(sample for _, sample in shown):
        names = ", ".join(source.name for source in sources)
        raise InputError("geometry_tokens for nothing", f"no source of data.chat shows clips of scenes: {names}",
                         "add one that does, such as videos of jsonl, or leave the fusion out")  # fmt: skip
