"""A question about a scene, what a model is asked, and files of questions.

Formats: VLM-3R's data and VSI-Bench (spatial QA, section "QA generation").
"""

import json
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from g2vlm.errors import InputError
from g2vlm.prompts import PLACEHOLDER
from geometry.io.common import atomic_file

Kind = Literal["choice", "number"]

PRE_PROMPT = "These are frames of a video.\n"
POST_PROMPTS: dict[Kind, str] = {
    "number": "Please answer the question using a single word or phrase.",
    "choice": "Answer with the option's letter from the given choices directly.",
}


@dataclass(frozen=True)
class Mark:
    """A red dot on one view, drawn on the semantic encoder's copy alone.

    Args:
        view: number of the view, from 0.
        x, y: shares of the image's width and height, 0 and 1 at its outer edges.
    """

    view: int
    x: float
    y: float


@dataclass(frozen=True)
class Question:
    """One item, independent of media.

    Args:
        id: unique within a set.
        scene: name of the scene.
        task: a key of `g2vlm.data.qa.tasks.TASKS`.
        question: as asked, without options.
        options: "A. table", ...; empty for numbers.
        answer: text of the number, or the letter.
        kind: choice or number.
        categories: of the objects that the question names, in its order.
        marks: dots that the question speaks of.
    """

    id: str
    scene: str
    task: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: Kind
    categories: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()

    @property
    def words(self) -> str:
        """What is asked, with its options."""
        options = "\nOptions:\n" + "\n".join(self.options) if self.options else ""
        return f"{self.question}{options}\n{POST_PROMPTS[self.kind]}"

    @property
    def open_words(self) -> str:
        """What is asked, to be answered with `answer_text`."""
        return f"{self.question}\n{POST_PROMPTS['number']}"

    def prompt(self, num_views: int) -> str:
        """What the model is asked about some views, each in the place that bears its number."""
        return opening(num_views, self.words)

    @property
    def answer_text(self) -> str:
        """The right option's words, or the number."""
        return self.answer if self.kind == "number" else option_text(self.options[letters().index(self.answer)])


def opening(num_views: int, words: str) -> str:
    """Some views, each in the place that bears its number, and what is asked first."""
    return f"{PRE_PROMPT}{placed_frames(num_views)}{words}"


def frame_name(number: int, count: int) -> str:
    """How a question names a frame (from 0)."""
    return f"frame {number + 1} of {count}"


def placed_frames(count: int) -> str:
    """A line with the number and the place of every frame."""
    return "".join(f"{frame_name(k, count)}: {PLACEHOLDER}\n" for k in range(count))


def letters() -> str:
    """A, B, ..."""
    return string.ascii_uppercase


def option_text(option: str) -> str:
    """An option without its letter."""
    return option.split(". ", 1)[1]


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """One JSON object a line; the file appears when all is written."""
    with atomic_file(path) as file:
        for question in questions:
            file.write((json.dumps(asdict(question)) + "\n").encode())


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        InputError: it cannot be read, or a line is not a question; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read questions  {path}", str(error), "check the path") from error
    return [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(path: Path, number: int, line: str) -> Question:
    try:
        return question_from(json.loads(line))
    except (ValueError, TypeError, KeyError) as error:
        what = f"bad question  {path}:{number}"
        raise InputError(what, str(error), "each line is one question as JSON") from error


def question_from(record: Any) -> Question:
    """A question from what `json` read.

    Raises:
        ValueError: a field is missing, unknown or not what it should be.
    """
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    known = {field.name for field in fields(Question)}
    if wrong := sorted(set(record) - known) or sorted(known - set(record) - {"categories", "marks"}):
        raise ValueError(f"unknown or missing field {wrong[0]}")
    for name in ("id", "scene", "task", "question", "answer"):
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is not a text")
    if record["kind"] not in get_args(Kind):
        raise ValueError(f"kind is {record['kind']!r}, not choice or number")
    lists = {name: tuple(record.get(name, ())) for name in ("options", "categories")}
    marks = tuple(Mark(**mark) for mark in record.get("marks", ()))
    question = Question(**{**record, **lists, "marks": marks})
    _check_answer(question)
    return question


def _check_answer(question: Question) -> None:
    if question.kind == "number":
        float(question.answer)
    elif question.answer not in letters()[: len(question.options)] or len(question.answer) != 1:
        raise ValueError(f"answer {question.answer!r} is not the letter of an option")
