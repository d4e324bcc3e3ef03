"""What a model is asked, word for word, and files of questions."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from g2vlm.data.qa.question import Mark, Question, read_questions, write_questions
from g2vlm.errors import InputError

CHOICE = Question(
    id="room/object_rel_direction_easy/0",
    scene="room",
    task="object_rel_direction_easy",
    question="If I am standing by the bed and facing the tv, is the bin to the left or the right of the tv?",
    options=("A. right", "B. left"),
    answer="B",
    kind="choice",
    categories=("bed", "tv", "bin"),
)
NUMBER = Question(
    "room/point_depth/1", "room", "point_depth", "How deep?", (), "1.5", "number", (), (Mark(2, 0.5, 0.25),)
)


def test_prompts_word_for_word() -> None:
    assert CHOICE.prompt(2) == (
        "These are frames of a video.\nframe 1 of 2: <image>\nframe 2 of 2: <image>\n"
        "If I am standing by the bed and facing the tv, is the bin to the left or the right of the tv?\n"
        "Options:\nA. right\nB. left\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert NUMBER.words == "How deep?\nPlease answer the question using a single word or phrase."
    assert NUMBER.prompt(0) == f"These are frames of a video.\n{NUMBER.words}"


def test_answer_texts() -> None:
    assert CHOICE.answer_text == "left"
    assert NUMBER.answer_text == "1.5"


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write_questions(path, [CHOICE, NUMBER])
    assert read_questions(path) == [CHOICE, NUMBER]
    assert len(path.read_text().splitlines()) == 2


BAD_LINES = {
    "not json": "{",
    "a list": "[]",
    "a field less": json.dumps({k: v for k, v in asdict(CHOICE).items() if k != "answer"}),
    "a field more": json.dumps({**asdict(CHOICE), "colour": "red"}),
    "no such letter": json.dumps(asdict(replace(CHOICE, answer="C"))),
    "two letters": json.dumps(asdict(replace(CHOICE, answer="AB"))),
    "no number": json.dumps(asdict(replace(NUMBER, answer="far"))),
    "no such kind": json.dumps({**asdict(CHOICE), "kind": "essay"}),
    "a number as text": json.dumps({**asdict(CHOICE), "question": 3}),
    "a bad mark": json.dumps({**asdict(NUMBER), "marks": [{"view": 1}]}),
    "no options but null": json.dumps({**asdict(CHOICE), "options": None}),
}


@pytest.mark.parametrize("name", sorted(BAD_LINES))
def test_bad_lines_are_refused_with_their_number(tmp_path: Path, name: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(asdict(CHOICE)) + "\n" + BAD_LINES[name] + "\n")
    with pytest.raises(InputError, match=r"questions\.jsonl:2"):
        read_questions(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        read_questions(tmp_path / "nothing.jsonl")
