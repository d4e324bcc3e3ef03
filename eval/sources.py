"""The items of an evaluation: one scene each, with the views that the protocol names, loaded when its turn comes."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from eval.protocols import Protocol, ViewRule
from g2vlm.data.frames import FrameSource
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.images import geometry_size
from geometry import resize_intrinsics

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A scene to evaluate on: its name, and how to load its sample (which may raise InputError)."""

    name: str
    load: Callable[[], SceneSample]


def frame_items(source: FrameSource, protocol: Protocol) -> list[Item]:
    """Every scene of a source with the views that the protocol's rule names, stretched to its width."""

    def load(scene: int) -> SceneSample:
        indices = choose_views(frame_numbers(source.frame_names(scene)), protocol.views)
        sample, stored = stretched(source, scene, indices, protocol.width)
        return sample if protocol.intrinsics == "exact" else with_one_factor(sample, stored)

    return [Item(name, lambda scene=scene: load(scene)) for scene, name in enumerate(scene_names(source))]


def stretched(
    source: FrameSource, scene: int, indices: Sequence[int], width: int | None
) -> tuple[SceneSample, tuple[int, int]]:
    """Frames of a scene stretched to a width (None: their own), and the size (H, W) that the first is stored in.

    Raises:
        InputError: no frames, or one that cannot be read.
    """
    if not indices:
        raise InputError(f"no view in scene  {source.facts(scene).name}", "it has no frames", "leave it out")
    height, stored_width = source.read_frame(scene, indices[0]).image.shape[:2]
    size = geometry_size((height, stored_width), width or stored_width)
    return source.load_views(scene, indices, size, fit="stretch"), (height, stored_width)


def scene_names(source: FrameSource) -> list[str]:
    """Of all scenes, each another; positions where metadata cannot be read, which loading will report."""

    def name(scene: int) -> str:
        try:
            return source.facts(scene).name
        except InputError:
            return f"scene-{scene}"

    return distinct([name(scene) for scene in range(len(source))])


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with `-2`, `-3`, ... behind those that came before, so that each names one row and one file."""
    seen: Counter[str] = Counter()
    chosen = []
    for name in names:
        seen[name] += 1
        chosen.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return chosen


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread, the first and the last among them; none for a count below one."""
    if count < 1:
        return []
    last, shown = len(items) - 1, min(count, len(items))
    return [items[place] for place in torch.linspace(0, last, shown, dtype=torch.float64).round().int().tolist()]


def file_name(item: str, suffix: str) -> str:
    """The name of an item's file."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', item)}{suffix}"


def with_one_factor(sample: SceneSample, stored: tuple[int, int]) -> SceneSample:
    """Intrinsics scaled as in the published evaluators: both axes by the larger factor, max(W / w, H / h).

    Where the aspect changes, the true points are wrong in one axis and off centre, as those of published tables.

    Args:
        sample: frames of `stored` (h, w) pixels stretched to (H, W), its intrinsics with each axis by its own factor.
    """
    if sample.intrinsics is None:
        return sample
    factor = max(new / old for new, old in zip(sample.size, stored, strict=True))
    one_factor = (stored[0] * factor, stored[1] * factor)
    intrinsics = resize_intrinsics(sample.intrinsics.double(), sample.size, one_factor)
    return replace(sample, intrinsics=intrinsics.to(sample.intrinsics.dtype))


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
