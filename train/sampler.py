"""Which scenes, views and sizes a training step takes: a function of (seed, step), so that its only state is the step.

Every number comes from a generator seeded by a counter. Loader workers and ranks therefore agree without talking, and
another world size only cuts the same step into other shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from g2vlm.data.types import SceneSource, ViewRequest
from g2vlm.errors import InputError

_SHAPE, _SCENE, _SWITCH = range(3)  # streams of one step
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class Pick:
    """One scene of a step: an index into the sources, a scene of that source, and the excerpt wanted."""

    source: int
    scene: int
    request: ViewRequest


@dataclass(frozen=True)
class BatchShape:
    """What all scenes of a step share, on every rank.

    Args:
        num_scenes: over all ranks.
        num_views: S.
        size: (H, W).
    """

    num_scenes: int
    num_views: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Sampler:
    """Draws steps.

    Args:
        sources: where scenes come from; a scene is drawn from source i with probability weights[i] / sum(weights), and
            uniformly within it, with replacement.
        seed: of the whole run.
        views: (fewest, most) views of a scene, drawn uniformly for each step.
        width: W in pixels.
        aspect: (lowest, highest) H / W, drawn uniformly for each step.
        images_per_step: views in a step over all ranks; a step has as many whole scenes as fit.
        scenes_multiple_of: the number of scenes of a step is a multiple of this; the world size must divide it.
        side_multiple_of: H and W are rounded down to multiples of this.
        weights: one per source; equal by default.
    """

    sources: Sequence[SceneSource]
    seed: int = 0
    views: tuple[int, int] = (2, 4)
    width: int = 84
    aspect: tuple[float, float] = (1.0, 1.0)
    images_per_step: int = 12
    scenes_multiple_of: int = 1
    side_multiple_of: int = 14
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        low, high = self.views
        if not 1 <= low <= high:
            raise InputError(f"data.views is [{low}, {high}]", "it must be [fewest, most] with 1 <= fewest <= most")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise InputError(f"data.aspect is {list(self.aspect)}", "it must be [lowest, highest], both positive")
        if min(self.size(self.aspect[0])) < self.side_multiple_of:
            raise InputError(
                f"data.width {self.width} with data.aspect {list(self.aspect)} gives views without a patch",
                f"sides are multiples of {self.side_multiple_of}",
                "raise data.width",
            )

    def size(self, aspect: float) -> tuple[int, int]:
        """(H, W) of an aspect ratio H / W."""
        unit = self.side_multiple_of
        return int(self.width * aspect + 1e-6) // unit * unit, self.width // unit * unit

    def shape(self, step: int) -> BatchShape:
        """View count, size and number of scenes of a step."""
        random = self._generator(step, _SHAPE)
        num_views = int(random.integers(self.views[0], self.views[1] + 1))
        aspect = round(float(random.uniform(*self.aspect)), 2)
        unit = self.scenes_multiple_of
        num_scenes = max(self.images_per_step // num_views // unit, 1) * unit
        return BatchShape(num_scenes, num_views, self.size(aspect))

    def picks(self, step: int, rank: int = 0, world: int = 1) -> list[Pick]:
        """One rank's scenes of a step; the ranks' lists, joined in order, are the list of a single process.

        Raises:
            InputError: the world size does not divide `scenes_multiple_of`, or no scene has enough views.
        """
        if self.scenes_multiple_of % world:
            raise InputError(
                f"data.scenes_multiple_of is {self.scenes_multiple_of}, with {world} processes",
                "every process takes the same number of scenes",
                f"set data.scenes_multiple_of to {world} or a multiple of it",
            )
        shape = self.shape(step)
        share = shape.num_scenes // world
        return [self.pick(step, item) for item in range(rank * share, (rank + 1) * share)]

    def pick(self, step: int, item: int, attempt: int = 0) -> Pick:
        """The scene at one place of a step; another attempt gives its substitute, should it prove unreadable.

        Raises:
            InputError: no scene has enough views.
        """
        shape, random = self.shape(step), self._generator(step, _SCENE, item, attempt)
        weights = np.ones(len(self.sources)) if self.weights is None else np.asarray(self.weights, float)
        for _ in range(_MAX_DRAWS):
            source = int(np.searchsorted(np.cumsum(weights / weights.sum()), random.random(), side="right"))
            source = min(source, len(self.sources) - 1)
            scene = int(random.integers(len(self.sources[source])))
            if _has_views(self.sources[source], scene, shape.num_views):
                return Pick(source, scene, ViewRequest(shape.num_views, shape.size, int(random.integers(2**31))))
        raise InputError(
            f"no scene with {shape.num_views} views",
            f"{_MAX_DRAWS} scenes were drawn from {', '.join(source.name for source in self.sources)}",
            "lower the second number of data.views",
        )

    def coin(self, step: int) -> bool:
        """One fair throw per step, equal on all ranks."""
        return bool(self._generator(step, _SWITCH).random() < 0.5)

    def _generator(self, step: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, *stream])


def _has_views(source: SceneSource, scene: int, wanted: int) -> bool:
    """Whether a scene has so many views; of one that cannot be read, loading it will tell."""
    try:
        return source.num_views(scene) >= wanted
    except InputError:
        return True
