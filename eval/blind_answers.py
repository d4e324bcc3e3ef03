"""Answers given without looking: what a score must beat to mean anything."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.qa_scoring import TOLERANCES
from g2vlm.data.qa.question import Question, letters, option_text

LEAST_SEEN = 5  # training questions about the same categories before their own best answer is used

Answerer = Callable[[Question], str]
Key = Callable[[Question], Any]


def by_task(question: Question) -> Any:
    """All questions of a task are answered alike."""
    return question.task


def by_categories(question: Question) -> Any:
    """All questions of a task about the same categories in the same places are answered alike."""
    return question.task, question.categories


def by_any_category(question: Question) -> Any:
    """All questions of a task about the same set of categories are answered alike."""
    return question.task, tuple(sorted(question.categories))


def majority(training: Sequence[Question], key: Key = by_task) -> Answerer:
    """The best constant answer among training questions with the same key; of the task where too few have it.

    A number's best answer has the largest mean relative accuracy. A choice's is the option whose words are right most
    often among the questions that offer it, or the most frequent letter when options are never the same twice.
    """
    tables = [_Table.of(training, key), _Table.of(training, by_task)]

    def answer(question: Question) -> str:
        for table in tables:
            if (reply := table.answer(question)) is not None:
                return reply
        return "A" if question.kind == "choice" else "1"

    return answer


@dataclass(frozen=True)
class _Table:
    """What training questions with the same key were answered with."""

    key: Key
    numbers: Mapping[Any, str]
    rights: Mapping[Any, Counter[str]]
    offers: Mapping[Any, Counter[str]]

    @classmethod
    def of(cls, training: Sequence[Question], key: Key) -> "_Table":
        groups: dict[Any, list[Question]] = defaultdict(list)
        for question in training:
            groups[key(question)].append(question)
        kept = {name: items for name, items in groups.items() if len(items) >= LEAST_SEEN}
        numbers = {name: best_constant([q.answer for q in items]) for name, items in kept.items() if _numeric(items)}
        choices = {name: items for name, items in kept.items() if not _numeric(items)}
        rights = {name: Counter(q.answer_text for q in items) for name, items in choices.items()}
        offers = {name: Counter(t for q in items for t in option_texts(q)) for name, items in choices.items()}
        return cls(key, numbers, rights, offers)

    def answer(self, question: Question) -> str | None:
        """The letter of the option that was right most often when offered, or the best number."""
        name = self.key(question)
        if question.kind == "number":
            return self.numbers.get(name)
        if name not in self.rights:
            return None
        rights, offers = self.rights[name], self.offers[name]
        rates = [(rights[text] + 1) / (offers[text] + len(question.options)) for text in option_texts(question)]
        return letters()[int(np.argmax(rates))]


def _numeric(items: Sequence[Question]) -> bool:
    return items[0].kind == "number"


def option_texts(question: Question) -> list[str]:
    """Options without letters."""
    return [option_text(option) for option in question.options]


def best_constant(answers: Sequence[str]) -> str:
    """The number among the answers with the largest mean relative accuracy over all of them."""
    truths = np.array([float(answer) for answer in answers])
    candidates = np.unique(truths)
    errors = np.abs(candidates[:, None] - truths) / truths  # (C, N)
    worth = (errors[..., None] <= TOLERANCES).mean((1, 2))
    return f"{candidates[int(np.argmax(worth))]:g}"


def random_answers(training: Sequence[Question], seed: int = 0) -> Answerer:
    """A letter drawn evenly, or the number of a training question of the task drawn at random."""
    generator = np.random.default_rng(seed)
    numbers: dict[str, list[str]] = defaultdict(list)
    for question in training:
        if question.kind == "number":
            numbers[question.task].append(question.answer)

    def answer(question: Question) -> str:
        pool = [*letters()[: len(question.options)]] or numbers[question.task]
        return pool[generator.integers(len(pool))] if pool else ""

    return answer
