"""What an objective returns: means with the counts behind them, so that any split of a batch gives the same loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from g2vlm.data.batch import SceneBatch
from g2vlm.data.chat.batch import ChatBatch
from g2vlm.model.outputs import G2VLMOutput
from train.stock.batch import StockBatch


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
Batch = SceneBatch | ChatBatch | StockBatch


class Objective(Protocol):
    """A way to train the model: forward options, and a loss from what the model returns."""

    @property
    def name(self) -> str:
        """As in configs."""
        ...

    def __call__(self, output: G2VLMOutput, batch: Batch) -> LossReport:
        """The terms of this rank's batch. Every rank returns the same names."""
        ...


def joined(reports: Sequence[LossReport]) -> LossReport:
    """One report of the parts of a batch; every mean is over the entries of all parts. Of no part it is empty."""
    if len(reports) < 2:
        return reports[0] if reports else {}
    return {name: _mean([report[name] for report in reports]) for name in reports[0]}


def _mean(terms: Sequence[Term]) -> Term:
    counts = torch.stack([term.count for term in terms])
    sums = torch.stack([term.value for term in terms]) * counts
    return Term(sums.sum() / counts.sum().clamp_min(1), counts.sum(), terms[0].factor)
