"""What every vision-language model of transformers shares: a decoder of blocks, placeholders, and hooks on both.

Relied on (tests/g2vlm/supervision/test_backbones.py holds it on each supported version): `get_decoder()` gives a module
with `layers` and `norm`; a block has `input_layernorm` and `self_attn`; that has `q_proj`, `k_proj`, perhaps `q_norm`
and `k_norm` over the head width, `head_dim`, and is given `position_embeddings`, the rotary tables (B, S, K), by name;
`get_input_embeddings()` is called once with `input_ids`, before the visual features are put in.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from g2vlm.model.recorder import Recorder
from g2vlm.model.rope import apply_rotary
from g2vlm.sequence import IGNORED
from g2vlm.supervision.backbones.base import HeadStates, PerSample, Probes, QueryProjection, Tapped, Taps
from g2vlm.supervision.backbones.tokens import Medium, VisualTokens, find_probes, insert_probes, locate


class TransformersBackbone(nn.Module, ABC):
    """A `*ForConditionalGeneration` of transformers as a `Backbone`.

    Its inputs are the keyword arguments that the model's processor makes, with `labels` where there are answers. With
    `logits_at_labels=True` among them, logits (L, vocabulary) and targets (L,) are of the L tokens alone that have a
    target, row by row: the logits of all others cost much and teach nothing.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The model's."""
        return cast(Any, self.model).config

    @property
    def decoder(self) -> Any:
        """The text model."""
        return cast(Any, self.model).get_decoder()

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.decoder.layers)

    @property
    def width(self) -> int:
        """d."""
        return self.decoder.norm.weight.shape[0]

    @property
    def probe_id(self) -> int:
        """Placeholder of probe tokens: the id that starts a sequence, which never stands behind an image."""
        text = self.config.get_text_config()
        for value in (text.bos_token_id, text.eos_token_id):
            if value is not None:
                return value[0] if isinstance(value, list | tuple) else value
        return 0

    @abstractmethod
    def media(self, inputs: Mapping[str, Any]) -> dict[int, list[Medium]]:
        """Per placeholder id, the images or videos of a batch in order.

        Raises:
            ValueError: inputs in which one token grid is not one physical frame.
        """

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """The position ids (..., B, S) that the model gives a batch without probe tokens: the place in the row.

        Raises:
            ValueError: flash attention, which in some releases takes a position that occurs twice for a new sequence.
        """
        if "flash" in str(self.decoder.config._attn_implementation):
            raise ValueError("probe tokens share a position with a patch, which flash attention may misread; use sdpa")
        ids: Tensor = inputs["input_ids"]
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def locate(self, inputs: Mapping[str, Any]) -> VisualTokens:
        """Where the visual patch tokens are, per sample.

        Raises:
            ValueError: the placeholders are not those of the images and videos.
        """
        return locate(inputs["input_ids"], self.media(inputs))

    def with_probes(self, inputs: Mapping[str, Any], probes: Probes) -> tuple[dict[str, Any], VisualTokens]:
        """Inputs expanded by probe tokens, position ids included, and where everything is then.

        Inputs that hold the probe tokens already come back as they are.

        Raises:
            ValueError: some of the probe tokens are there and some are not, or all but not their position ids.
        """
        visual = self.locate(inputs)
        if not any(visual.frames):
            return dict(inputs), VisualTokens(visual.frames, visual.index, visual.index)
        placed = inputs.get("position_ids") is not None
        present = find_probes(inputs, visual, probes, self.probe_id)
        if present is not None and not placed:
            raise ValueError("the sequence has its probe tokens but no position_ids; give those that came with it")
        if present is not None:
            return dict(inputs), present
        known = dict(inputs) if placed else {**inputs, "position_ids": self.positions(inputs)}
        return insert_probes(known, visual, probes, self.probe_id)

    def forward(self, inputs: Mapping[str, Any], taps: Taps = Taps()) -> Tapped:  # noqa: B008  (frozen)
        """As in `Backbone`."""
        taps.check(self.num_layers)
        if inputs.get("logits_to_keep"):
            raise ValueError("logits_to_keep is set; targets belong to the logits of the whole sequence")
        if taps.probes is None:
            known, visual = dict(inputs), self.locate(inputs)
        else:
            known, visual = self.with_probes(inputs, taps.probes)
        labels, sparse = known.pop("labels", None), known.pop("logits_at_labels", False)
        targets = None if labels is None else pad(labels[:, 1:], (0, 1), value=IGNORED)
        with Recorder() as recorder:
            self._listen(recorder, taps)
            if taps.probes is not None:
                self._place(recorder, taps.probes, visual)
            if sparse and targets is not None:
                recorder.choose_rows(cast(Any, self.model).get_output_embeddings(), targets != IGNORED)
                targets = targets[targets != IGNORED]
            logits = self.model(**{"use_cache": False, **known}).logits
        camera, scale = None, None
        if taps.probes is not None:
            camera, scale = taps.probes.split(_pick(recorder.output(self.decoder.norm), visual.probes))
        heads = {block: self._heads(recorder, block, visual) for block in taps.attention}
        raw = _first(recorder.output(self.decoder.layers[-1])) if taps.raw_last else None
        return Tapped(
            logits=logits,
            targets=targets,
            frames=visual.frames,
            hidden={layer: _pick(self._state(recorder, layer), visual.index) for layer in taps.hidden},
            raw_last=None if raw is None else _pick(raw, visual.index),
            queries={block: queries for block, (queries, _) in heads.items()},
            keys={block: keys for block, (_, keys) in heads.items()},
            camera=camera,
            scale=scale,
        )

    def generate(self, inputs: Mapping[str, Any], probes: Probes, **options: Any) -> Any:
        """The model's `generate` on a prompt with the probe tokens that it was trained with.

        Without them, which is the rule, call the model itself; the two together measure what leaving them out costs.
        """
        known, visual = self.with_probes(inputs, probes)
        known.pop("labels", None)
        with Recorder() as recorder:
            self._place(recorder, probes, visual)
            return cast(Any, self.model).generate(**known, **options)

    def query_projection(self, layer: int) -> QueryProjection:
        """As in `Backbone`."""
        Taps(attention=(layer,)).check(self.num_layers)
        block = self.decoder.layers[layer - 1]
        return QueryProjection.copied(
            block.self_attn.q_proj, block.input_layernorm, block.input_layernorm.variance_epsilon
        )

    def _listen(self, recorder: Recorder, taps: Taps) -> None:
        layers, last = self.decoder.layers, self.num_layers
        for layer in taps.hidden:
            if layer == 0:
                recorder.keep_inputs(layers[0])
            elif layer < last:
                recorder.keep_output(layers[layer - 1])
        if taps.probes is not None or last in taps.hidden:
            recorder.keep_output(self.decoder.norm)
        if taps.raw_last:
            recorder.keep_output(layers[-1])
        for block in taps.attention:
            attention = layers[block - 1].self_attn
            recorder.keep_inputs(attention)
            for name in ("q", "k"):
                recorder.keep_output(_head_source(attention, name))

    def _place(self, recorder: Recorder, probes: Probes, visual: VisualTokens) -> None:
        """The embeddings of the probe tokens in their places."""
        values = torch.cat([probes.embeddings(len(grids)) for grids in visual.frames])
        rows = torch.cat([torch.full_like(own, sample) for sample, own in enumerate(visual.probes)])
        recorder.replace_rows(cast(Any, self.model).get_input_embeddings(), (rows, torch.cat(visual.probes)), values)

    def _state(self, recorder: Recorder, layer: int) -> Tensor:
        """Layer 0 .. L of the whole sequence, (B, S, d)."""
        if layer == 0:
            return recorder.argument(self.decoder.layers[0], 0, "hidden_states")
        if layer == self.num_layers:
            return recorder.output(self.decoder.norm)
        return _first(recorder.output(self.decoder.layers[layer - 1]))

    def _heads(self, recorder: Recorder, block: int, visual: VisualTokens) -> tuple[HeadStates, HeadStates]:
        attention = self.decoder.layers[block - 1].self_attn
        tables = recorder.argument(attention, 1, "position_embeddings")
        num_samples = len(visual.index)
        cos, sin = (_pick(table.expand(num_samples, -1, -1), visual.index) for table in tables)
        found = []
        for name in ("q", "k"):
            states = recorder.output(_head_source(attention, name))
            states = states.unflatten(-1, (-1, attention.head_dim)) if states.ndim == 3 else states
            before = _pick(states, visual.index)  # (n, heads, K) each
            after = tuple(apply_rotary(*own) for own in zip(before, cos, sin, strict=True))
            found.append(HeadStates(before, after))
        return found[0], found[1]


def _head_source(attention: Any, name: str) -> nn.Module:
    """The module that gives queries or keys as the rotation takes them."""
    return getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")


def _first(output: Any) -> Tensor:
    """The hidden states of what a block returned."""
    return output[0] if isinstance(output, tuple) else output


def _pick(states: Tensor, index: PerSample) -> PerSample:
    """(B, S, ...) at the places (n,) of each sample."""
    return tuple(own[places] for own, places in zip(states, index, strict=True))
