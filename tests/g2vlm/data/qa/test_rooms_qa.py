"""Questions over rooms: the source, its balance, the held-out set, marks, and the contact sheet."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from g2vlm.data.qa import heldout_v1 as fixed
from g2vlm.data.qa.balance import MANY, Balance, cell, measure
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.marks import draw_marks
from g2vlm.data.qa.preview import question_sheet, varied_items
from g2vlm.data.qa.question import Mark, Question
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.selection import QUOTA, VARIANT_QUOTA, preferences, quota, select
from g2vlm.data.qa.source import RoomsQA, is_told
from g2vlm.data.qa.tasks import TASKS, group
from g2vlm.data.rooms.scene import FIXTURES
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError

REQUEST = ViewRequest(3, (42, 56), 3)


def number(answer: str, task: str = "object_abs_distance") -> Question:
    return Question("", "s", task, "", (), answer, "number")


# The source.


def test_equal_requests_give_equal_questions() -> None:
    first, again = (RoomsQA().load(4, REQUEST, count=5) for _ in range(2))
    assert first.questions == again.questions
    assert len({question.task for question in first.questions}) == 5
    assert first.sample.scene == first.questions[0].scene
    assert RoomsQA().load(4, REQUEST, count=2).questions == first.questions[:2]


def test_other_scenes_seeds_and_requests_give_other_questions() -> None:
    loads = [
        RoomsQA().load(4, REQUEST, 4),
        RoomsQA().load(5, REQUEST, 4),
        RoomsQA(seed=1).load(4, REQUEST, 4),
        RoomsQA(split="heldout").load(4, REQUEST, 4),
        RoomsQA().load(4, ViewRequest(3, (42, 56), 4), 4),
    ]
    assert len({load.questions for load in loads}) == 5
    assert len({load.sample.scene for load in loads}) == 4


def test_training_never_sees_a_held_out_scene() -> None:
    held_out = {question.scene for question in fixed.questions()}
    for name in held_out:
        with pytest.raises(InputError, match="split"):
            RoomsQA(split="train", seed=2**16 - 1).rooms.index(name)
        with pytest.raises(InputError, match="split"):
            RoomsQA(split="heldout", seed=0).rooms.index(name)


def test_a_scene_s_name_leads_back_to_it() -> None:
    rooms = fixed.source().rooms
    assert rooms.index(rooms.scene(17).name) == 17
    for name in ("rooms-", "rooms-x", "room-000000000001", "rooms-000000000001"):
        with pytest.raises(InputError, match="no scene of that name"):
            rooms.index(name)


def test_what_a_thing_is_does_not_tell_its_size_or_height() -> None:
    _, found = RoomsQA(cameras="wide").candidates(0, ViewRequest(4, (84, 84), 0))
    for task in ("object_size_estimation", "obj_obj_relative_pos_ud"):
        assert not any(set(question.categories) & set(FIXTURES) for question in found.get(task, []))
    assert is_told(Question("", "", "object_size_estimation", "", (), "203", "number", ("door",)))
    assert not is_told(Question("", "", "object_abs_distance", "", (), "2.0", "number", ("door", "bed")))


# Balance.


def test_frequent_answers_are_kept_less_often() -> None:
    offers = [{"object_abs_distance": [number("2.0")]}] * 90 + [{"object_abs_distance": [number("0.5")]}] * 10
    balance = measure(offers)
    kept = Counter(
        q.answer for k, scene in enumerate(offers) if (q := balance.pick(scene["object_abs_distance"], stream(k)))
    )
    assert kept["0.5"] == 10
    assert 10 < kept["2.0"] < 40
    assert balance.available["object_abs_distance"] == pytest.approx(0.325, abs=0.1)


def test_rare_tasks_are_chosen_first() -> None:
    balance = Balance({"rare": 0.1, "usual": 1.0}, {})
    chosen = Counter(balance.tasks(["usual", "rare"], 1, stream(k))[0] for k in range(300))
    assert 0.86 < chosen["rare"] / 300 < 0.96


def test_cells_are_ranges_of_numbers() -> None:
    assert cell(number("2.0")) == cell(number("2.2")) != cell(number("2.6"))
    assert cell(number("4", "object_counting")) == "4"
    assert cell(number("9", "object_counting")) == f"{MANY} or more"


def test_the_standard_table_knows_every_task() -> None:
    balance = Balance.standard()
    assert set(balance.cells) == set(balance.available) == set(TASKS)
    assert all(max(cells.values()) == 1 for cells in balance.cells.values())
    assert all(0 < share <= 1 for share in balance.available.values())


# rooms-qa-heldout-v1.


def test_held_out_file_is_fixed() -> None:
    assert fixed.digest() == fixed.DIGEST


def test_held_out_size_and_ids() -> None:
    questions = fixed.questions()
    assert len(questions) >= 1000
    assert len({question.id for question in questions}) == len(questions)
    assert len({question.scene for question in questions}) >= 200
    counts = Counter(question.task for question in questions)
    assert set(counts) == set(TASKS)
    for task, count in counts.items():
        assert 0.85 * quota(task) <= count <= quota(task)
    assert {quota(task) for task in TASKS} == {QUOTA, VARIANT_QUOTA}


def test_held_out_answers_and_letters_are_even() -> None:
    by_task: dict[str, list[Question]] = {}
    for question in fixed.questions():
        by_task.setdefault(question.task, []).append(question)
    for task, questions in by_task.items():
        cells = Counter(cell(question) for question in questions)
        if questions[0].kind == "choice":
            letters = Counter(question.answer for question in questions)
            assert max(letters.values()) - min(letters.values()) <= 1, task
            assert len(letters) == len(questions[0].options)
            assert max(cells.values()) - min(cells.values()) <= 1, task
        else:
            assert max(cells.values()) <= 1.75 * len(questions) / len(cells), task


def test_held_out_objects_are_no_more_often_right_than_by_chance() -> None:
    excess: Counter[tuple[str, str]] = Counter()
    for question in fixed.questions():
        for name, change in preferences(question).items():
            excess[question.task, name] += change
    assert max(map(abs, excess.values())) <= 1 + 1e-9


def test_held_out_questions_are_what_the_generators_ask() -> None:
    """The first scenes again, from their seeds: nothing that they offer has changed."""
    source, questions = fixed.source(), fixed.questions()
    names = list(dict.fromkeys(question.scene for question in questions))[:6]
    for name in names:
        _, offered = source.candidates(source.rooms.index(name), fixed.request())
        again = {question.id: question for items in offered.values() for question in items}
        for question in questions:
            if question.scene == name:
                assert again[question.id] == question


def test_held_out_scenes_come_once_with_all_their_questions() -> None:
    asked = fixed.heldout((28, 28))
    first, second = next(asked), next(asked)
    assert first.sample.scene == first.questions[0].scene != second.sample.scene
    assert first.sample.images.shape == (4, 3, 28, 28)
    expected = [question for question in fixed.questions() if question.scene == first.sample.scene]
    assert list(first.questions) == expected


def test_another_size_shows_the_same_facts() -> None:
    source = fixed.source()
    small, large = (source.rooms.load(1, fixed.request(size)) for size in ((84, 84), (168, 168)))
    first, second = (room_facts(source.rooms.scene(1), sample) for sample in (small, large))
    for a, b in zip(first.frames, second.frames, strict=True):
        assert np.array_equal(a.cam_to_world, b.cam_to_world)
        shares = [{s.instance: s.share for s in frame.sightings} for frame in (a, b)]
        for instance in set(shares[0]) & set(shares[1]):
            assert shares[0][instance] == pytest.approx(shares[1][instance], abs=0.01)


def test_selection_takes_even_answers_letters_and_scenes() -> None:
    def pair(scene: int, index: int, answer: str, letter: str) -> Question:
        options = ("A. Near", "B. Far") if (answer == "Near") == (letter == "A") else ("A. Far", "B. Near")
        text, categories = f"{scene}-{index}", ("bed", f"tv{scene}")
        return Question(text, str(scene), "obj_obj_relative_pos_nf", "", options, letter, "choice", categories)

    offers = [
        {
            "obj_obj_relative_pos_nf": [
                pair(s, k, "Near" if (s + k) % 4 else "Far", "AB"[(s // 2 + k) % 2]) for k in range(4)
            ]
        }
        for s in range(200)
    ]
    table = Balance({}, {"obj_obj_relative_pos_nf": {"Near": 1.0, "Far": 0.4}})
    chosen = select(offers, table)
    assert len(chosen) == VARIANT_QUOTA == len({question.scene for question in chosen})
    assert Counter(question.answer_text for question in chosen) == {"Near": 12, "Far": 12}
    assert Counter(question.answer for question in chosen) == {"A": 12, "B": 12}


def test_groups_cover_the_tasks() -> None:
    assert len({group(task) for task in TASKS}) == 13


# Marks and pictures.


def test_a_mark_is_a_red_dot_where_it_should_be_and_nowhere_else() -> None:
    images = np.full((3, 40, 60, 3), 90, np.uint8)
    drawn = draw_marks(images, [Mark(1, 0.25, 0.75)])
    assert (images == 90).all()
    assert (drawn[[0, 2]] == images[[0, 2]]).all()
    changed = np.argwhere((drawn[1] != 90).any(-1))
    assert np.allclose(changed.mean(0), (0.75 * 40 - 0.5, 0.25 * 60 - 0.5), atol=0.3)
    red, green, blue = drawn[1, 30, 15].astype(int)
    assert red > 200 > 120 > max(green, blue)
    assert 4 <= len(changed) <= 30
    assert draw_marks(images, []) is images


def test_marks_near_the_border_and_on_large_images() -> None:
    images = np.zeros((1, 210, 280, 3), np.uint8)
    drawn = draw_marks(images, [Mark(0, 0.0, 0.0), Mark(0, 0.5, 0.5)])
    assert tuple(drawn[0, 0, 0]) == tuple(drawn[0, 105, 140]) == (255, 0, 0)


def test_a_sheet_of_questions() -> None:
    scenes = list(islice(fixed.heldout((42, 42)), 2))
    items = varied_items(scenes, 6)
    assert [sample for sample, _ in items] == [scenes[k % 2].sample for k in range(6)]
    assert len({question.task for _, question in items}) == 6
    assert all(sample.scene == question.scene for sample, question in items)
    sheet = question_sheet(items)
    assert sheet.width == 1680
    assert sheet.height > 6 * 300


def test_every_held_out_number_is_positive() -> None:
    for question in fixed.questions():
        if question.kind == "number":
            assert math.isfinite(float(question.answer))
            assert float(question.answer) > 0
