"""From what supervision heads predict of a clip to a scene that can be looked at: the contract, and who fulfils it.

Shapes: S views, H' W' pixels of the predicted maps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from g2vlm.sequence import Grid
from g2vlm.supervision.base import ClipShape, Supervision

LIFTINGS = {
    "geovr": "g2vlm.supervision.geovr:GeoVRLifting",
    "spatialsv": "g2vlm.supervision.spatialsv:SpatialSVLifting",
}
"""Kind of heads -> what makes scenes of their predictions. Kinds that predict no scene are not here."""


@dataclass(frozen=True, eq=False)
class LiftedScene:
    """A scene as heads see it. OpenCV axes.

    Args:
        depth: (S, H', W').
        cam_to_world: (S, 4, 4).
        intrinsics: (S, 3, 3) in pixels of the maps.
        points: (S, H', W', 3) in the world where they were predicted themselves; None: the depth seen from the cameras.
        confidence: (S, H', W'), larger is surer; None without any.
        metres_per_unit: () where the heads say how long a unit is; None: lengths mean nothing but their ratios.
    """

    depth: Tensor
    cam_to_world: Tensor
    intrinsics: Tensor
    points: Tensor | None = None
    confidence: Tensor | None = None
    metres_per_unit: Tensor | None = None


class Lifting(ABC):
    """How one kind of heads becomes a scene.

    Args:
        supervision: of that kind.
    """

    def __init__(self, supervision: Supervision):
        self.supervision = supervision

    sources: ClassVar[dict[str, str]]
    """What a scene can be made from -> how, in words for people; the first that the heads have is the default."""

    @abstractmethod
    def missing(self, source: str) -> tuple[str, ...]:
        """What the heads lack for a scene from `source`, by name."""

    @abstractmethod
    def scene(self, prediction: Any, source: str) -> LiftedScene:
        """The scene of a prediction of the heads."""

    def shape(self, grid: Grid, size: tuple[int, int]) -> ClipShape:
        """What the heads are told of a clip of `grid` tokens whose images have `size` = (H, W)."""
        return ClipShape(size, grid)
