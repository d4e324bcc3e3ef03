"""The semantic expert of our own model."""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from g2vlm.model.decoder import MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.recorder import Recorder
from g2vlm.model.rope import apply_rotary
from g2vlm.sequence import Grid, PackedSequence
from g2vlm.supervision.backbones.base import HeadStates, PerSample, Probes, QueryProjection, Tapped, Taps
from g2vlm.supervision.backbones.tokens import VisualTokens


class G2VLMBackbone(nn.Module):
    """`G2VLMForConditionalGeneration` as a `Backbone`.

    Its inputs are the keyword arguments of the model's forward. Frames are semantic images, or the steps of semantic
    videos whose every frame is given twice. Probe tokens must stand in the sequence already (`with_probes` on each
    sample). Logits are those at `logits_at`, by default of every semantic token.
    """

    def __init__(self, model: G2VLMForConditionalGeneration):
        super().__init__()
        self.model = model

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model.config.decoder.num_layers

    @property
    def width(self) -> int:
        """d."""
        return self.model.config.decoder.hidden_size

    def forward(self, inputs: Mapping[str, Any], taps: Taps = Taps()) -> Tapped:  # noqa: B008  (frozen)
        """As in `Backbone`."""
        taps.check(self.num_layers)
        sequence: PackedSequence = inputs["sequence"]
        visual = self._locate(sequence, inputs.get("image_grid_thw"), taps.probes)
        known = dict(inputs)
        if known.get("logits_at") is None:
            known["logits_at"] = torch.arange(len(sequence.semantic_ids), device=sequence.semantic_ids.device)
        with Recorder() as recorder:
            self._listen(recorder, taps)
            if taps.probes is not None:
                values = torch.cat([taps.probes.embeddings(len(grids)) for grids in visual.frames])
                recorder.replace_rows(self.model.embed_tokens, (torch.cat(visual.probes),), values)
            output = self.model(**known)
        camera, scale = None, None
        if taps.probes is not None:
            camera, scale = taps.probes.split(_pick(recorder.output(self.model.decoder.semantic_norm), visual.probes))
        heads = {block: self._heads(recorder, block, sequence, visual.index) for block in taps.attention}
        raw = recorder.output(self._block(self.num_layers))[1] if taps.raw_last else None
        return Tapped(
            logits=output.logits,
            targets=sequence.labels[known["logits_at"]],
            frames=visual.frames,
            hidden={layer: _pick(self._state(recorder, layer), visual.index) for layer in taps.hidden},
            raw_last=None if raw is None else _pick(raw, visual.index),
            queries={block: queries for block, (queries, _) in heads.items()},
            keys={block: keys for block, (_, keys) in heads.items()},
            camera=camera,
            scale=scale,
            geometry=output.geometry,
        )

    def query_projection(self, layer: int) -> QueryProjection:
        """As in `Backbone`."""
        Taps(attention=(layer,)).check(self.num_layers)
        expert = self._block(layer).semantic
        return QueryProjection.copied(expert.attention.q_proj, expert.input_norm, expert.input_norm.eps)

    def _block(self, layer: int) -> MoTLayer:
        return cast(MoTLayer, self.model.decoder.layers[layer - 1])

    def _listen(self, recorder: Recorder, taps: Taps) -> None:
        for layer in taps.hidden:
            if layer == 0:
                recorder.keep_inputs(self._block(1))
            elif layer < self.num_layers:
                recorder.keep_output(self._block(layer))
        if taps.probes is not None or self.num_layers in taps.hidden:
            recorder.keep_output(self.model.decoder.semantic_norm)
        if taps.raw_last:
            recorder.keep_output(self._block(self.num_layers))
        for block in taps.attention:
            attention = self._block(block).semantic.attention
            recorder.keep_inputs(attention)
            recorder.keep_output(attention.q_norm)
            recorder.keep_output(attention.k_norm)

    def _state(self, recorder: Recorder, layer: int) -> Tensor:
        """Layer 0 .. L of the semantic stream, (U, d)."""
        if layer == 0:
            return recorder.argument(self._block(1), 1, "semantic")
        if layer == self.num_layers:
            return recorder.output(self.model.decoder.semantic_norm)
        return recorder.output(self._block(layer))[1]

    def _heads(
        self, recorder: Recorder, block: int, sequence: PackedSequence, index: PerSample
    ) -> tuple[HeadStates, HeadStates]:
        attention = self._block(block).semantic.attention
        cos, sin = (_pick(recorder.argument(attention, place, name), index) for place, name in ((1, "cos"), (2, "sin")))
        found = []
        for norm in (attention.q_norm, attention.k_norm):
            before = _pick(recorder.output(norm), index)  # (n, heads, K) each
            found.append(HeadStates(before, tuple(apply_rotary(*own) for own in zip(before, cos, sin, strict=True))))
        return found[0], found[1]

    def _locate(self, sequence: PackedSequence, grids: Tensor | None, probes: Probes | None) -> VisualTokens:
        """Where the merged image tokens and the probe tokens of every sample are in the semantic part.

        Raises:
            ValueError: the sequence holds other image tokens or probe tokens than are given.
        """
        merge = self.model.config.semantic_encoder.merge_size
        rows = [] if grids is None else grids.tolist()
        every = [(height // merge, width // merge) for times, height, width in rows for _ in range(times)]
        slots = sequence.image_slots.tolist()
        ends = list(accumulate((math.prod(grid) for grid in every), initial=0))
        if ends[-1] != len(slots):
            raise ValueError(f"image_grid_thw has {ends[-1]} image tokens; the sequence has {len(slots)} slots")
        frames: list[tuple[Grid, ...]] = []
        index: list[Tensor] = []
        expected: list[list[int]] = []
        for _, (start, stop) in sequence.sample_ranges:
            own = [i for i in range(len(every)) if start <= slots[ends[i]] < stop]
            frames.append(tuple(every[i] for i in own))
            index.append(sequence.image_slots[ends[own[0]] : ends[own[-1] + 1]] if own else sequence.image_slots[:0])
            counts = [0] * len(own) if probes is None else probes.after_frames(len(own))
            lasts = [slots[ends[i + 1] - 1] for i in own]
            expected.append([last + 1 + k for last, count in zip(lasts, counts, strict=True) for k in range(count)])
        found = sequence.probe_slots.tolist()
        if found != [place for own in expected for place in own]:
            raise ValueError(
                f"the sequence has {len(found)} probe tokens, the taps ask for {sum(map(len, expected))} after these "
                "images; build it from samples that went through with_probes with the same probes"
            )
        places = sequence.probe_slots.split([len(own) for own in expected])
        return VisualTokens(tuple(frames), tuple(index), tuple(places))


def _pick(states: Tensor, index: PerSample) -> PerSample:
    """(U, ...) at the places (n,) of each sample."""
    return tuple(states[places] for places in index)
