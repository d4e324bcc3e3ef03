"""SpatialSV's heads: depth, ray and point maps, and a teacher's features, from the visual tokens of a decoder.

Shapes: S views of a clip, h w their tokens, d width of the decoder, H W pixels of the targets' maps, H' W' of the
predicted ones, C channels of a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from g2vlm.sequence import Grid
from g2vlm.supervision.backbones.base import Tapped, Taps, clip
from g2vlm.supervision.base import ClipShape, Fit, Heads, Supervision
from g2vlm.supervision.dense_head import NUM_LEVELS, DPTWidths
from g2vlm.supervision.heads import LiftHeads, LiftProjectors, SharedLiftProjector, TokenMLP

Task = Literal["depth", "ray", "point"]

PUBLISHED_LAYERS = {28: (3, 10, 17, 24), 32: (4, 11, 18, 25), 36: (4, 12, 20, 28)}
"""Number of blocks -> the paper's layers: of Qwen2.5-VL-7B, LLaVA-NeXT-Video-7B, Qwen2.5-VL-3B (its Table 6)."""


@dataclass(frozen=True)
class SpatialSVHeads:
    """What SpatialSV attaches to a decoder.

    Args:
        layers: four hidden states, shallow to deep, 0 being the embeddings and L the last block after the final norm;
            one may come several times. null: as published for 28, 32 and 36 blocks, in proportion for others.
        num_projectors: 4: a projector for each of the layers; 1: one for all of them.
        output_dim: width of the projected features, which all tasks share.
        tasks: maps to predict, each with a confidence.
        widths: channels of each task's DPT.
        out_stride: the predicted maps have every n-th pixel of the targets'.
        distill: also project the last layer into the teacher's feature space.
    """

    layers: tuple[int, int, int, int] | None = None
    num_projectors: Literal[1, 4] = 4
    output_dim: int = 1024
    tasks: tuple[Task, ...] = ("depth", "ray", "point")
    widths: DPTWidths = field(default_factory=DPTWidths)
    out_stride: int = 2
    distill: bool = True

    def __post_init__(self) -> None:
        if not self.tasks and not self.distill:
            raise ValueError("spatialsv has neither tasks nor distill; nothing is left to supervise")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"spatialsv.tasks names a task twice: {', '.join(self.tasks)}")
        for name in ("output_dim", "out_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"spatialsv.{name} is {getattr(self, name)}; it must be positive")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The four layers in a decoder of `num_layers` blocks."""
        if self.layers is not None:
            return self.layers
        if num_layers in PUBLISHED_LAYERS:
            return PUBLISHED_LAYERS[num_layers]
        return tuple(max(1, round(layer / 28 * num_layers)) for layer in PUBLISHED_LAYERS[28])

    def map_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H', W') of the maps that are predicted for targets of `size` = (H, W)."""
        return -(-size[0] // self.out_stride), -(-size[1] // self.out_stride)


class MapPrediction(NamedTuple):
    """What a task predicts of a clip.

    Args:
        values: (S, H', W', C) float32: depth; ray origin and direction in the world; points in the world. The world is
            the first camera.
        confidence: (S, H', W') float32, above 1.
    """

    values: Tensor
    confidence: Tensor


class SpatialSVPrediction(NamedTuple):
    """What is predicted of a clip.

    Args:
        maps: by task.
        features: (S, h, w, width of the teacher) float32; None without distillation.
    """

    maps: dict[str, MapPrediction]
    features: Tensor | None


class SpatialSVModules(Heads):
    """The projectors and DPTs of all tasks, and the projector into the teacher's feature space.

    Raises:
        ValueError: layers that the decoder does not have, or distillation from a teacher without features.
    """

    def __init__(self, config: SpatialSVHeads, fit: Fit):
        super().__init__()
        self.config, self.last = config, fit.num_layers
        self.layers = config.layers_of(fit.num_layers)
        Taps(hidden=self.layers).check(fit.num_layers)
        self.lift: LiftHeads | None = None
        if config.tasks:
            projectors = (
                LiftProjectors(fit.width, config.output_dim, NUM_LEVELS)
                if config.num_projectors > 1
                else SharedLiftProjector(fit.width, config.output_dim)
            )
            self.lift = LiftHeads(projectors, config.tasks, config.widths)
        self.distill: TokenMLP | None = None
        if config.distill:
            if fit.features is None:
                raise ValueError("spatialsv.distill needs a teacher that gives features; set it to false without one")
            dim = fit.features.dim
            self.distill = TokenMLP([fit.width, dim, dim])

    @property
    def taps(self) -> Taps:
        """What is read."""
        layers = (*(self.layers if self.lift else ()), *((self.last,) if self.distill else ()))
        return Taps(hidden=tuple(sorted(set(layers))))

    def forward(self, tapped: Tapped, shapes: Sequence[ClipShape | None]) -> tuple[SpatialSVPrediction | None, ...]:
        """As in `Heads`; clips of equal grids and sizes go through the layers together.

        Raises:
            ValueError: a clip whose frames differ in size.
        """
        alike: dict[tuple[Grid, tuple[int, int]], list[int]] = {}
        for i, (grids, shape) in enumerate(zip(tapped.frames, shapes, strict=True)):
            if shape is not None:
                alike.setdefault((grids[0], self.config.map_size(shape.size)), []).append(i)
        found: dict[int, SpatialSVPrediction] = {}
        for (_, size), members in alike.items():
            found |= dict(zip(members, self._predict(tapped, members, size), strict=True))
        return tuple(found.get(i) for i in range(len(shapes)))

    def _predict(self, tapped: Tapped, members: Sequence[int], size: tuple[int, int]) -> list[SpatialSVPrediction]:
        """Of clips with one grid, for maps of one size."""
        states = {layer: self._joined(tapped, members, layer) for layer in self.taps.hidden}  # (F, h, w, d)
        counts = [len(tapped.frames[i]) for i in members]  # F is their sum
        maps: dict[str, list[MapPrediction]] = {}
        if self.lift is not None:
            dense = self.lift([states[layer] for layer in self.layers], size)
            for task, prediction in dense.items():
                assert prediction.confidence is not None
                parts = zip(prediction.values.split(counts), prediction.confidence.split(counts), strict=True)
                maps[task] = [MapPrediction(*own) for own in parts]
        features = [None] * len(members) if self.distill is None else self.distill(states[self.last]).split(counts)
        return [
            SpatialSVPrediction({task: parts[i] for task, parts in maps.items()}, own) for i, own in enumerate(features)
        ]

    @staticmethod
    def _joined(tapped: Tapped, members: Sequence[int], layer: int) -> Tensor:
        """States of all frames of some clips, (F, h, w, d)."""
        return torch.cat([clip(tapped.hidden[layer][i], tapped.frames[i]) for i in members])


class SpatialSV(Supervision):
    """SpatialSV on a decoder: no probe tokens, nothing but its visual tokens is read.

    Args:
        config: of the heads.
        fit: the decoder, and the teacher whose features are distilled.
    """

    heads: SpatialSVModules

    def __init__(self, config: SpatialSVHeads, fit: Fit):
        super().__init__(config, fit, SpatialSVModules(config, fit))

    @property
    def taps(self) -> Taps:
        """The four layers, and the last one with distillation."""
        return self.heads.taps
