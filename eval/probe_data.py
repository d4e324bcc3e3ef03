"""What the depth probe is trained and scored on: rooms, and what a frozen model's layers make of them, computed once.

Shapes: F frames of all rooms, h x w tokens of a frame, d width, H W pixels of the depth maps.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.benchmarks import Benchmark
from eval.evaluate import PROGRESS_SECONDS
from eval.sources import Item
from eval.student import Student
from g2vlm.data.qa.source import RoomsQA
from g2vlm.data.rooms import heldout_v1
from g2vlm.data.rooms.source import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError
from g2vlm.supervision.backbones import Taps

log = logging.getLogger(__name__)
STRIDE = 2
"""Depth maps have every second pixel of the views, as SpatialSV's heads."""
TRAINING_SEED = 5
"""Of the excerpts of training rooms."""


@dataclass(frozen=True)
class Rooms:
    """Rooms of one law: some to train on, others to score on.

    Args:
        name: as printed above the numbers.
        about: one line for people.
        training, heldout: the rooms.
        num_views: of a room.
    """

    name: str
    about: str
    training: Sequence[Item]
    heldout: Sequence[Item]
    num_views: int


def plain_rooms(size: int, training: int, limit: int | None) -> Rooms:
    """`rooms-heldout-v1`, or its first `limit` rooms, and training rooms of the same laws."""
    source, held_out = RoomsSource(heldout_v1.LAW, cameras=heldout_v1.CAMERAS), heldout_v1.source()
    items = [
        Item(f"heldout-{scene:02d}", lambda scene=scene, request=request: held_out.load(scene, request))
        for scene, request in enumerate(heldout_v1.requests((size, size)))
    ][:limit]
    about = f"depth from {heldout_v1.NUM_VIEWS} views of {len(items)} rooms of {heldout_v1.NAME}"
    return Rooms(
        "rooms-probe", about, _training(source, training, heldout_v1.NUM_VIEWS, size), items, heldout_v1.NUM_VIEWS
    )


def asked_rooms(benchmark: Benchmark, size: int, training: int, limit: int | None) -> Rooms:
    """The rooms of a benchmark's first `limit` questions, and training rooms of the laws that questions are about."""
    items = [Item(scene, lambda scene=scene: benchmark.load(scene, (size, size))) for scene in benchmark.scenes(limit)]
    about = f"depth from {benchmark.num_views} views of {len(items)} rooms of {benchmark.name}"
    rooms = _training(RoomsQA().rooms, training, benchmark.num_views, size)
    return Rooms(f"rooms-probe-{benchmark.name}", about, rooms, items, benchmark.num_views)


def _training(source: RoomsSource, count: int, num_views: int, size: int) -> list[Item]:
    request = ViewRequest(num_views, (size, size), TRAINING_SEED)
    return [Item(f"train-{scene:04d}", lambda scene=scene: source.load(scene, request)) for scene in range(count)]


@dataclass(frozen=True, eq=False)
class Features:
    """Frames as a frozen model sees them, and their depth.

    Args:
        names: of the rooms.
        room: (F,) number of each frame's room in `names`.
        layers: of four layers, (F, h, w, d) float32.
        depth: (F, H, W) float32 metres.
        valid: (F, H, W) bool.
    """

    names: tuple[str, ...]
    room: Tensor
    layers: tuple[Tensor, ...]
    depth: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return len(self.depth)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.depth.shape[1], self.depth.shape[2]


@dataclass(frozen=True, eq=False)
class Room:
    """What is kept of a room: S views of H0 x W0 pixels, and their depth at every STRIDE-th pixel.

    Args:
        name: of the room.
        images: (S, 3, H0, W0) uint8.
        depth: (S, H, W) float32 metres.
        valid: (S, H, W) bool.
    """

    name: str
    images: Tensor
    depth: Tensor
    valid: Tensor

    @classmethod
    def load(cls, item: Item) -> "Room":
        """An item.

        Raises:
            InputError: it has no depth.
        """
        sample = item.load()
        if sample.depth is None:
            raise InputError(f"no depth in {item.name}", "a probe is trained and scored on it", "leave the scene out")
        valid = sample.depth > 0 if sample.valid is None else sample.valid
        every = (slice(None), slice(None, None, STRIDE), slice(None, None, STRIDE))
        return cls(item.name, sample.images.cpu(), sample.depth[every].cpu().clone(), valid[every].cpu().clone())


def collect(student: Student, rooms: Sequence[Room], layers: Sequence[int]) -> Features:
    """Run a student over rooms whose frames have one size.

    Args:
        student: the model.
        rooms: the rooms.
        layers: four, numbered as in `Taps`.
    """
    parts: list[list[Tensor]] = [[] for _ in layers]
    told = time.monotonic()
    for number, room in enumerate(rooms):
        seen = student.see(room.images, Taps(hidden=tuple(sorted(set(layers)))))
        for part, layer in zip(parts, layers, strict=True):
            part.append(seen.hidden[layer])
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("%s: %d of %d rooms seen", student.name, number + 1, len(rooms))
    return Features(
        tuple(room.name for room in rooms),
        torch.cat([torch.full((len(room.depth),), number) for number, room in enumerate(rooms)]),
        tuple(map(torch.cat, parts)),
        torch.cat([room.depth for room in rooms]),
        torch.cat([room.valid for room in rooms]),
    )
