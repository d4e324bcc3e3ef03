"""Which questions to keep so that answers are spread evenly and tasks come equally often.

Rooms make some answers rare. A table, measured once over training rooms, holds how often each task can be asked and how
often each of its answers occurs; keeping frequent answers less often evens them out without knowing what else is asked.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import g2vlm
from g2vlm.data.qa.question import Question
from g2vlm.data.rooms.draws import Draws

TABLE = Path(g2vlm.__file__).parent / "assets" / "rooms-qa-balance.json"
STEP = 1.25  # ratio between the borders of two cells of numbers
RARE = 0.25  # of a task's most frequent answer; rarer cells keep all, the others are thinned to this
MANY = 5  # objects from which on counts are one cell
NAMED = ("object_rel_distance", "camera_obj_rel_dist", "obj_appearance_order")  # answers are categories: one cell


def cell(question: Question) -> str:
    """What is counted as the same answer: a direction, a range of numbers, a small count; letters never matter."""
    if question.task.startswith(NAMED):
        return "any"
    if question.kind == "choice":
        return question.answer_text
    if question.task == "object_counting":
        return question.answer if int(question.answer) < MANY else f"{MANY} or more"
    return str(math.floor(math.log(max(float(question.answer), 1e-6)) / math.log(STEP)))


@dataclass(frozen=True)
class Balance:
    """How often rooms offer what.

    Args:
        available: share of scenes in which a task has a question left after thinning.
        cells: how often each answer occurs, by task and cell, as a share of the task's most frequent one.
    """

    available: Mapping[str, float]
    cells: Mapping[str, Mapping[str, float]]

    @classmethod
    def standard(cls) -> "Balance":
        """The table of the default rooms, rules and views."""
        return _read(TABLE)

    def keep(self, question: Question) -> float:
        """The probability of keeping a question; rare answers are always kept."""
        return min(1.0, RARE / self.cells.get(question.task, {}).get(cell(question), RARE))

    def pick(self, questions: Sequence[Question], draws: Draws) -> Question | None:
        """The first question that is kept, or None."""
        kept = [q for q in questions if draws.uniform() < self.keep(q)]
        return kept[0] if kept else None

    def tasks(self, present: Sequence[str], count: int, draws: Draws) -> list[str]:
        """At most `count` different tasks without replacement, weighted by 1 / availability."""
        keys = {task: -math.log(1 - draws.uniform()) * self.available.get(task, 1.0) for task in present}
        return sorted(keys, key=keys.__getitem__)[:count]


def measure(scenes: Iterable[Mapping[str, Sequence[Question]]], seed: int = 0) -> Balance:
    """The table of what some scenes offer by task."""
    offered = list(scenes)
    counts: dict[str, Counter[str]] = {}
    for scene in offered:
        for task, questions in scene.items():
            counts.setdefault(task, Counter()).update(cell(question) for question in questions)
    shares = {
        task: {name: round(number / max(cells.values()), 3) for name, number in sorted(cells.items())}
        for task, cells in sorted(counts.items())
    }
    thinned, draws = Balance({}, shares), Draws(seed)
    present = Counter(
        task for scene in offered for task, items in scene.items() if thinned.pick(items, draws) is not None
    )
    return Balance({task: round(number / len(offered), 3) for task, number in sorted(present.items())}, shares)


def write_table(balance: Balance, path: Path = TABLE) -> None:
    """Store a table as JSON."""
    content = {"available": dict(balance.available), "cells": {task: dict(c) for task, c in balance.cells.items()}}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@lru_cache(maxsize=1)
def _read(path: Path) -> Balance:
    content = json.loads(path.read_text(encoding="utf-8"))
    return Balance(content["available"], content["cells"])
