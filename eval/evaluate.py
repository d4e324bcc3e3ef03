"""Run systems over items: every system on the same views, what fails recorded with its reason."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from eval.baselines import System
from eval.protocols import Protocol
from eval.scoring import Row, score_against
from eval.sources import Item
from eval.summary import summarise
from eval.truth import Truth
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed, ResourceError
from geometry import GeometryPrediction

log = logging.getLogger(__name__)
MODEL = "model"
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Skipped:
    """An item that could not be scored, and why."""

    item: str
    reason: str


@dataclass(frozen=True, eq=False)
class Scored:
    """One item's views, and per system the prediction and its scores."""

    item: str
    sample: SceneSample
    predictions: dict[str, GeometryPrediction]
    rows: dict[str, Row]


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


def evaluate(
    items: Sequence[Item],
    systems: Mapping[str, System],
    protocol: Protocol,
    keep: Callable[[Scored], None] = lambda scored: None,
) -> Evaluation:
    """Score every system on every item. An item that fails is recorded and left out for all systems alike.

    Args:
        items: what to evaluate on.
        systems: by name, the model first.
        protocol: what they are scored by.
        keep: called with each scored item, so that nothing is lost when the evaluation is interrupted.

    Raises:
        ResourceError: the views do not fit into memory.
    """
    evaluation = Evaluation(protocol, {name: [] for name in systems}, [])
    told = time.monotonic()
    for number, item in enumerate(items):
        outcome = _evaluate_item(item, systems, protocol)
        if isinstance(outcome, Skipped):
            log.warning("skipped %s: %s", outcome.item, outcome.reason)
            evaluation.skipped.append(outcome)
        else:
            keep(outcome)
            for name, row in outcome.rows.items():
                evaluation.rows[name].append(row)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("%d of %d scenes", number + 1, len(items))
    return evaluation


def require_scored(evaluation: Evaluation) -> None:
    """Raise CheckFailed when no item was scored."""
    if not evaluation.count:
        first = evaluation.skipped[0] if evaluation.skipped else Skipped("none", "there is no scene")
        why = f"{len(evaluation.skipped)} skipped, the first: {first.item}: {first.reason}"
        raise CheckFailed("no scene could be scored", why, "")


def _evaluate_item(item: Item, systems: Mapping[str, System], protocol: Protocol) -> Scored | Skipped:
    predictions, rows, stage = {}, {}, "data"
    try:
        sample = item.load()
        truth = Truth.of(sample, protocol)
        for name, system in systems.items():
            stage = name
            predictions[name] = system.predict(sample)
            rows[name] = replace(score_against(truth, predictions[name], system.parts), item=item.name)
    except (torch.OutOfMemoryError, MemoryError) as error:
        fix = "use fewer --views or a smaller --width"
        raise ResourceError(f"not enough memory for {item.name}", str(error).partition("\n")[0], fix) from error
    except (ValueError, OSError, CheckFailed) as error:  # InputError is a ValueError
        return Skipped(item.name, f"{stage}: {' '.join(str(error).split())}")
    return Scored(item.name, sample, predictions, rows)
