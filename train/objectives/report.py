"""What an objective returns: means with the counts behind them, so that any split of a batch gives the same loss."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from g2vlm.data.batch import SceneBatch
from g2vlm.model.outputs import G2VLMOutput


@dataclass(frozen=True)
class Term:
    """One mean.

    Args:
        value: a scalar with gradient, the mean over this rank's entries.
        count: how many entries, a scalar tensor.
        factor: what the mean is multiplied by in the loss.
    """

    value: Tensor
    count: Tensor
    factor: float


LossReport = dict[str, Term]


class Objective(Protocol):
    """A way to train the model: forward options, and a loss from what the model returns."""

    @property
    def name(self) -> str:
        """As in configs."""
        ...

    def __call__(self, output: G2VLMOutput, batch: SceneBatch) -> LossReport:
        """The terms of this rank's batch. Every rank returns the same names."""
        ...
