"""Which questions a training step packs: an endless ordered stream of items, cut into packs by their number of tokens.

Item i is a function of (seed, i), a pack takes items in order until the next would overflow it, and packs are dealt to
processes in turn. So the order of the items is the same for any number of processes, and the stream's only state is the
number of the item that the next pack begins with. Every process plans all packs of a step from the items' shapes;
loader workers decide nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from g2vlm.data.chat.batch import Filling
from g2vlm.data.chat.types import ChatShape, ChatSource, Size
from g2vlm.errors import InputError
from train.loader import BadSample

_ITEM, _SWITCH = 10, 11  # streams of one seed
_MAX_BAD_IN_A_ROW = 1000


@dataclass(frozen=True)
class ChatMixture:
    """Sources of questions; an item is of source i with probability weights[i] / sum(weights).

    Raises:
        InputError: no source, or weights that are no shares.
    """

    sources: Sequence[ChatSource]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.sources or min(self.weights) < 0 or not sum(self.weights) > 0:
            raise InputError(
                "no questions to learn from",
                f"{len(self.sources)} sources with weights {list(self.weights)}",
                "name sources in data.chat.sources, with weights of 0 or more",
            )


@dataclass(frozen=True)
class Item:
    """One place of the stream: its number, the source, the sample of that source, and the seed of its randomness."""

    number: int
    source: int
    index: int
    seed: int


@dataclass(frozen=True)
class Pack:
    """Consecutive items that fit.

    Args:
        items: at least one.
        num_tokens: of all items, at most.
        num_scenes, num_views, num_images: of all items.
        end: number of the item that the next pack begins with.
        bad: items that were passed over on the way.
    """

    items: tuple[Item, ...]
    num_tokens: int
    num_scenes: int
    num_views: int
    num_images: int
    end: int
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """One process's share of a step.

    Args:
        step: counted from 0.
        items: of its pack.
        filling: what its batch must hold at least, so that all processes run the same modules.
        facts: what the log says about the step, over all processes.
        end: number of the item that the next step begins with.
        bad: items that were passed over; told by the first process alone.
    """

    step: int
    items: tuple[Item, ...]
    filling: Filling
    facts: dict[str, int]
    end: int
    bad: tuple[BadSample, ...]


class Layout(Protocol):
    """How conversations become tokens of a model."""

    def num_tokens(self, shape: ChatShape) -> int:
        """Of a sample, at most.

        Raises:
            InputError: it cannot be laid out.
        """
        ...


LayoutT = TypeVar("LayoutT", bound=Layout)


@dataclass(frozen=True)
class PackStream(Generic[LayoutT]):
    """The stream.

    Args:
        mixture: where items come from, uniformly within a source, with replacement.
        layout: counts tokens.
        seed: of the whole run.
        tokens_per_pack: most tokens of a process in a step.
        view_size: (H, W) of all views.
        scenes_alone: the geometry encoder is called for each scene (windows that straddle images), not once for all.
        always_image: every pack has an image, so that heads on image tokens always have something to run on.
        size: tokens of a pack, from those of its items: their sum where they stand in one sequence.
    """

    mixture: ChatMixture
    layout: LayoutT
    seed: int = 0
    tokens_per_pack: int = 40_960
    view_size: Size = (518, 518)
    scenes_alone: bool = False
    always_image: bool = False
    size: Callable[[Sequence[int]], int] = sum

    def item(self, number: int) -> Item:
        """The item at a place of the stream."""
        random = np.random.default_rng([self.seed, _ITEM, number])
        shares = np.cumsum(np.asarray(self.mixture.weights, float) / sum(self.mixture.weights))
        source = min(int(np.searchsorted(shares, random.random(), side="right")), len(shares) - 1)
        index = int(random.integers(len(self.mixture.sources[source])))
        return Item(number, source, index, int(random.integers(2**31)))

    def coin(self, step: int) -> bool:
        """One fair throw per step, equal on all processes."""
        return bool(np.random.default_rng([self.seed, _SWITCH, step]).random() < 0.5)

    def packs(self, start: int = 0) -> Iterator[Pack]:
        """All packs from the one that begins with item `start`.

        Raises:
            InputError: no usable item in a long time, or views of another size than the run's.
        """
        items: list[Item] = []
        shapes: list[tuple[ChatShape, int]] = []
        bad: list[BadSample] = []
        number, unusable = start, 0
        while True:
            item = self.item(number)
            try:
                shape, tokens = self._measured(item)
            except InputError as error:
                unusable += 1
                if unusable > _MAX_BAD_IN_A_ROW:
                    raise InputError(f"{unusable} items in a row are unusable", str(error), "check the data") from None
                bad.append(BadSample(self.name(item), str(error)))
                number += 1
                continue
            if self.size([*(own for _, own in shapes), tokens]) > self.tokens_per_pack:
                yield _pack(items, shapes, item.number, bad)
                items, shapes, bad = [], [], []
            items.append(item)
            shapes.append((shape, tokens))
            unusable, number = 0, number + 1

    def plans(self, steps: Sequence[int], start: int, rank: int = 0, world: int = 1) -> Iterator[StepPlan]:
        """One process's share of consecutive steps, the first of which begins with item `start`; errors as `packs`."""
        packs = self.packs(start)
        for step in steps:
            dealt = [next(packs) for _ in range(world)]
            bad = tuple(entry for pack in dealt for entry in pack.bad) if rank == 0 else ()
            yield StepPlan(step, dealt[rank].items, self._filling(dealt), _facts(dealt), dealt[-1].end, bad)

    def name(self, item: Item) -> str:
        """Of an item, for people."""
        return f"{self.mixture.sources[item.source].name}/{item.index}"

    def _measured(self, item: Item) -> tuple[ChatShape, int]:
        """Shape and number of tokens of an item.

        Raises:
            InputError: it cannot be read or never fits.
        """
        shape = self.mixture.sources[item.source].shape(item.index, item.seed)
        tokens = self.layout.num_tokens(shape)
        if tokens > self.tokens_per_pack:
            raise InputError(
                f"{self.name(item)} does not fit",
                f"it has {tokens} tokens, data.chat.tokens_per_pack is {self.tokens_per_pack}",
                "raise data.chat.tokens_per_pack, or use fewer or smaller images",
            )
        if shape.num_views and shape.view_size != self.view_size:
            raise InputError(
                f"{self.name(item)} has views of {shape.view_size[1]} x {shape.view_size[0]}",
                f"data.chat.view_size is {list(self.view_size)}, and all views of a run have one size",
                "leave view_size out of the source's options",
            )
        return shape, tokens

    def _filling(self, dealt: Sequence[Pack]) -> Filling:
        most = max(pack.num_scenes for pack in dealt)
        scenes = most if self.scenes_alone else min(most, 1)
        return Filling(scenes, self.always_image or any(pack.num_images for pack in dealt), self.view_size)


def _pack(items: list[Item], shapes: list[tuple[ChatShape, int]], end: int, bad: list[BadSample]) -> Pack:
    return Pack(
        items=tuple(items),
        num_tokens=sum(tokens for _, tokens in shapes),
        num_scenes=sum(shape.num_views > 0 for shape, _ in shapes),
        num_views=sum(shape.num_views for shape, _ in shapes),
        num_images=sum(len(shape.image_order) for shape, _ in shapes),
        end=end,
        bad=tuple(bad),
    )


def _facts(dealt: Sequence[Pack]) -> dict[str, int]:
    return {
        "samples": sum(len(pack.items) for pack in dealt),
        "tokens": sum(pack.num_tokens for pack in dealt),
        "views": sum(pack.num_views for pack in dealt),
        "images": sum(pack.num_images for pack in dealt),
    }
