"""A finite list of samples in place of random ones: what a cache of a teacher's targets is made for."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from g2vlm.data.chat.types import ChatSample, ChatShape, ChatSource
from g2vlm.errors import InputError

FIXED_OPTIONS = ("fixed_samples", "fixed_seed")
"""Options that every source of questions has besides its own."""


class FixedSamples:
    """The first samples of a source, each always drawn with the same seed: whatever seed is asked for, sample i is that
    of the seed which `fixed_seed` and i give, with the same frames in the same order and the same words.

    Args:
        source: of the samples.
        fixed_samples: how many; by default all of the source.
        fixed_seed: what their seeds are made of.

    Raises:
        InputError: less than one sample.
    """

    def __init__(self, source: ChatSource, fixed_samples: int | None = None, fixed_seed: int = 0):
        if fixed_samples is not None and fixed_samples < 1:
            raise InputError(f"fixed_samples is {fixed_samples}", f"of {source.name}", "give at least 1")
        self.source, self.name, self.fixed_seed = source, source.name, fixed_seed
        self.count = len(source) if fixed_samples is None else min(fixed_samples, len(source))

    def __len__(self) -> int:
        return self.count

    def shape(self, index: int, seed: int) -> ChatShape:
        """As in `ChatSource`, whatever the seed."""
        return self.source.shape(index, self._seed(index))

    def load(self, index: int, seed: int = 0) -> ChatSample:
        """As in `ChatSource`, whatever the seed."""
        return self.source.load(index, self._seed(index))

    def __iter__(self) -> Iterator[ChatSample]:
        return (self.load(index) for index in range(len(self)))

    def _seed(self, index: int) -> int:
        return int(np.random.default_rng([self.fixed_seed, index]).integers(2**31))


def split_fixed(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A source's own options, and those of `FixedSamples`."""
    own = {name: value for name, value in options.items() if name not in FIXED_OPTIONS}
    return own, {name: value for name, value in options.items() if name in FIXED_OPTIONS}
