"""Run systems over items: score, record what failed, write the results, draw pictures."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from eval.baselines import System
from eval.protocols import Protocol
from eval.scoring import Row, summarise
from eval.sources import Item
from g2vlm.errors import CheckFailed, ResourceError

log = logging.getLogger(__name__)
MODEL = "model"
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Skipped:
    """An item that could not be scored, and why."""

    item: str
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of every system on the same items.

    Attributes:
        protocol: what the numbers mean.
        rows: per system, one row per scored item, in the order of the items. The first system is the model.
        skipped: items that at least one system, or the source, failed on; no system is scored on them.
    """

    protocol: Protocol
    rows: dict[str, list[Row]]
    skipped: list[Skipped]

    @property
    def count(self) -> int:
        """Items scored."""
        return len(next(iter(self.rows.values())))

    def metrics(self, system: str) -> dict[str, float]:
        """A system's metrics over all scored items."""
        return summarise(self.rows[system], self.protocol)


def evaluate(items: Sequence[Item], systems: Mapping[str, System], protocol: Protocol) -> Evaluation:
    """Score every system on every item. An item that fails is recorded and left out for all systems alike.

    Args:
        items: what to evaluate on.
        systems: by name, the model first.
        protocol: what the systems score by.

    Raises:
        CheckFailed: no item could be scored.
        ResourceError: the views do not fit into memory.
    """
    evaluation = Evaluation(protocol, {name: [] for name in systems}, [])
    told = time.monotonic()
    for number, item in enumerate(items):
        _evaluate_item(item, systems, evaluation)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("%d of %d scenes", number + 1, len(items))
    if not evaluation.count:
        first = evaluation.skipped[0] if evaluation.skipped else Skipped("", "there is no scene")
        raise CheckFailed("no scene could be scored", f"first of {len(items)}: {first.item}: {first.reason}", "")
    return evaluation


def _evaluate_item(item: Item, systems: Mapping[str, System], evaluation: Evaluation) -> None:
    rows, stage = {}, "data"
    try:
        sample = item.load()
        for name, system in systems.items():
            stage = name
            rows[name] = replace(system(sample), item=item.name)
    except torch.OutOfMemoryError as error:
        fix = "use fewer --views or a smaller --width"
        raise ResourceError(f"not enough memory for {item.name}", str(error).splitlines()[0], fix) from error
    except (ValueError, OSError, CheckFailed) as error:  # InputError is a ValueError
        reason = f"{stage}: {' '.join(str(error).split())}"
        log.warning("skipped %s: %s", item.name, reason)
        evaluation.skipped.append(Skipped(item.name, reason))
        return
    for name, row in rows.items():
        evaluation.rows[name].append(row)
