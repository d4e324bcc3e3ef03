"""What is known exactly about a scene and its views, wherever it comes from: all that a question can ask about.

World frame: metres, right-handed, z up. Cameras: OpenCV axes, pixel (0, 0) has its centre at coordinate (0, 0).
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.qa.boxes import Array, Box, box_distances
from g2vlm.data.qa.rules import Rules


@dataclass(frozen=True, eq=False)
class SceneObject:
    """A thing in the room."""

    instance: int
    category: str
    box: Box


@dataclass(frozen=True)
class Sighting:
    """An object in a view.

    Args:
        instance: of the object.
        box: first and last column and row that it touches: x_min, y_min, x_max, y_max, inclusive pixels.
        share: of the image's pixels that show it; of those in the box where nothing else is known.
    """

    instance: int
    box: tuple[int, int, int, int]
    share: float


@dataclass(frozen=True, eq=False)
class Frame:
    """A view with its camera.

    Args:
        time: when it was taken, seconds; its number where views have no time.
        cam_to_world: (4, 4).
        intrinsics: (3, 3) in pixels.
        size: (H, W).
        sightings: the objects that it shows, each once.
        depth: (H, W) z-depth in metres, positive everywhere; None where unknown.
    """

    time: float
    cam_to_world: Array
    intrinsics: Array
    size: tuple[int, int]
    sightings: tuple[Sighting, ...]
    depth: NDArray[np.floating] | None = None

    @property
    def centre(self) -> Array:
        """(3,) of the camera in the world."""
        return self.cam_to_world[:3, 3]

    def to_camera(self, points: Array) -> Array:
        """Points (N, 3) of the world in the camera's frame: R' (x - t)."""
        return (points - self.centre) @ self.cam_to_world[:3, :3]

    def uncut(self, sighting: Sighting) -> bool:
        """Whether an object keeps clear of the image's border."""
        x_min, y_min, x_max, y_max = sighting.box
        return x_min > 0 and y_min > 0 and x_max < self.size[1] - 1 and y_max < self.size[0] - 1


@dataclass(frozen=True, eq=False)
class SceneFacts:
    """A scene and views of it.

    Args:
        name: of the scene.
        objects: in any order; nothing depends on it.
        frames: in the order in which they are shown.
        room_area: of the floor, square metres.
        unclear: categories that are not named because something of another category could be meant.
    """

    name: str
    objects: tuple[SceneObject, ...]
    frames: tuple[Frame, ...]
    room_area: float
    unclear: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Bring everything into canonical order: objects by category and instance, sightings by instance."""
        things = sorted(self.objects, key=lambda thing: (thing.category, thing.instance))
        object.__setattr__(self, "objects", tuple(things))
        object.__setattr__(self, "frames", tuple(map(_ordered, self.frames)))

    @cached_property
    def by_instance(self) -> dict[int, SceneObject]:
        """Objects by their instance."""
        return {thing.instance: thing for thing in self.objects}

    @cached_property
    def by_category(self) -> dict[str, list[SceneObject]]:
        """Objects of each category, in alphabetical order."""
        groups: dict[str, list[SceneObject]] = {}
        for thing in self.objects:
            groups.setdefault(thing.category, []).append(thing)
        return groups

    @cached_property
    def best_share(self) -> dict[int, float]:
        """The largest share of a view that each object covers; objects that no view shows are absent."""
        best: dict[int, float] = {}
        for frame in self.frames:
            for sighting in frame.sightings:
                best[sighting.instance] = max(best.get(sighting.instance, 0.0), sighting.share)
        return best

    def is_seen(self, thing: SceneObject, rules: Rules) -> bool:
        """Whether some view shows enough of an object; without a least share, every object counts."""
        return self.best_share.get(thing.instance, 0.0) >= rules.min_share

    def seen_categories(self, rules: Rules) -> list[str]:
        """Categories that can be named and whose instances are all seen."""
        named = [category for category in self.by_category if category not in self.unclear]
        return [c for c in named if all(self.is_seen(thing, rules) for thing in self.by_category[c])]

    def unique(self, rules: Rules) -> list[SceneObject]:
        """Objects that their category names unambiguously, and that are seen."""
        return [self.by_category[c][0] for c in self.seen_categories(rules) if len(self.by_category[c]) == 1]

    def named_in_frame(self, frame: Frame, rules: Rules) -> list[SceneObject]:
        """Objects that their category names unambiguously in one frame, and that are seen well there."""
        shown = [self.by_instance[s.instance] for s in frame.sightings if s.instance in self.by_instance]
        counts = Counter(thing.category for thing in shown)
        enough = {s.instance for s in frame.sightings if s.share >= rules.min_share}
        single = [thing for thing in shown if counts[thing.category] == 1 and thing.category not in self.unclear]
        return sorted((thing for thing in single if thing.instance in enough), key=lambda thing: thing.category)

    @cached_property
    def category_distance(self) -> dict[tuple[str, str], float]:
        """Smallest distance between objects of two different categories, for both orders of them."""
        pairs = [(a, b) for a, b in combinations(self.objects, 2) if a.category != b.category]
        found = box_distances([a.box for a, _ in pairs], [b.box for _, b in pairs])
        distances: dict[tuple[str, str], float] = {}
        for (a, b), distance in zip(pairs, found.tolist(), strict=True):
            least = min(distance, distances.get((a.category, b.category), distance))
            distances[a.category, b.category] = distances[b.category, a.category] = least
        return distances


def _ordered(frame: Frame) -> Frame:
    return replace(frame, sightings=tuple(sorted(frame.sightings, key=lambda sighting: sighting.instance)))
