"""Questions to a stock model: rows of its chat template, under the same stream and promises as packs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2vlm.data.batch import SceneBatch
from g2vlm.data.chat.types import ChatSample
from train.feed import QuestionDataset, QuestionFeed
from train.packing import StepPlan
from train.stock.batch import StockBatch, collate_stock, stock_inputs
from train.stock.model import write_limits


@dataclass(frozen=True)
class StockDataset(QuestionDataset):
    """Padded rows of a stock model."""

    def collated(self, samples: Sequence[ChatSample], plan: StepPlan) -> StockBatch:
        """A batch always holds an image, so nothing else has to be filled in."""
        return collate_stock(samples, self.stream.layout)


@dataclass(frozen=True)
class StockFeed(QuestionFeed):
    """Questions to a stock model.

    Args:
        limits: the images' sizes are not those of the folder's processor.
    """

    limits: bool = False

    def inputs(self, batch: StockBatch, step: int) -> dict[str, Any]:
        """Logits of the answers, and the sizes of what heads are compared with."""
        return stock_inputs(batch)

    def given(self, batch: StockBatch) -> None:
        """None: there is no fusion."""

    def scenes(self, batch: StockBatch) -> SceneBatch | None:
        """None: a stock model reconstructs nothing."""
        return None

    def write_files(self, folder: Path) -> None:
        """The processor as the model was trained."""
        if self.limits:
            write_limits(folder, self.dataset.stream.layout.rule)
