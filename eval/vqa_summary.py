"""Scores of replies: by task, their average, and a model's lead over what it is compared with.

All systems are scored on the same N questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks import Benchmark
from eval.conditions import SHUFFLE_SEED
from eval.qa_scoring import aggregate, bootstrap_difference, bootstrap_macro, score_reply
from eval.records import ITEMS
from eval.vqa_run import Reply, VqaEvaluation
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.tasks import group

Scores = NDArray[np.float64]
SCORING = "first word: letters equal, numbers by mean relative accuracy (VSI-Bench); variants, then tasks averaged"
GROUP, TASK = "group/", "task/"


def metrics(questions: Sequence[Question], scores: Scores) -> dict[str, float]:
    """Percentages of one system; nothing without questions.

    `macro` with its 95 % interval `macro_low`, `macro_high` over scenes; `choice_accuracy` and `number_mra` over all
    questions of a kind; `group/NAME` of each task and `task/NAME` of each variant.

    Args:
        questions: N.
        scores: (N,) in [0, 1].
    """
    if not questions:
        return {}
    tasks, scenes = [q.task for q in questions], [q.scene for q in questions]
    averages = aggregate(tasks, scores)
    low, high = bootstrap_macro(tasks, scores, scenes)
    found = {"macro": averages.macro, "macro_low": low, "macro_high": high}
    for name, kind in (("choice_accuracy", "choice"), ("number_mra", "number")):
        own = scores[[q.kind == kind for q in questions]]
        found |= {name: 100 * float(own.mean())} if len(own) else {}
    groups = {GROUP + name: value for name, value in averages.groups.items()}
    return found | groups | {TASK + name: value for name, value in averages.tasks.items()}


def reply_metrics(replies: Sequence[Reply]) -> dict[str, float]:
    """Shares of a model's replies in percent: of the asked form, cut at the limit of tokens, repetitive."""
    names = ("of_form", "cut", "repetitive") if replies else ()
    return {name: 100 * float(np.mean([getattr(reply, name) for reply in replies])) for name in names}


def lead(questions: Sequence[Question], scores: Scores, others: Scores) -> dict[str, float]:
    """By how many points one macro score is above another's, with the 95 % interval over the same draws of scenes."""
    tasks, scenes = [q.task for q in questions], [q.scene for q in questions]
    low, high = bootstrap_difference(tasks, scores, others, scenes)
    return {"macro": aggregate(tasks, scores).macro - aggregate(tasks, others).macro, "low": low, "high": high}


def blind_scores(benchmark: Benchmark, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Scores of the benchmark's blind answerers: by name, by the question's id."""
    questions = benchmark.questions()[:limit]
    return {
        name: {q.id: score_reply(q.kind, answer(q), q.answer) for q in questions}
        for name, answer in benchmark.baselines().items()
    }


def results(
    evaluation: VqaEvaluation,
    blind: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, float]],
    model: str,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        evaluation: the model's replies.
        blind: scores of blind answerers by name and question.
        compared: scores of earlier runs by name and question.
        model: what to call the model.
        provenance: checkpoint and commit; equal runs have equal ones, so that equal runs write equal files.
    """
    questions = evaluation.questions
    columns = {name: np.array([own[q.id] for q in questions]) for name, own in {**blind, **compared}.items()}
    told = {name: metrics(questions, scores) for name, scores in columns.items()}
    leads = {name: lead(questions, evaluation.scores, scores) for name, scores in columns.items()} if questions else {}
    return {
        "benchmark": label(evaluation),
        "protocol": protocol_record(evaluation),
        "model": model,
        "count": len(questions),
        "items": counts(questions),
        "skipped": [asdict(skipped) for skipped in evaluation.skipped],
        "metrics": metrics(questions, evaluation.scores) | reply_metrics(evaluation.replies),
        "baselines": {name: told[name] for name in blind},
        "compared": {name: told[name] for name in compared},
        "leads": leads,
        "per_item": ITEMS,
        "provenance": dict(provenance),
    }


def label(evaluation: VqaEvaluation) -> str:
    """The benchmark's name, with what was modified."""
    changed = "" if evaluation.limit is None else f" (modified: limit {evaluation.limit})"
    return evaluation.benchmark.name + changed


def counts(questions: Sequence[Question]) -> dict[str, int]:
    """Questions of each task and variant, named as metrics are."""
    names = [name for q in questions for name in (GROUP + group(q.task), TASK + q.task)]
    return {name: names.count(name) for name in sorted(set(names))}


def protocol_record(evaluation: VqaEvaluation) -> dict[str, Any]:
    """Everything that decides whether two numbers can be compared, and what the model was shown."""
    benchmark, conditions = evaluation.benchmark, evaluation.conditions
    seed = {"shuffle_seed": SHUFFLE_SEED} if conditions.geometry == "shuffled" else {}
    return {
        "name": benchmark.name,
        "about": benchmark.about,
        "questions_sha256": benchmark.digest,
        "num_views": benchmark.num_views,
        "view_size": [*evaluation.size],
        **asdict(conditions),
        **seed,
        "decoding": "greedy",
        "max_new_tokens": evaluation.max_new_tokens,
        "scoring": SCORING,
        "modified": {} if evaluation.limit is None else {"limit": evaluation.limit},
    }


def item_line(reply: Reply, blind: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A reply's line of `items.jsonl`, with the scores that blind answerers have for the question."""
    question = reply.question
    return {
        "id": question.id,
        "scene": question.scene,
        "task": question.task,
        "kind": question.kind,
        "prompt": question.words,
        "reply": reply.text,
        "answer": question.answer,
        "score": reply.score,
        "num_tokens": reply.num_tokens,
        "cut": reply.cut,
        "of_form": reply.of_form,
        "repetitive": reply.repetitive,
        "baselines": {name: scores[question.id] for name, scores in blind.items()},
    }
