"""Blind baselines, averages and intervals on made-up questions."""

import numpy as np
import pytest

from eval.blind_answers import best_constant, by_categories, majority, random_answers
from eval.qa_scoring import (
    aggregate,
    bootstrap_difference,
    bootstrap_macro,
    is_of_form,
    mean_relative_accuracy,
    score_replies,
    score_reply,
)
from g2vlm.data.qa.question import Question


def number(answer: str, task: str = "point_depth", categories: tuple[str, ...] = ()) -> Question:
    return Question("", "s", task, "", (), answer, "number", categories)


def choice(options: tuple[str, ...], answer: str, task: str = "obj_obj_relative_pos_nf") -> Question:
    texts = tuple(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False))
    return Question("", "s", task, "", texts, answer, "choice", options)


@pytest.mark.parametrize(
    ("prediction", "score"), [(1.0, 1.0), (1.05, 1.0), (1.06, 0.9), (0.75, 0.6), (1.5, 0.1), (1.51, 0.0), (0.0, 0.0)]
)
def test_mean_relative_accuracy_of_one(prediction: float, score: float) -> None:
    assert mean_relative_accuracy(prediction, 1.0) == pytest.approx(score)


@pytest.mark.parametrize("reply", ["nan", "inf", "", "about 2", "two"])
def test_what_is_no_number_scores_nothing(reply: str) -> None:
    assert score_reply("number", reply, "2") == 0


def test_the_best_constant_is_better_than_every_other() -> None:
    answers = ["1", "1", "3", "3.2", "3.4", "9"]
    chosen = float(best_constant(answers))
    worth = {x: np.mean([mean_relative_accuracy(x, float(a)) for a in answers]) for x in (1.0, 3.0, 3.2, 3.4, 9.0)}
    assert worth[chosen] == max(worth.values())
    assert chosen == pytest.approx(3.2)


def test_majorities_by_task_and_by_categories() -> None:
    training = [number("2", categories=("bed",))] * 6 + [number("5", categories=("tv",))] * 9
    assert majority(training)(number("?", categories=("bed",))) == "5"
    assert majority(training, by_categories)(number("?", categories=("bed",))) == "2"
    assert majority(training, by_categories)(number("?", categories=("rug",))) == "5"


def test_majorities_of_choices_follow_words_not_letters() -> None:
    training = (
        [choice(("Near", "Far"), "B")] * 6 + [choice(("Far", "Near"), "A")] * 3 + [choice(("Near", "Far"), "A")] * 4
    )
    answer = majority(training)
    assert answer(choice(("Near", "Far"), "A")) == "B"
    assert answer(choice(("Far", "Near"), "A")) == "A"


def test_an_object_that_is_often_right_is_preferred() -> None:
    training = [choice(("bed", "tv", "bin"), "A")] * 5 + [choice(("rug", "tv", "bin"), "B")] * 5
    assert majority(training)(choice(("bin", "rug", "bed"), "A")) == "C"


def test_unknown_tasks_get_an_answer() -> None:
    assert majority([])(choice(("a", "b"), "A")) == "A"
    assert float(majority([])(number("3"))) > 0


def test_random_answers_are_letters_of_the_question_or_numbers_of_the_task() -> None:
    answer = random_answers([number("2.5"), number("7", task="camera_displacement")], seed=0)
    replies = {answer(choice(("a", "b", "c"), "A")) for _ in range(60)}
    assert replies == {"A", "B", "C"}
    assert answer(number("1")) == "2.5"


def test_variants_are_averaged_before_tasks() -> None:
    tasks = ["object_rel_direction_easy"] * 3 + ["object_rel_direction_hard", "object_counting"]
    scores = aggregate(tasks, np.array([1.0, 1.0, 1.0, 0.0, 1.0]))
    assert scores.groups == {"object_rel_direction": 50.0, "object_counting": 100.0}
    assert scores.macro == 75.0


def test_the_interval_holds_the_macro_score_and_shrinks_with_scenes() -> None:
    generator = np.random.default_rng(1)

    def interval(count: int) -> tuple[float, float]:
        tasks = ["object_counting", "point_depth"] * count
        scores, scenes = (generator.random(2 * count) < 0.6).astype(float), [f"s{k // 4}" for k in range(2 * count)]
        low, high = bootstrap_macro(tasks, scores, scenes)
        assert low < aggregate(tasks, scores).macro < high
        return low, high

    (few_low, few_high), (many_low, many_high) = interval(40), interval(640)
    assert many_high - many_low < 0.5 * (few_high - few_low)


def test_questions_about_one_scene_are_drawn_together() -> None:
    """Ten scenes whose questions all agree are ten draws, however many questions there are."""
    scores, scenes = np.repeat([0.0, 1.0], 500), [f"s{k // 100}" for k in range(1000)]
    low, high = bootstrap_macro(["object_counting"] * 1000, scores, scenes)
    assert high - low > 40


def test_scores_need_a_reply_for_every_question() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_replies([number("1")], [])


def test_the_lead_is_drawn_over_the_same_scenes() -> None:
    """Two systems that differ by the same everywhere differ by it in every resample, however the scenes vary."""
    generator = np.random.default_rng(3)
    scores, scenes = generator.random(200), [f"s{k // 4}" for k in range(200)]
    tasks = ["object_counting", "point_depth"] * 100
    assert bootstrap_difference(tasks, scores, scores - 0.25, scenes) == pytest.approx((25, 25))
    low, high = bootstrap_macro(tasks, scores, scenes)
    assert high - low > 5


def test_replies_of_the_asked_form() -> None:
    asked = choice(("a", "b"), "A")
    assert [is_of_form(asked, reply) for reply in ("b", "A.", "C", "the A", "")] == [True, True, False, False, False]
    assert [is_of_form(number("1"), reply) for reply in ("2.5 m", "two", "")] == [True, False, False]
