"""Scores of answers to spatial questions, as VSI-Bench and VSTI-Bench compute them, their averages and intervals.

A reply counts by its first word. Letters must equal the right one; numbers earn mean relative accuracy
(VSI-Bench: mean over theta = 0.5, 0.55, ..., 0.95 of [|p - g| / g <= 1 - theta]). The macro score averages the variants
of a task first, then tasks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.qa.question import Kind, Question, letters
from g2vlm.data.qa.tasks import group

TOLERANCES = 1 - np.linspace(0.5, 0.95, 10)


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


def is_of_form(question: Question, reply: str) -> bool:
    """Whether a reply begins with what was asked for: the letter of an option, or a number."""
    if question.kind == "number":
        return parse_number(reply) is not None
    return first_word(reply).upper() in tuple(letters()[: len(question.options)])


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
    return _interval(resampled_macros(tasks, scores, clusters, rounds, seed))


def bootstrap_difference(
    tasks: Sequence[str],
    scores: NDArray[np.float64],
    others: NDArray[np.float64],
    clusters: Sequence[str],
    rounds: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the macro score's lead over that of `others` (N,), both on the same draws of scenes."""
    macros = (resampled_macros(tasks, values, clusters, rounds, seed) for values in (scores, others))
    return _interval(np.subtract(*macros))


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def resampled_macros(
    tasks: Sequence[str], scores: NDArray[np.float64], clusters: Sequence[str], rounds: int, seed: int
) -> NDArray[np.float64]:
    """Macro scores (rounds,) of resampled scenes; which are drawn depends on the scenes and the seed alone."""
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
    return 100 * by_group.sum(1) / np.maximum((groups_present > 0).sum(1), 1)
