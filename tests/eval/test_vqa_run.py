"""Asking a benchmark's questions: what the model is shown under each condition, and what its replies are worth."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.blind_answers import majority
from eval.conditions import Conditions, donors
from eval.qa_blind import MAJORITY
from eval.vqa_run import REPEATABLE, evaluate_vqa, require_asked, scored
from eval.vqa_summary import blind_scores, counts, lead, metrics, reply_metrics, results
from g2vlm.asking import Answer
from g2vlm.chat_model import ChatModel
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.showing import GREY
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed, InputError
from tests.eval.vqa_scenes import NUM_SCENES, NUM_VIEWS, QUESTIONS, TRAINING, Seen, benchmark, chat, load, replying

SCENES = [f"s{i}" for i in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return chat()


def shown(model: ChatModel, conditions: Conditions, limit: int | None = None) -> list[Seen]:
    with replying(model, lambda question: "A") as seen:
        evaluate_vqa(model, benchmark(), conditions, limit)
    return seen


def test_true_replies_score_everything(model: ChatModel) -> None:
    with replying(model, lambda question: question.answer) as seen:
        evaluation = evaluate_vqa(model, benchmark())
    assert evaluation.questions == QUESTIONS
    found = metrics(evaluation.questions, evaluation.scores)
    assert set(found.values()) == {100.0}
    assert {"macro", "macro_low", "choice_accuracy", "number_mra"} < set(found)
    assert {"group/object_rel_distance", "task/object_rel_distance_v1"} < set(found)
    assert len(seen) == 2 * NUM_SCENES, "a context for each scene, and one with marks"
    assert {len(context.texts) for context in seen} == {1, 3}


def test_the_majority_s_replies_score_as_the_majority(model: ChatModel) -> None:
    with replying(model, majority(TRAINING)):
        evaluation = evaluate_vqa(model, benchmark())
    record = results(evaluation, blind_scores(benchmark()), {}, "constant", {})
    own = {name: record["metrics"][name] for name in record["baselines"][MAJORITY]}
    assert own == record["baselines"][MAJORITY]
    assert 0 < own["macro"] < 100
    assert record["leads"][MAJORITY] == {"macro": 0, "low": 0, "high": 0}


def test_geometry_on_shows_the_same_views_to_both_encoders(model: ChatModel) -> None:
    seen = shown(model, Conditions())
    assert {(context.num_views, context.num_images) for context in seen} == {(NUM_VIEWS, NUM_VIEWS)}
    plain, marked = seen[:2]
    assert torch.equal(plain.views[0], marked.views[0]), "no marks for the geometry encoder"
    assert not torch.equal(plain.pixel_values, marked.pixel_values)
    assert not torch.equal(plain.views[0], seen[2].views[0])


def test_geometry_off_has_no_geometry_tokens(model: ChatModel) -> None:
    on, off = shown(model, Conditions()), shown(model, Conditions("off"))
    assert {(context.num_views, len(context.views), context.num_images) for context in off} == {(0, 0, NUM_VIEWS)}
    assert all(torch.equal(a.pixel_values, b.pixel_values) for a, b in zip(on, off, strict=True))


def test_shuffled_geometry_is_that_of_the_donor(model: ChatModel) -> None:
    on, shuffled = shown(model, Conditions()), shown(model, Conditions("shuffled"))
    views = {scene: on[2 * i].views[0] for i, scene in enumerate(SCENES)}
    whose = donors(SCENES)
    for number, (own, other) in enumerate(zip(on, shuffled, strict=True)):
        assert torch.equal(own.pixel_values, other.pixel_values)
        assert torch.equal(other.views[0], views[whose[SCENES[number // 2]]])
        assert not torch.equal(other.views[0], own.views[0])


@pytest.mark.parametrize("count", [2, 3, 7, 242])
def test_donors_are_a_fixed_derangement(count: int) -> None:
    names = [f"room-{i}" for i in range(count)]
    whose = donors(names)
    assert set(whose) == set(whose.values()) == set(names)
    assert all(scene != donor for scene, donor in whose.items())
    assert whose == donors(names)
    if count > 3:
        assert whose != donors(names, seed=1)


def test_one_scene_cannot_be_shuffled(model: ChatModel) -> None:
    with pytest.raises(InputError, match="cannot shuffle one scene"):
        evaluate_vqa(model, benchmark(), Conditions("shuffled"), limit=1)


def test_a_blind_model_is_shown_nothing_of_any_room(model: ChatModel) -> None:
    seen = shown(model, Conditions(images="blank"))
    first = seen[0]
    assert len(first.views[0].unique()) == 3, "one value per channel"
    assert all(torch.equal(context.views[0], first.views[0]) for context in seen)
    assert all(torch.equal(context.pixel_values, first.pixel_values) for context in seen)
    assert len(seen) == NUM_SCENES, "marked questions need no context of their own"
    assert {len(context.texts) for context in seen} == {4}

    marked = next(question for question in QUESTIONS if question.marks)
    room = load(marked.scene, (84, 84)).images
    context = Conditions(images="blank").context(model, room, room, marked)
    assert context.images is not None
    assert torch.equal(context.images.pixel_values, first.pixel_values)

    grey = load("s0", (84, 84))
    grey = replace(grey, images=torch.full_like(grey.images, GREY))
    with replying(model, lambda question: "A") as expected:
        evaluate_vqa(model, benchmark(lambda scene, size: grey), limit=1)
    assert torch.equal(expected[0].pixel_values, first.pixel_values)
    assert torch.equal(expected[0].views[0], first.views[0])


def test_a_real_blind_model_replies_alike_whatever_the_rooms(model: ChatModel) -> None:
    def other(scene: str, size: tuple[int, int]) -> SceneSample:
        return load(f"s{int(scene[1:]) + 50}", size)

    def replies(source, images) -> list[str]:
        evaluation = evaluate_vqa(model, benchmark(source), Conditions(images=images), limit=4, max_new_tokens=4)
        return [reply.text for reply in evaluation.replies]

    assert replies(load, "blank") == replies(other, "blank")
    assert replies(load, "shown") != replies(other, "shown")


def test_impossible_conditions() -> None:
    for wrong in ({"geometry": "of"}, {"images": "black"}, {"geometry": "shuffled", "images": "blank"}):
        with pytest.raises(InputError):
            Conditions(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_limit_counts_questions(model: ChatModel) -> None:
    with replying(model, lambda question: question.answer):
        evaluation = evaluate_vqa(model, benchmark(), limit=6)
    assert evaluation.questions == QUESTIONS[:6]
    record = results(evaluation, blind_scores(benchmark(), 6), {}, "m", {})
    assert record["benchmark"] == "made-up (modified: limit 6)"
    assert record["count"] == 6


def test_what_cannot_be_asked_is_skipped_with_its_reason(model: ChatModel) -> None:
    def broken(scene: str, size: tuple[int, int]) -> SceneSample:
        if scene == "s2":
            raise InputError("no such room", "lost")
        return load(scene, size)

    with replying(model, lambda question: question.answer):
        evaluation = evaluate_vqa(model, benchmark(broken))
        nowhere = evaluate_vqa(replace(model, max_context=60), benchmark())
    lost = [question.id for question in QUESTIONS if question.scene == "s2"]
    assert [skipped.item for skipped in evaluation.skipped] == lost
    assert "no such room" in evaluation.skipped[0].reason
    assert "\n" not in evaluation.skipped[0].reason
    assert len(evaluation.replies) == len(QUESTIONS) - len(lost)
    assert len(nowhere.skipped) == len(QUESTIONS)
    assert "do not fit into the context" in nowhere.skipped[0].reason
    record = results(nowhere, blind_scores(benchmark()), {}, "m", {})
    assert record["metrics"] == {}
    assert record["leads"] == {}
    with pytest.raises(CheckFailed, match="no question could be asked"):
        require_asked(nowhere)


def test_a_question_too_long_is_skipped_alone(model: ChatModel) -> None:
    long = replace(QUESTIONS[1], question="word " * 4000)
    questions = [QUESTIONS[0], long, QUESTIONS[2]]
    asked = replace(benchmark(), questions=lambda: questions)
    with replying(model, lambda question: question.answer):
        evaluation = evaluate_vqa(model, asked)
    assert evaluation.questions == [QUESTIONS[0], QUESTIONS[2]]
    assert [skipped.item for skipped in evaluation.skipped] == [long.id]


def test_shares_of_replies() -> None:
    choice, number = QUESTIONS[1], QUESTIONS[0]
    said = [
        scored(choice, Answer("", "A", (5,), "eos", 0.0)),
        scored(number, Answer("", "the the the", (7,) * REPEATABLE, "length", 0.0)),
        scored(number, Answer("", "3 m", (7,) * (REPEATABLE - 1), "eos", 0.0)),
        scored(choice, Answer("", " A", tuple(range(16)), "length", 0.0)),
    ]
    assert [reply.repetitive for reply in said] == [False, True, False, False]
    assert reply_metrics(said) == {"of_form": 50, "cut": 50, "repetitive": 25}
    assert [reply.score for reply in said] == [float(choice.answer == "A"), 0, 0, 0], "as the official rule"


def test_scores_of_kinds_and_counts() -> None:
    questions: list[Question] = QUESTIONS[:4]
    found = metrics(questions, np.array([0.5, 1.0, 0.0, 0.3]))
    assert found["choice_accuracy"] == 50
    assert found["number_mra"] == pytest.approx(40)
    assert found["group/object_rel_distance"] == 50
    assert found["macro"] == pytest.approx((50 + 50 + 30) / 3)
    assert counts(questions)["group/object_rel_distance"] == 2
    assert lead(questions, np.ones(4), np.zeros(4)) == {"macro": 100, "low": 100, "high": 100}
