"""What a geometric supervision asks of the data, and the objective that compares its heads with them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from g2vlm.supervision.base import Supervision
from g2vlm.supervision.targets import TeacherTargets
from train.objectives.report import LossReport, Term, joined


@dataclass(frozen=True)
class Needs:
    """Fields of `TeacherTargets` that every supervised clip must have.

    Args:
        fields: their names.
        blocks: of the teacher, whose features are wanted.
    """

    fields: frozenset[str]
    blocks: tuple[int, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        """What either needs."""
        return Needs(self.fields | other.fields, tuple(sorted({*self.blocks, *other.blocks})))

    def missing(self, targets: TeacherTargets) -> list[str]:
        """What these targets lack, by name."""
        lacking = sorted(name for name in self.fields if getattr(targets, name) is None)
        return lacking + [f"features[{block}]" for block in self.blocks if block not in (targets.features or {})]


class SupervisionObjective(ABC):
    """The terms of one supervision; each is a mean over the clips that have what it needs.

    Args:
        module: the heads, which train with the model and are wrapped with it.
        factors: name of a term -> what its mean is multiplied by. Every report has exactly these terms.
    """

    name: str
    """As in configs; terms are called NAME.TERM."""

    def __init__(self, module: Supervision, factors: Mapping[str, float]):
        self.module, self.factors = module, dict(factors)

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What a clip must have."""

    @abstractmethod
    def clip_terms(self, prediction: Any, targets: TeacherTargets) -> dict[str, tuple[Tensor, Tensor]]:
        """Terms of one clip: name (without this objective's) -> mean, and 1 if there was anything to compare, else 0.

        Everything is computed in float32; a term without anything valid is an exact zero that keeps the graph.
        """

    def __call__(self, output: Any, batch: Any) -> LossReport:
        """Terms of a batch; a clip that lacks something needed counts nowhere, and without any, zeros keep the graph.

        Args:
            output: a `SupervisedOutput`.
            batch: with `targets`, one `TeacherTargets` or None for each of its samples.
        """
        predictions = output.predictions[self.name]
        pairs = [
            (own, targets.detached())
            for own, targets in zip(predictions, batch.targets, strict=True)
            if own is not None and targets is not None and not self.needs.missing(targets)
        ]
        if not pairs:
            zero = torch.stack([0 * tensor.float().sum() for tensor in tensors_of(predictions)]).sum()
            return {f"{self.name}.{term}": Term(zero, zero.detach(), factor) for term, factor in self.factors.items()}
        return joined([self._report(*pair) for pair in pairs])

    def _report(self, prediction: Any, targets: TeacherTargets) -> LossReport:
        terms = self.clip_terms(prediction, targets)
        return {f"{self.name}.{term}": Term(*terms[term], factor) for term, factor in self.factors.items()}


def tensors_of(predictions: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dicts."""
    if isinstance(predictions, Tensor):
        yield predictions
    elif isinstance(predictions, Mapping):
        yield from tensors_of(tuple(predictions.values()))
    elif isinstance(predictions, tuple | list):
        for entry in predictions:
            yield from tensors_of(entry)
