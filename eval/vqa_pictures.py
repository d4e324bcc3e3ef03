"""A few questions to look at: the views, the question, what the model replied and what is true."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.records import write_text
from eval.vqa_run import Reply, VqaEvaluation
from g2vlm.data.qa.preview import question_sheet, varied_items
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.source import AskedScene
from geometry.io.common import atomic_file

TRANSCRIPT, SHEET = "transcript.md", "transcript.png"


def write_transcript(evaluation: VqaEvaluation, count: int, record: Mapping[str, Any], folder: Path) -> None:
    """Write `transcript.png`, a sheet of at most `count` questions of different tasks, and their words as Markdown."""
    replies = {reply.question.id: reply for reply in evaluation.replies}
    chosen = varied_items(spread(evaluation, count), count)
    said = {question.id: told(replies[question.id]) for _, question in chosen}
    with atomic_file(folder / SHEET) as file:
        question_sheet(chosen, said).save(file, format="PNG")
    lines = [f"# {record['benchmark']}", "", f"Model: {record['model']}; views as the scenes are.", "", f"![]({SHEET})"]
    for _, question in chosen:
        lines += ["", *_words(question, replies[question.id])]
    write_text(folder / TRANSCRIPT, "\n".join([*lines, ""]))


def spread(evaluation: VqaEvaluation, count: int) -> list[AskedScene]:
    """At most `count` scenes, evenly spread, with their views and the questions that were asked about them."""
    by_scene: dict[str, list[Question]] = {}
    for question in evaluation.questions:
        by_scene.setdefault(question.scene, []).append(question)
    names = list(by_scene)
    chosen = [names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))]
    return [AskedScene(evaluation.benchmark.load(name, evaluation.size), tuple(by_scene[name])) for name in chosen]


def told(reply: Reply) -> str:
    """A reply on one line, and its score in percent."""
    text = " ".join(reply.text.split()) or "(nothing)"
    return f"model: {text}   |   score {100 * reply.score:.0f}"


def _words(question: Question, reply: Reply) -> Sequence[str]:
    truth = f"{question.answer}. {question.answer_text}" if question.options else question.answer
    lines = [*question.question.splitlines(), *question.options]
    asked = [f"> {line}  " for line in lines]
    return [f"## {question.task}, {question.scene}", "", *asked, "", f"True: {truth}  ", f"Reply: `{reply.text!r}`"]
