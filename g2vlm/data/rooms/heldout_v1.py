"""`rooms-heldout-v1`: the fixed rooms that models are compared on. Changing anything here needs an ADR and a new name.

64 rooms of the law `tiny` that no training seed builds, four wide-baseline views of 84 x 84 each. The median rotation
between two views of a room is at least 30 degrees, at most a fifth of the pairs differ by less than 15 degrees, and at
least a quarter of every view is seen by another view of its room.
"""

import hashlib
import json
import math
from dataclasses import asdict

import torch
from torch import Tensor

from g2vlm.data.rooms.cameras import Cameras
from g2vlm.data.rooms.source import RoomsSource
from g2vlm.data.types import SceneSample, ViewRequest

NAME = "rooms-heldout-v1"
LAW = "tiny"
CAMERAS = "wide"
NUM_VIEWS = 4
SIZE = (84, 84)
REQUEST_SEEDS: tuple[int, ...] = (
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    1,
)
"""Seed of each room's excerpt: the first of 0, 1, ... that has the properties above."""
DIGEST = "fc88f2f0927e044643a079b42bd74a8d4dcc978e356003a5363d05a625631269"
"""SHA-256 of what `digest` reads; equal on every machine."""


def source(device: torch.device | str = "cpu") -> RoomsSource:
    """The source that the samples come from."""
    return RoomsSource(law=LAW, split="heldout", cameras=CAMERAS, device=device)


def requests(size: tuple[int, int] = SIZE) -> list[ViewRequest]:
    """The request of every room; another size shows the same views at another resolution."""
    return [ViewRequest(NUM_VIEWS, size, seed) for seed in REQUEST_SEEDS]


def heldout(size: tuple[int, int] = SIZE, device: torch.device | str = "cpu") -> list[SceneSample]:
    """The samples, in their fixed order."""
    rooms = source(device)
    return [rooms.load(scene, request) for scene, request in enumerate(requests(size))]


def digest() -> str:
    """SHA-256 of the rooms' states, their cameras and coarse depths, all rounded so that no platform shows."""
    rooms, total = source(), hashlib.sha256()
    for scene, request in enumerate(requests()):
        sample = rooms.load(scene, request)
        assert sample.depth is not None
        content = [asdict(rooms.scene(scene)), _camera_numbers(rooms.excerpt(scene, request)), _coarse(sample.depth)]
        total.update(json.dumps(rounded(content), sort_keys=True).encode())
    return total.hexdigest()


def _camera_numbers(cameras: Cameras) -> list[object]:
    return [cameras.cam_to_world.tolist(), cameras.field_of_view]


def _coarse(depth: Tensor) -> list[float]:
    """Mean depths of the quarters of each view, to the centimetre."""
    half = depth.shape[-1] // 2
    quarters = depth.double().unfold(1, half, half).unfold(2, half, half).mean((-2, -1))
    return [round(value, 2) for value in quarters.flatten().tolist()]


def rounded(content: object) -> object:
    """Nested content with every number rounded to 1e-6, and no minus zero."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [rounded(value) for value in content]
    if isinstance(content, float):
        assert math.isfinite(content)
        return round(content, 6) + 0.0
    return content
