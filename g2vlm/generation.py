"""Answers: a prefix is computed once, in one forward, and any number of questions are answered over it.

The segments of a question end with the newline after "assistant" (`g2vlm.prompts`), as the released code feeds it
before the first token of its answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.model.cache import KVCache, Rows
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.outputs import G2VLMOutput
from g2vlm.processing import sequence_builder
from g2vlm.sampling import Decode, GenerationOptions, GrowingText, Sampler
from g2vlm.sequence import PackedSequence, Sample, Segment, Text
from geometry import GeometryPrediction

Stream = Callable[[int, str], None]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Cached context of one sample. Nothing that continues it changes it.

    Args:
        sequence: what the cache ends with.
        cache: keys and values of all tokens so far.
        geometry: one prediction per geometry segment of the last `prefill`, if asked for.
    """

    sequence: PackedSequence
    cache: KVCache
    geometry: tuple[GeometryPrediction, ...] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the context."""
        return self.cache.num_tokens


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        ids: its tokens, without eos; with those of the stop string that ended it.
        text: the decoded ids up to a stop string; None when no `decode` was given.
        finish: what ended it: the eos token, a stop string, or `max_new_tokens`.
    """

    ids: tuple[int, ...]
    text: str | None
    finish: Literal["eos", "stop", "length"]


@torch.inference_mode()
def prefill(
    model: G2VLMForConditionalGeneration,
    segments: Sample,
    views: Sequence[Tensor] = (),
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    predict_geometry: bool = False,
    after: Prefix | None = None,
) -> Prefix:
    """The context of one sample in one forward, whatever the number of views and images.

    Args:
        model: the model, on its device.
        segments: text, views and semantic images in order.
        views: per geometry segment, normalised images (S, 3, H, W) on the model's device.
        pixel_values: (patches, 1176) of all semantic images, on the model's device.
        image_grid_thw: (images, 3) their grids in patches.
        predict_geometry: also decode points and cameras of the views, the same as without a question.
        after: a context that the segments continue; it stays as it is.

    Raises:
        ValueError: pixels that do not fit the segments.
    """
    builder = sequence_builder(model.config)
    sequence = builder.extend(after.sequence, [segments]) if after else builder.build([segments])
    output: G2VLMOutput = model(
        sequence=sequence.to(model.device),
        views=views,
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw,
        predict_geometry=predict_geometry,
        cache=after.cache if after else None,
        use_cache=True,
    )
    assert output.cache is not None
    return Prefix(sequence, output.cache, output.geometry)


@torch.inference_mode()
def answer(
    model: G2VLMForConditionalGeneration,
    prefix: Prefix,
    continuations: Sequence[Sequence[Segment]],
    options: GenerationOptions | None = None,
    decode: Decode | None = None,
    stream: Stream | None = None,
) -> list[Answer]:
    """Answers several questions over one prefix; none sees another, and each ends on its own.

    Args:
        model: the model that computed the prefix.
        prefix: the common context.
        continuations: per question, its text segments, the last of which ends where the answer begins.
        options: how to choose and when to stop.
        decode: ids to text, without special tokens; needed for stop strings, a stream and `Answer.text`.
        stream: called with the index of a question and the next piece of its answer's text.

    Raises:
        InputError: a question without text or with images; stop strings or a stream without `decode`.
    """
    options = options or GenerationOptions()
    _check(continuations, options, decode, stream)
    builder = sequence_builder(model.config)
    answers: list[Answer] = []
    for start in range(0, len(continuations), options.batch_size):
        batch = continuations[start : start + options.batch_size]
        sequence = builder.extend(prefix.sequence, batch, parents=[0] * len(batch)).to(model.device)
        growing = [_Growing(start + i, model.config.tokens.eos, options, decode, stream) for i in range(len(batch))]
        answers += _decode(model, *_start(model, sequence, options, cache=prefix.cache), growing, options)
    return answers


@torch.inference_mode()
def answer_pack(
    model: G2VLMForConditionalGeneration,
    samples: Sequence[Sample],
    views: Sequence[Tensor] = (),
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    options: GenerationOptions | None = None,
    decode: Decode | None = None,
    stream: Stream | None = None,
) -> list[Answer]:
    """Answers samples that have their own views and images, in one prefill and one batch.

    Args:
        model: the model, on its device.
        samples: all segments of each sample, the last one a text that ends where the answer begins.
        views, pixel_values, image_grid_thw: of all samples in order, as in `prefill`.
        options, decode, stream: as in `answer`; `options.batch_size` is not looked at.

    Raises:
        InputError: a sample that does not end with text; stop strings or a stream without `decode`.
    """
    options = options or GenerationOptions()
    _check([sample[-1:] for sample in samples], options, decode, stream)
    sequence = sequence_builder(model.config).build(samples).to(model.device)
    growing = [_Growing(i, model.config.tokens.eos, options, decode, stream) for i in range(len(samples))]
    pixels = {"views": views, "pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
    return _decode(model, *_start(model, sequence, options, **pixels), growing, options)


def _check(
    continuations: Sequence[Sequence[Segment]],
    options: GenerationOptions,
    decode: Decode | None,
    stream: Stream | None,
) -> None:
    for i, segments in enumerate(continuations):
        if not segments or not all(isinstance(segment, Text) and not segment.supervised for segment in segments):
            raise InputError(
                f"question {i} cannot be answered",
                "it has no text, or holds images, views or an answer",
                "put images and views into the prefix and end the question with text",
            )
    if decode is None and (options.stop or stream):
        raise InputError("stop strings and streaming need text", "no decode was given", "pass the tokenizer's decode")


def _start(
    model: G2VLMForConditionalGeneration, sequence: PackedSequence, options: GenerationOptions, **inputs: object
) -> tuple[Tensor, Rows]:
    """One forward over a pack: the logits (B, vocab) that begin each answer, and the rows to decode them in."""
    logits_at = torch.tensor(sequence.last_tokens, device=sequence.semantic_ids.device)
    output: G2VLMOutput = model(
        sequence=sequence, logits_at=logits_at, predict_geometry=False, use_cache=True, **inputs
    )
    assert output.logits is not None
    assert output.cache is not None
    return output.logits, Rows.after(sequence, output.cache, room=options.max_new_tokens - 1)


def _decode(
    model: G2VLMForConditionalGeneration,
    logits: Tensor,
    rows: Rows,
    growing: Sequence["_Growing"],
    options: GenerationOptions,
) -> list[Answer]:
    """Token by token, one row per answer, until every row has ended."""
    choose = Sampler(options)
    while True:
        ids = choose(logits)
        for row, token in zip(growing, ids.tolist(), strict=True):
            row.add(token)
        if all(row.finish for row in growing):
            return [row.answer() for row in growing]
        logits = model.decode(ids, rows)


class _Growing:
    """One answer while it is generated; tokens after its end are ignored."""

    def __init__(self, index: int, eos: int, options: GenerationOptions, decode: Decode | None, stream: Stream | None):
        self.index, self.eos, self.options, self.stream = index, eos, options, stream
        self.ids: list[int] = []
        self.text = GrowingText(decode, options.stop) if decode else None
        self.finish: Literal["eos", "stop", "length"] | None = None

    def add(self, token: int) -> None:
        if self.finish:
            return
        if token == self.eos:
            self._end("eos")
            return
        self.ids.append(token)
        if self.text and (self.stream or self.options.stop):
            self._show(self.text.add(self.ids))
        if self.text and self.text.stopped:
            self._end("stop")
        elif len(self.ids) == self.options.max_new_tokens:
            self._end("length")

    def answer(self) -> Answer:
        assert self.finish
        return Answer(tuple(self.ids), self.text.text if self.text else None, self.finish)

    def _end(self, finish: Literal["eos", "stop", "length"]) -> None:
        self.finish = finish
        if self.text and not self.text.stopped:
            self._show(self.text.add(self.ids) + self.text.rest())

    def _show(self, piece: str) -> None:
        if piece and self.stream:
            self.stream(self.index, piece)
