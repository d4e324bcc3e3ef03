"""The items of an evaluation: one scene each, with the views that the protocol names, loaded when its turn comes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from eval.protocols import Protocol, ViewRule
from g2vlm.data.frames import FrameSource
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.images import geometry_size


@dataclass(frozen=True)
class Item:
    """A scene to evaluate on: its name, and how to load its sample (which may raise InputError)."""

    name: str
    load: Callable[[], SceneSample]


def frame_items(source: FrameSource, protocol: Protocol) -> list[Item]:
    """Every scene of a source with the views that the protocol's rule names, stretched to its width."""

    def load(scene: int) -> SceneSample:
        indices = choose_views(frame_numbers(source.frame_names(scene)), protocol.views)
        if not indices:
            raise InputError(f"no view in scene  {source.facts(scene).name}", "it has no frames", "leave it out")
        height, width = source.read_frame(scene, indices[0]).image.shape[:2]
        size = geometry_size((height, width), protocol.width or width)
        return source.load_views(scene, indices, size, fit="stretch")

    return [Item(source.facts(scene).name, lambda scene=scene: load(scene)) for scene in range(len(source))]


def frame_numbers(names: Sequence[str]) -> list[int]:
    """The last number in each name (`frame-000040` -> 40), or positions when they do not all ascend."""
    found = [re.findall(r"\d+", name) for name in names]
    numbers = [int(digits[-1]) for digits in found if digits]
    ascend = len(numbers) == len(names) and all(a < b for a, b in pairwise(numbers))
    return numbers if ascend else list(range(len(names)))


def choose_views(numbers: Sequence[int], rule: ViewRule) -> list[int]:
    """Positions in `numbers` (ascending) of the views that a rule uses, in order."""
    first = numbers[0] if numbers else 0
    chosen = [i for i, number in enumerate(numbers) if (number - first) % (rule.stride or 1) == 0]
    if rule.count is None or rule.count >= len(chosen):
        return chosen
    return [chosen[i] for i in torch.linspace(0, len(chosen) - 1, rule.count).round().int().tolist()]


def first_views(items: Sequence[Item], count: int | None) -> list[Item]:
    """The items with only their first `count` views (None: all)."""

    def load(item: Item) -> SceneSample:
        sample = item.load()
        return sample if count is None else sample.views(torch.arange(min(count, sample.num_views)))

    return [Item(item.name, lambda item=item: load(item)) for item in items]


def require_folder(dataset: str, path: Path | None) -> Path:
    """The dataset's folder.

    Raises:
        InputError: none was given, or there is none.
    """
    if path is None:
        raise InputError(f"the dataset {dataset} needs a folder", "--data is absent", "pass --data FOLDER")
    if not path.is_dir():
        raise InputError(f"no folder  {path}", "--data must name an existing folder", "check the path")
    return path
