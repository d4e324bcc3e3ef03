"""One declarative map between two naming schemes of the same tensors, used in both directions.

A rule pairs a pattern of theirs with a pattern of ours. `{i}` stands for a number, `{tail}` for the rest of a name. A
rule with several patterns of theirs joins those tensors into one of ours along dim 0 (query, key, value -> qkv).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from g2vlm.weights import Specs, TensorSource, TensorSpec

_PLACEHOLDERS = {"i": r"(?P<i>\d+)", "tail": r"(?P<tail>.+)"}


@dataclass(frozen=True)
class Rule:
    """The same tensor under two names; several names of theirs are joined along dim 0, in this order."""

    theirs: tuple[str, ...]
    ours: str


def rule(theirs: str | Sequence[str], ours: str) -> Rule:
    """A rule; a single pattern of theirs may be given as a string."""
    return Rule((theirs,) if isinstance(theirs, str) else tuple(theirs), ours)


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made: `sources` joined along dim 0, or part `part` of `parts` equal ones of a single source."""

    sources: tuple[str, ...]
    part: int = 0
    parts: int = 1

    def spec(self, specs: Specs) -> TensorSpec:
        """Type and shape of the result."""
        if len(self.sources) == self.parts == 1:
            return specs[self.sources[0]]
        made_from = [specs[name] for name in self.sources]
        dtype = reduce(torch.promote_types, [spec.dtype for spec in made_from])
        rows = sum(spec.shape[0] for spec in made_from)
        return TensorSpec(dtype, (rows // self.parts, *made_from[0].shape[1:]))

    def make(self, source: TensorSource) -> Tensor:
        """The result."""
        tensors = [source.load(name) for name in self.sources]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined.chunk(self.parts)[self.part]


class KeyMap:
    """Rules applied to names. Every name must match one rule at most."""

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)
        self._theirs = [(_regex(pattern), r, part) for r in self.rules for part, pattern in enumerate(r.theirs)]
        self._ours = [(_regex(r.ours), r) for r in self.rules]

    def to_ours(self, names: Iterable[str]) -> dict[str, Recipe]:
        """Recipes of our tensors from their names; names without a rule or without their partners make nothing."""
        found: dict[str, dict[int, str]] = {}
        needed: dict[str, int] = {}
        for name in names:
            for regex, matched, part in self._theirs:
                if match := regex.fullmatch(name):
                    target = matched.ours.format(**match.groupdict())
                    found.setdefault(target, {})[part] = name
                    needed[target] = len(matched.theirs)
        return {
            target: Recipe(tuple(parts[part] for part in sorted(parts)))
            for target, parts in found.items()
            if len(parts) == needed[target]
        }

    def to_theirs(self, names: Iterable[str]) -> dict[str, Recipe]:
        """Recipes of their tensors from our names; names without a rule make nothing."""
        recipes: dict[str, Recipe] = {}
        for name in names:
            for regex, matched in self._ours:
                if match := regex.fullmatch(name):
                    for part, pattern in enumerate(matched.theirs):
                        recipes[pattern.format(**match.groupdict())] = Recipe((name,), part, len(matched.theirs))
        return recipes

    def their_specs(self, ours: Specs) -> dict[str, TensorSpec]:
        """What their layout holds for a model with our tensors."""
        return {name: recipe.spec(ours) for name, recipe in self.to_theirs(ours).items()}


class Translated:
    """A source under other names, each tensor made from the original when it is asked for."""

    def __init__(self, source: TensorSource, recipes: dict[str, Recipe]):
        self._source, self._recipes = source, recipes
        self.specs = {name: recipe.spec(source.specs) for name, recipe in recipes.items()}

    def load(self, name: str) -> Tensor:
        """The tensor under its new name."""
        return self._recipes[name].make(self._source)


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile("".join(_PLACEHOLDERS[p] if k % 2 else re.escape(p) for k, p in enumerate(parts)))
