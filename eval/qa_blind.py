"""What answers are worth that never look: `python -m eval.qa_blind` prints the table for rooms-qa-heldout-v1."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from eval.blind_answers import Answerer, by_any_category, by_categories, majority, random_answers
from eval.qa_scoring import Scores, aggregate, bootstrap_macro, score_replies
from g2vlm.data.qa import heldout_v1
from g2vlm.data.qa.balance import Balance
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.source import RoomsQA, sweep

RANDOM_SEED = 0
NUM_TRAINING = 350
RANDOM, MAJORITY, BY_CATEGORIES, BY_SET = "random", "majority", "by categories", "by set"
BASELINES = {
    RANDOM: "a letter, or the number of a training question of the task, drawn at random",
    MAJORITY: "the best constant answer of the task among training questions",
    BY_CATEGORIES: "the best constant answer of the task and the objects that the question names, in their order",
    BY_SET: "the same, in whatever order it names them",
}


def baselines(training: Sequence[Question]) -> dict[str, Answerer]:
    """Answerers by name, fitted on training questions; their replies depend on the order of the questions."""
    return {
        RANDOM: random_answers(training, RANDOM_SEED),
        MAJORITY: majority(training),
        BY_CATEGORIES: majority(training, by_categories),
        BY_SET: majority(training, by_any_category),
    }


def training_questions(num_scenes: int, seed: int = 0) -> list[Question]:
    """Candidates of training rooms, not thinned: more of them, and with the same preferences."""
    offers = sweep(RoomsQA(seed=seed), heldout_v1.request(), range(num_scenes))
    return [question for _, found in offers for items in found.values() for question in items]


def thinned(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Questions with the answers' frequencies of training: each kept with its probability in the table."""
    balance, generator = Balance.standard(), np.random.default_rng(seed)
    return [question for question in questions if generator.random() < balance.keep(question)]


def blind_table(training: Sequence[Question], questions: Sequence[Question]) -> str:
    """One line per task and variant, one column per baseline; the last lines are the macro score and its interval."""
    tasks, scenes = [q.task for q in questions], [q.scene for q in questions]
    columns: dict[str, Scores] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name, answer in baselines(training).items():
        scores = score_replies(questions, [answer(question) for question in questions])
        columns[name] = aggregate(tasks, scores)
        intervals[name] = bootstrap_macro(tasks, scores, scenes)
    counts = Counter(tasks)
    lines = ["| task | items | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for task, count in sorted(counts.items()):
        cells = {name: f"{scores.tasks[task]:.1f}" for name, scores in columns.items()}
        lines += [_line(task, count, cells)]
    lines.append(_line("macro", len(questions), {name: f"{s.macro:.1f}" for name, s in columns.items()}))
    bounds = {name: f"{low:.1f} to {high:.1f}" for name, (low, high) in intervals.items()}
    return "\n".join([*lines, _line("95 % interval", len(set(scenes)), bounds)])


def _line(name: str, count: int, cells: Mapping[str, str]) -> str:
    return f"| {name} | {count} | " + " | ".join(cells.values()) + " |"


def main() -> None:
    """Fit on training rooms, score on the held-out questions, print."""
    parser = argparse.ArgumentParser(prog="python -m eval.qa_blind", description=__doc__)
    parser.add_argument("--scenes", type=int, default=NUM_TRAINING, help="training rooms to fit the baselines on")
    args = parser.parse_args()
    print(blind_table(thinned(training_questions(args.scenes)), heldout_v1.questions()))


if __name__ == "__main__":
    main()
