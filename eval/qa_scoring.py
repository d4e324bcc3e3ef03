"""Scores of answers to spatial questions, as VSI-Bench and VSTI-Bench compute them, and what an answer is worth blind.

A reply counts by its first word. Letters must equal the right one; numbers earn mean relative accuracy
(VSI-Bench: mean over theta = 0.5, 0.55, ..., 0.95 of [|p - g| / g <= 1 - theta]). The macro score averages the variants
of a task first, then tasks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.qa.question import Kind, Question, letters
from g2vlm.data.qa.tasks import group

TOLERANCES = 1 - np.linspace(0.5, 0.95, 10)
LEAST_SEEN = 5  # training questions about the same categories before their own best answer is used


def first_word(reply: str) -> str:
    """What of a reply counts: up to the first blank, without trailing full stops."""
    return reply.split(" ")[0].rstrip(".").strip()


def parse_number(reply: str) -> float | None:
    """The number that a reply starts with, or None."""
    try:
        return float(first_word(reply))
    except ValueError:
        return None


def mean_relative_accuracy(prediction: float, truth: float) -> float:
    """Share of the ten tolerances that the relative error |p - g| / g is within; g > 0."""
    return float(np.mean(abs(prediction - truth) / truth <= TOLERANCES))


def score_reply(kind: Kind, reply: str, answer: str) -> float:
    """The score of a reply in [0, 1]."""
    if kind == "choice":
        return float(first_word(reply).lower() == answer.lower())
    number = parse_number(reply)
    return 0.0 if number is None else mean_relative_accuracy(number, float(answer))


def score_replies(questions: Sequence[Question], replies: Sequence[str]) -> NDArray[np.float64]:
    """One score per question (N,).

    Raises:
        ValueError: there are not as many replies as questions.
    """
    pairs = zip(questions, replies, strict=True)
    return np.array([score_reply(question.kind, reply, question.answer) for question, reply in pairs])


# Averages.


@dataclass(frozen=True)
class Scores:
    """Percentages: of each task with its variants apart, of each task, and the mean over tasks."""

    tasks: Mapping[str, float]
    groups: Mapping[str, float]
    macro: float


def aggregate(tasks: Sequence[str], scores: NDArray[np.float64]) -> Scores:
    """Averages of scores (N,) by the task of each."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, score in zip(tasks, scores.tolist(), strict=True):
        by_task[task].append(score)
    means = {task: 100 * float(np.mean(values)) for task, values in sorted(by_task.items())}
    by_group: dict[str, list[float]] = defaultdict(list)
    for task, mean in means.items():
        by_group[group(task)].append(mean)
    groups = {name: float(np.mean(values)) for name, values in by_group.items()}
    return Scores(means, groups, float(np.mean(list(groups.values()))) if groups else float("nan"))


def bootstrap_macro(
    tasks: Sequence[str], scores: NDArray[np.float64], clusters: Sequence[str], rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the macro score, drawing scenes with replacement so that questions about one stay together.

    Args:
        tasks: of each question.
        scores: (N,).
        clusters: the scene of each question.
        rounds: resamples.
        seed: of the draws.
    """
    names, task_of = np.unique(np.array(tasks), return_inverse=True)
    scene_names, scene_of = np.unique(np.array(clusters), return_inverse=True)
    shape = (len(scene_names), len(names))
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (scene_of, task_of), scores)
    np.add.at(count, (scene_of, task_of), 1)
    group_names = sorted({group(str(name)) for name in names})
    member = np.array([[group(str(name)) == wanted for name in names] for wanted in group_names], dtype=np.float64)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=rounds)  # (R, scenes)
    totals, counts = weights @ total, weights @ count  # (R, tasks)
    present = counts > 0
    means = np.where(present, totals / np.maximum(counts, 1), 0.0)
    groups_present = present @ member.T  # (R, groups): how many variants were drawn
    by_group = means @ member.T / np.maximum(groups_present, 1)
    macros = 100 * by_group.sum(1) / np.maximum((groups_present > 0).sum(1), 1)
    low, high = np.percentile(macros, [2.5, 97.5])
    return float(low), float(high)


# Blind baselines: answers given without looking.

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
    return [option.split(". ", 1)[1] for option in question.options]


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
