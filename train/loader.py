"""Batches of consecutive steps, prefetched by worker processes that decide nothing.

What workers log and raise is told by the process that asked for the batch: each message once, errors as they are; and
the unreadable frames that they find are counted there together.
"""

import logging
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from g2vlm.data.batch import SceneBatch, collate
from g2vlm.data.chat.batch import ChatBatch
from g2vlm.data.frames import BadFrames, FrameSource
from g2vlm.data.transforms import augment_colours
from g2vlm.data.types import SceneSample
from g2vlm.errors import G2VLMError, InputError, TooManyBadFiles
from train.sampler import Pick, Sampler
from train.stock.batch import StockBatch

log = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 20


class BadSample(NamedTuple):
    """A scene that could not be read, and why."""

    scene: str
    reason: str


class LoadedBatch(NamedTuple):
    """One rank's batch of one step.

    Args:
        batch: scenes or packed questions.
        bad: scenes that were replaced in it, or questions that were left out.
        step: counted from 0.
        asked: how many scenes or questions the step has, over all ranks.
        work: how many views or tokens it has, over all ranks.
        facts: what the log says about the step, over all ranks.
        end: where the data of the next step begin: what a checkpoint must know to go on.
    """

    batch: SceneBatch | ChatBatch | StockBatch
    bad: tuple[BadSample, ...]
    step: int
    asked: int
    work: int
    facts: dict[str, Any]
    end: int


class Batches(Protocol):
    """Maps a step, or what was planned for it, to this rank's batch."""

    @property
    def frame_sources(self) -> Sequence[FrameSource]:
        """Sources of stored frames that are read."""
        ...

    def __getitem__(self, key: Any, /) -> LoadedBatch:
        """The batch; everything random in it follows from the key."""
        ...


@dataclass(frozen=True)
class StepDataset(Dataset[LoadedBatch]):
    """Maps a step to this rank's batch; `augment` changes colours at random."""

    sampler: Sampler
    rank: int = 0
    world: int = 1
    augment: bool = False

    @property
    def frame_sources(self) -> list[FrameSource]:
        """The sources of stored frames."""
        return [source for source in self.sampler.sources if isinstance(source, FrameSource)]

    def __getitem__(self, step: int) -> LoadedBatch:
        """The batch of a step; unreadable scenes are replaced by the counter's next choice.

        Raises:
            InputError: a place of the batch could not be filled.
        """
        picks = self.sampler.picks(step, self.rank, self.world)
        first = self.rank * len(picks)
        bad: list[BadSample] = []
        samples = [self._readable(step, first + i, pick, bad) for i, pick in enumerate(picks)]
        shape = self.sampler.shape(step)
        work = shape.num_scenes * shape.num_views
        facts = {"scenes": shape.num_scenes, "views": shape.num_views, "size": list(shape.size)}
        return LoadedBatch(collate(samples), tuple(bad), step, shape.num_scenes, work, facts, step + 1)

    def _readable(self, step: int, item: int, pick: Pick, bad: list[BadSample]) -> SceneSample:
        for attempt in range(1, _MAX_SUBSTITUTES + 1):
            source = self.sampler.sources[pick.source]
            try:
                sample = shuffled(source.load(pick.scene, pick.request), pick.request.seed)
            except TooManyBadFiles:
                raise
            except InputError as error:
                bad.append(BadSample(f"{source.name}/{pick.scene}", str(error)))
                pick = self.sampler.pick(step, item, attempt)
                continue
            if not self.augment:
                return sample
            return replace(sample, images=augment_colours(sample.images, pick.request.seed))
        raise InputError(f"{_MAX_SUBSTITUTES} scenes in a row could not be read", bad[-1].reason, "check the data")


def shuffled(sample: SceneSample, seed: int) -> SceneSample:
    """The sample with its views in random order, so that any view may come first."""
    return sample.views(torch.randperm(sample.num_views, generator=torch.Generator().manual_seed(seed)))


def batches(dataset: Batches, keys: Iterable[Any], workers: int) -> Iterator[LoadedBatch]:
    """The batches of these keys in order; the number of workers changes nothing but the speed."""
    loader = DataLoader(
        _Reporting(dataset),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own, so that starting anew leaves the global one alone
        worker_init_fn=_collect_messages,
    )
    said: set[Message] = set()
    for made in loader:
        for message in made.messages:
            if message not in said:
                said.add(message)
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
        for source, frames in zip(dataset.frame_sources, made.left_out, strict=True):
            source.leave_out(frames)
        if isinstance(made.batch, G2VLMError):
            raise made.batch
        yield made.batch


class Message(NamedTuple):
    """Something logged in a worker."""

    logger: str
    level: int
    text: str


class _Collector(logging.Handler):
    """Keeps what a worker logs until its next batch is handed over."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(Message(record.name, record.levelno, record.getMessage()))

    def take(self) -> list[Message]:
        taken, self.messages = self.messages, []
        return taken


_collector = _Collector()


def _collect_messages(worker: int) -> None:
    """In a worker: log into the collector alone, and leave it to the run what a SIGTERM for all its processes means."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger().handlers = [_collector]


class _Made(NamedTuple):
    """A batch, or the error in its place, which would lose its form on the way out of a worker; and what came with it.

    `left_out` has the frames newly found to be unreadable, for each of the frame sources.
    """

    batch: LoadedBatch | G2VLMError
    messages: list[Message]
    left_out: list[BadFrames]


@dataclass(frozen=True)
class _Reporting(Dataset[_Made]):
    """A dataset that tells what happened."""

    dataset: Batches

    def __getitem__(self, key: Any) -> _Made:
        sources = self.dataset.frame_sources
        known = [set(source.left_out) for source in sources]
        try:
            batch = self.dataset[key]
        except G2VLMError as error:
            batch = error
        new = [
            {place: error for place, error in source.left_out.items() if place not in before}
            for source, before in zip(sources, known, strict=True)
        ]
        return _Made(batch, _collector.take(), new)
