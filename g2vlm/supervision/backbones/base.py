"""What supervision asks of a decoder VLM, what it gets back, and the protocol between them.

Shapes: B samples, T frames of a sample, h x w tokens of a frame, n = sum of h * w over a sample's frames, d width,
L blocks, N query heads, M key heads, K width of a head.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from g2vlm.model.layers import RMSNorm
from g2vlm.sequence import Grid
from geometry import GeometryPrediction

PerSample = tuple[Tensor, ...]
"""One tensor per sample; one without frames has a tensor of no rows."""


@dataclass(frozen=True, eq=False)
class Probes:
    """Embeddings of the probe tokens; they belong to the objective that asks for them.

    Args:
        camera: (2, d) for a token after the last patch of every frame: of a sample's first frame, and of all others.
        scale: (d,) for a token after a sample's last patch, behind the camera token if there is one.

    Raises:
        ValueError: neither, or another shape.
    """

    camera: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.camera is None and self.scale is None:
            raise ValueError("Probes holds neither a camera nor a scale embedding; leave the probes out")
        if self.camera is not None and (self.camera.ndim != 2 or self.camera.shape[0] != 2):
            raise ValueError(f"Probes.camera is {tuple(self.camera.shape)}; it must be (2, width)")
        if self.scale is not None and self.scale.ndim != 1:
            raise ValueError(f"Probes.scale is {tuple(self.scale.shape)}; it must be (width,)")

    def after_frames(self, num_frames: int) -> list[int]:
        """Number of probe tokens after each frame of a sample."""
        counts = [int(self.camera is not None)] * num_frames
        if counts and self.scale is not None:
            counts[-1] += 1
        return counts

    def embeddings(self, num_frames: int) -> Tensor:
        """(camera tokens + scale token, d) of one sample, in the order of its probe tokens."""
        rows = []
        if self.camera is not None:
            rows.append(self.camera[torch.arange(num_frames, device=self.camera.device).clamp(max=1)])
        if self.scale is not None:
            rows.append(self.scale[None][:num_frames])
        return torch.cat(rows)

    def split(self, states: PerSample) -> "tuple[PerSample | None, PerSample | None]":
        """States of each sample's probe tokens -> of the camera tokens (T, d) and of the scale token (0 or 1, d)."""
        if self.camera is None:
            return None, states
        if self.scale is None:
            return states, None
        return tuple(own[:-1] for own in states), tuple(own[-1:] for own in states)


@dataclass(frozen=True)
class Taps:
    """What to keep of a forward. Layers are numbered as transformers numbers `hidden_states`:

    0 is the input embeddings with the visual features in place, l = 1 .. L-1 the raw output of block l (of Qwen3-VL
    before the deep-stack features, which only the next block's input has), L the last block's output after the final
    norm.

    Args:
        hidden: layers, 0 .. L.
        raw_last: also the last block's output before the final norm.
        attention: blocks, 1 .. L, whose queries and keys are kept.
        probes: probe tokens to insert; their states of layer L are returned.
    """

    hidden: tuple[int, ...] = ()
    raw_last: bool = False
    attention: tuple[int, ...] = ()
    probes: Probes | None = None

    def __or__(self, other: "Taps") -> "Taps":
        """What either asks for.

        Raises:
            ValueError: both have probe tokens.
        """
        if self.probes is not None and other.probes is not None and self.probes is not other.probes:
            raise ValueError("two Taps with probe tokens; a sequence has one set of them, so let both share one Probes")
        return Taps(
            tuple(sorted({*self.hidden, *other.hidden})),
            self.raw_last or other.raw_last,
            tuple(sorted({*self.attention, *other.attention})),
            self.probes or other.probes,
        )

    def check(self, num_layers: int) -> None:
        """Raises:
        ValueError: a layer that a backbone of `num_layers` blocks does not have.
        """
        for name, first, asked in (("hidden", 0, self.hidden), ("attention", 1, self.attention)):
            wrong = [layer for layer in asked if not first <= layer <= num_layers]
            if wrong:
                raise ValueError(f"Taps.{name} asks for {wrong}; the backbone has layers {first} to {num_layers}")


class HeadStates(NamedTuple):
    """Queries or keys of the visual tokens, each (n, heads, K) per sample, after the model's own norm of them if any.

    Attention scores are q . k / sqrt(K) of what is `after_rotary`; query head i has key head i // (N / M).
    """

    before_rotary: PerSample
    after_rotary: PerSample


@dataclass(frozen=True, eq=False)
class Tapped:
    """What a forward gave. Everything per sample holds visual patch tokens only, frame after frame, row by row.

    Args:
        logits: (B, S, vocabulary), or (S, vocabulary) of a packed sequence; S counts the probe tokens. Only (L,
            vocabulary) where an adapter was asked for those of the L tokens with a target.
        targets: the id to predict at every entry of `logits`, -100 where there is no loss; None without labels. The
            language loss is `cross_entropy(logits.flatten(0, -2), targets.flatten())`, already shifted.
        frames: per sample the (h, w) of its frames in tokens, in the order of the sequence.
        hidden: per tapped layer, (n, d) per sample.
        raw_last: (n, d) per sample, the last block's output before the final norm.
        queries: per tapped block, N heads.
        keys: per tapped block, M heads.
        camera: (T, d) per sample, the camera tokens' states of layer L.
        scale: (1, d) per sample, the scale token's state of layer L; no row without frames.
        geometry: what the model's own geometry heads predict, one per geometry segment; None of a model without any.
    """

    logits: Tensor
    targets: Tensor | None
    frames: tuple[tuple[Grid, ...], ...]
    hidden: Mapping[int, PerSample] = field(default_factory=dict)
    raw_last: PerSample | None = None
    queries: Mapping[int, HeadStates] = field(default_factory=dict)
    keys: Mapping[int, HeadStates] = field(default_factory=dict)
    camera: PerSample | None = None
    scale: PerSample | None = None
    geometry: tuple[GeometryPrediction, ...] | None = None


def split_frames(states: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """States (n, ...) of one sample -> (h, w, ...) of every frame."""
    parts = states.split([math.prod(grid) for grid in grids])
    return [part.unflatten(0, grid) for part, grid in zip(parts, grids, strict=True)]


def clip(states: Tensor, grids: Sequence[Grid]) -> Tensor:
    """States (n, ...) of one sample whose frames have one size -> (T, h, w, ...).

    Raises:
        ValueError: no frames, or frames of different sizes.
    """
    if len(set(grids)) != 1:
        raise ValueError(f"a clip needs frames of one size, the sample has {sorted(set(grids))}")
    return states.unflatten(0, (len(grids), *grids[0]))


@dataclass(frozen=True, eq=False)
class QueryProjection:
    """How a block makes queries out of its input: `input_norm`, then weight and bias, before any norm of the queries.

    Args:
        weight: (N * K, d), detached copy.
        bias: (N * K,) or None.
        input_norm: a copy of the block's own, to be used or trained by whoever asked.
    """

    weight: Tensor
    bias: Tensor | None
    input_norm: RMSNorm

    @classmethod
    def copied(cls, linear: nn.Linear, norm: nn.Module, eps: float) -> "QueryProjection":
        """From the parts of a block; `norm` has a weight (d,)."""
        weight = norm.get_parameter("weight")
        own = RMSNorm(weight.shape[0], eps).to(weight.device, weight.dtype)
        own.weight.data.copy_(weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(linear.weight.detach().clone(), bias, own)


class Backbone(Protocol):
    """A decoder VLM as geometric supervision sees it: an `nn.Module` whose only child is the wrapped `model`.

    A forward without probes computes what the model's own forward computes, bit for bit. Hooks live as long as one
    forward and only keep tensors, so gradient checkpointing recomputes the same graph. No attention matrix is made.
    """

    model: nn.Module

    @property
    def num_layers(self) -> int:
        """L."""
        ...

    @property
    def width(self) -> int:
        """d."""
        ...

    def __call__(self, inputs: Mapping[str, Any], taps: Taps = ...) -> Tapped:
        """Run the model on the keyword arguments of its own forward; `inputs` is not changed.

        Raises:
            ValueError: layers that do not exist, or visual tokens and grids that do not belong together.
        """
        ...

    def query_projection(self, layer: int) -> QueryProjection:
        """Of block `layer`, 1 .. L."""
        ...
