"""A fixed set of questions with even answers: the same number for every task, answer, letter and preferred object."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from g2vlm.data.qa.balance import NAMED, Balance, cell
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.tasks import TASKS, group

Offers = Sequence[Mapping[str, Sequence[Question]]]
"""By scene and task."""

QUOTA = 84  # questions of a task without variants
VARIANT_QUOTA = 24  # of each variant of a task with three
PER_SCENE = 1  # of a task or variant about one scene
COMMON = 0.04  # of a task's most frequent answer, from which on an answer gets its even share
SLACK = 1.0  # questions by which an object may be right more often than chance


def quota(task: str) -> int:
    """Questions wanted of a task or variant."""
    return QUOTA if group(task) == task else VARIANT_QUOTA


def select(offers: Offers, balance: Balance) -> list[Question]:
    """Questions in the order of the scenes, and of `TASKS` within a scene; fewer of a task that is not offered often.

    Args:
        offers: what may be asked about each scene.
        balance: which answers are common, and so should come equally often.
    """
    chosen = {id(q) for task in TASKS for q in _select_task(task, [scene.get(task, ()) for scene in offers], balance)}
    return [q for scene in offers for task in TASKS for q in scene.get(task, ()) if id(q) in chosen]


def _select_task(task: str, offers: Iterable[Sequence[Question]], balance: Balance) -> list[Question]:
    common = [share for share in balance.cells.get(task, {}).values() if share >= COMMON]
    tally, chosen = _Tally(-(-quota(task) // max(len(common), 1)), quota(task)), []
    for questions in offers:
        taken = 0
        for question in questions:
            if len(chosen) < quota(task) and taken < PER_SCENE and tally.admits(question):
                tally.add(question)
                chosen.append(question)
                taken += 1
    return chosen


@dataclass
class _Tally:
    """What has been chosen of one task.

    Args:
        per_cell: most questions with the same answer.
        total: questions wanted.
    """

    per_cell: int
    total: int
    cells: Counter[str] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    excess: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def admits(self, question: Question) -> bool:
        """Whether a question keeps answers, letters and preferences even."""
        if self.cells[cell(question)] >= self.per_cell:
            return False
        if question.kind == "number":
            return True
        if self.letters[question.answer] >= -(-self.total // len(question.options)):
            return False
        return all(abs(self.excess[name] + change) <= SLACK for name, change in preferences(question).items())

    def add(self, question: Question) -> None:
        """Count a question."""
        self.cells[cell(question)] += 1
        self.letters[question.answer] += 1
        for name, change in preferences(question).items():
            self.excess[name] += change


def preferences(question: Question) -> dict[str, float]:
    """What a question adds to the excess over chance with which naming an object tells the answer.

    Where objects are the options, each object's: is it right more often than it would be by chance? Where two objects
    are compared, each object's in its place: does it go with the first answer more often than with the second?
    """
    if question.task.startswith(NAMED[:2]):
        chance = 1 / len(question.options)
        texts = [option.split(". ", 1)[1] for option in question.options]
        return {text: float(text == question.answer_text) - chance for text in texts}
    if question.task.startswith("obj_obj_relative_pos"):
        sign = 0.5 if question.answer_text in ("Near", "Left", "Up") else -0.5
        first, second = question.categories
        return {first: sign, second: -sign} if first != second else {}
    return {}
