"""What every geometric supervision is made of: heads on the hidden states of a backbone, kept apart from the model.

Shapes: one entry per sample of a batch, as in `Tapped`; H W pixels of the targets' maps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from g2vlm.sequence import Grid
from g2vlm.supervision.aux_tokens import AuxTokens
from g2vlm.supervision.backbones.base import Backbone, HeadStates, PerSample, Tapped, Taps
from g2vlm.supervision.targets import TeacherTargets


@dataclass(frozen=True)
class TeacherFeatures:
    """What a teacher's features look like, which heads that are compared with them are built for.

    Args:
        blocks: 0-based numbers of the blocks that it gives.
        depth: number of its blocks.
        dim: width of each block's features.
    """

    blocks: tuple[int, ...]
    depth: int
    dim: int


@dataclass(frozen=True)
class Fit:
    """What heads are built for.

    Args:
        width: d of the backbone.
        num_layers: L of the backbone.
        features: of the teacher; None where no head is compared with them.
    """

    width: int
    num_layers: int
    features: TeacherFeatures | None = None

    @classmethod
    def of(cls, backbone: Backbone, features: TeacherFeatures | None = None) -> "Fit":
        """For a backbone."""
        return cls(backbone.width, backbone.num_layers, features)


@dataclass(frozen=True)
class ClipShape:
    """What heads must know of a clip's targets before they see them: sizes alone, so that no target enters the model.

    Args:
        size: (H, W) of the maps.
        feature_grid: (h, w) of the teacher's features; None without any.
    """

    size: tuple[int, int]
    feature_grid: Grid | None = None

    @classmethod
    def of(cls, targets: TeacherTargets) -> "ClipShape":
        """Of a clip's targets."""
        first = next(iter((targets.features or {}).values()), None)
        return cls(targets.size, None if first is None else (first.shape[1], first.shape[2]))


class Heads(nn.Module, ABC):
    """All heads of one supervision behind one call, so that sharded processes gather their weights together.

    It is called exactly once per step on every process. Weights and outputs are float32 whatever the backbone's dtype.
    """

    @abstractmethod
    def forward(self, tapped: Tapped, shapes: Sequence[ClipShape | None]) -> tuple[Any, ...]:
        """Predictions for every sample that has a shape, None for the others; a sample has one shape of frames.

        A prediction is a tensor, or tuples, named tuples, lists and dicts of them, nothing else: sharding and
        replication look for gradients there.
        """


class Supervision(nn.Module, ABC):
    """What a supervision adds to a model in training: its heads, and its probe tokens if it has any.

    A subclass is built from (config, fit) alone, `config` being a frozen dataclass of plain values: both are saved
    beside the weights, and make the same modules again.

    Args:
        config: of the heads.
        fit: what they are built for.
        heads: its heads.
        aux: its probe tokens, which belong to the model's sequence and share its dtype; None without any.
    """

    def __init__(self, config: Any, fit: Fit, heads: Heads, aux: AuxTokens | None = None):
        super().__init__()
        self.config, self.fit = config, fit
        self.heads = heads
        self.aux = aux

    @property
    @abstractmethod
    def taps(self) -> Taps:
        """What the heads read, probe tokens left out."""

    def initialise(self, backbone: Backbone) -> None:
        """Take a start from the backbone's weights; by default nothing is taken."""


class SupervisedOutput(NamedTuple):
    """What a supervised forward gives.

    Args:
        logits, targets: as `Tapped`: of every place, probe tokens included.
        geometry: the model's own, if it predicts any.
        predictions: by name of the supervision, one entry per sample.
    """

    logits: Tensor | None
    targets: Tensor | None
    geometry: Any
    predictions: dict[str, tuple[Any, ...]]


class SupervisedModel(nn.Module):
    """A model and what supervises it, in one forward: what an engine wraps. `backbone.model` stays the plain model."""

    def __init__(self, backbone: Backbone, supervisions: Mapping[str, Supervision]):
        super().__init__()
        self.backbone = backbone
        self.supervisions = nn.ModuleDict(dict(supervisions))

    def forward(self, *, shapes: Sequence[ClipShape | None], **inputs: Any) -> SupervisedOutput:
        """The model's forward with every supervision's taps, and the heads' predictions.

        Where no sample has a shape, the heads run on the first frame of the batch, so that their weights have a
        gradient on every process; the batch must hold at least one frame.

        Args:
            shapes: of each sample's targets, None for a sample without.
            inputs: keyword arguments of the model's own forward.
        """
        own: dict[str, Supervision] = dict(self.supervisions.items())  # pyright: ignore[reportAssignmentType]
        taps = Taps()
        for supervision in own.values():
            taps |= supervision.taps
            if supervision.aux is not None:
                taps |= Taps(probes=supervision.aux())
        tapped = self.backbone(inputs, taps)
        seen, known = (tapped, shapes) if any(shapes) else filler(tapped)
        predictions = {name: supervision.heads(seen, known) for name, supervision in own.items()}
        return SupervisedOutput(tapped.logits, tapped.targets, tapped.geometry, predictions)


FILLER_SIZE = (28, 28)


def filler(tapped: Tapped) -> tuple[Tapped, list[ClipShape | None]]:
    """The first frame of the first sample with frames, whose others may be of other sizes, and a small shape for it."""
    first = next(i for i, grids in enumerate(tapped.frames) if grids)
    grid = tapped.frames[first][0]
    tokens = math.prod(grid)

    def cut(states: PerSample, count: int = tokens) -> PerSample:
        return *states[:first], states[first][:count], *states[first + 1 :]

    seen = replace(
        tapped,
        frames=(*tapped.frames[:first], (grid,), *tapped.frames[first + 1 :]),
        hidden={layer: cut(states) for layer, states in tapped.hidden.items()},
        raw_last=tapped.raw_last and cut(tapped.raw_last),
        queries={block: HeadStates(*map(cut, states)) for block, states in tapped.queries.items()},
        keys={block: HeadStates(*map(cut, states)) for block, states in tapped.keys.items()},
        camera=tapped.camera and cut(tapped.camera, 1),
    )
    shape = ClipShape(FILLER_SIZE, (1, 1))
    return seen, [shape if i == first else None for i in range(len(tapped.frames))]
