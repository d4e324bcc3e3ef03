"""How the next token is chosen and when an answer ends.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from g2vlm.errors import InputError

Decode = Callable[[Sequence[int]], str]
UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated.

    Args:
        max_new_tokens: an answer has at most this many tokens.
        temperature: 0 for the likeliest token, else sample from softmax(logits / temperature).
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: of the random numbers. Every answer uses the same ones, whatever else is in its batch.
        stop: an answer's text ends before the first of these strings.
        batch_size: at most this many answers are decoded at once; each holds its own copy of the context's keys.

    Raises:
        InputError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 16

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)!r}"
            for name, fits in [
                ("max_new_tokens", self.max_new_tokens >= 1),
                ("temperature", 0 <= self.temperature < float("inf")),
                ("top_k", self.top_k >= 0),
                ("top_p", 0 < self.top_p <= 1),
                ("stop", not isinstance(self.stop, str) and all(self.stop)),
                ("batch_size", self.batch_size >= 1),
            ]
            if not fits
        ]
        if wrong:
            allowed = "max_new_tokens and batch_size from 1, temperature and top_k from 0, 0 < top_p <= 1, stop a tuple"
            raise InputError("impossible generation options", "; ".join(wrong), f"use {allowed} of texts")


class Sampler:
    """Chooses the next token of every row."""

    def __init__(self, options: GenerationOptions):
        self.options = options
        self.random = torch.Generator().manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) -> ids (B,)."""
        if self.options.temperature == 0:
            return logits.argmax(dim=-1)
        cumulative = probabilities(logits, self.options).cumsum(dim=-1)  # (B, V) float64
        drawn = torch.rand(1, generator=self.random, dtype=torch.float64).to(logits.device)
        places = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
        return places.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def probabilities(logits: Tensor, options: GenerationOptions) -> Tensor:
    """What the next token is drawn from, (B, V) float64: scaled by the temperature, then top-k, then top-p."""
    scaled = logits.double() / options.temperature
    if 0 < options.top_k < scaled.shape[-1]:
        smallest = scaled.topk(options.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    chances = scaled.softmax(dim=-1)
    if options.top_p < 1:
        ordered, places = chances.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.masked_fill(before >= options.top_p, 0.0)
        chances = torch.zeros_like(chances).scatter(-1, places, kept)
    return chances


class GrowingText:
    """The text of one answer while its tokens come in: what may be shown already, and whether a stop string ends it."""

    def __init__(self, decode: Decode, stop: Sequence[str]):
        self.decode, self.stop = decode, stop
        self.text = ""
        self.stopped = False
        self._shown = 0

    def add(self, ids: Sequence[int]) -> str:
        """All ids so far -> the text that is new and certain: no half characters, no beginnings of stop strings."""
        self.text = self.decode(ids)
        found = [place for place in map(self.text.find, self.stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self._show(len(self.text))
        return self._show(len(self.text.rstrip(UNFINISHED)) - self._pending())

    def rest(self) -> str:
        """What has not been shown, once no token follows."""
        return self._show(len(self.text))

    def _show(self, stop: int) -> str:
        start, self._shown = self._shown, max(self._shown, stop)
        return self.text[start : self._shown]

    def _pending(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        text = self.text.rstrip(UNFINISHED)
        ends = [size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return max(ends, default=0)
