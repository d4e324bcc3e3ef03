"""Batches of consecutive steps, prefetched by worker processes that decide nothing."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from g2vlm.data.batch import SceneBatch, collate
from g2vlm.data.transforms import augment_colours
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError, TooManyBadFiles
from train.sampler import Pick, Sampler

log = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 20


class BadSample(NamedTuple):
    """A scene that could not be read, and why."""

    scene: str
    reason: str


class LoadedBatch(NamedTuple):
    """One rank's batch of one step, and the scenes that were replaced in it."""

    batch: SceneBatch
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class StepDataset(Dataset[LoadedBatch]):
    """Maps a step to this rank's batch; `augment` changes colours at random."""

    sampler: Sampler
    rank: int = 0
    world: int = 1
    augment: bool = False

    def __getitem__(self, step: int) -> LoadedBatch:
        """The batch of a step; unreadable scenes are replaced by the counter's next choice.

        Raises:
            InputError: a place of the batch could not be filled.
        """
        picks = self.sampler.picks(step, self.rank, self.world)
        first = self.rank * len(picks)
        bad: list[BadSample] = []
        samples = [self._readable(step, first + i, pick, bad) for i, pick in enumerate(picks)]
        return LoadedBatch(collate(samples), tuple(bad))

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


def batches(dataset: StepDataset, steps: Sequence[int], workers: int) -> Iterator[LoadedBatch]:
    """The batches of these steps in order; the number of workers changes nothing but the speed."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own, so that starting anew leaves the global one alone
    )
    return iter(loader)
