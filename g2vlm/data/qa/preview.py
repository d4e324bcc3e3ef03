"""A contact sheet of questions: the views, with marks, and below them question, options and true answer."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from g2vlm.data.qa.marks import draw_marks
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.source import AskedScene
from g2vlm.data.qa.tasks import group
from g2vlm.data.types import SceneSample
from g2vlm.preview import GAP, INK, MARGIN, MUTED, PAGE, WIDTH, font, stack

VIEW_WIDTH = 300  # pixels of a view; at most this, and five in a row
LINE = 26
CHARACTERS = 150  # of a line
GREEN, BLUE = (20, 110, 60), (38, 84, 160)


def question_sheet(
    items: Iterable[tuple[SceneSample, Question]], replies: Mapping[str, str] | None = None
) -> Image.Image:
    """One picture, 1680 pixels wide: a block per question, with a line about the reply to it where there is one.

    Args:
        items: views and questions about them.
        replies: lines by the question's id.
    """
    said = replies or {}
    blocks = [(_views(sample, question), _words(question, said.get(question.id))) for sample, question in items]
    return stack([panel for block in blocks for panel in block])


def _views(sample: SceneSample, question: Question) -> Image.Image:
    pictures = _enlarged(sample)
    drawn = draw_marks(pictures, question.marks)
    height, width = drawn.shape[1:3]
    row = Image.new("RGB", (WIDTH - 2 * MARGIN, height + LINE), PAGE)
    pen = ImageDraw.Draw(row)
    for number, picture in enumerate(drawn):
        left = number * (width + GAP)
        pen.text((left, 0), f"frame {number + 1}", MUTED, font(16))
        row.paste(Image.fromarray(picture), (left, LINE))
    return row


def _enlarged(sample: SceneSample) -> np.ndarray:
    """(S, h, w, 3) uint8."""
    width = min(VIEW_WIDTH, (WIDTH - 2 * MARGIN) // sample.num_views - GAP)
    height = round(width * sample.size[0] / sample.size[1])
    views = sample.images.permute(0, 2, 3, 1).cpu().numpy()
    return np.stack(
        [np.asarray(Image.fromarray(view).resize((width, height), Image.Resampling.LANCZOS)) for view in views]
    )


def _words(question: Question, reply: str | None) -> Image.Image:
    lines = [(piece, INK) for line in question.question.splitlines() for piece in textwrap.wrap(line, CHARACTERS)]
    lines += [("    ".join(question.options), INK)] if question.options else []
    lines.append((_answer(question), GREEN))
    lines += [(textwrap.shorten(reply, CHARACTERS), BLUE)] if reply is not None else []
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, LINE * len(lines)), PAGE)
    pen = ImageDraw.Draw(panel)
    for number, (text, colour) in enumerate(lines):
        pen.text((0, number * LINE), text, colour, font(19))
    return panel


def _answer(question: Question) -> str:
    text = f"{question.answer}. {question.answer_text}" if question.options else question.answer
    return f"answer: {text}   |   {question.task}   |   {question.scene}"


def varied_items(scenes: Sequence[AskedScene], count: int) -> list[tuple[SceneSample, Question]]:
    """Questions to look at: scene after scene in turn, each time one of a task that was shown least often."""
    shown, items = Counter[str](), []
    left = [list(scene.questions) for scene in scenes]
    while len(items) < count and any(left):
        for scene, questions in zip(scenes, left, strict=True):
            if questions and len(items) < count:
                question = min(questions, key=lambda question: (shown[question.task], shown[group(question.task)]))
                questions.remove(question)
                shown.update({question.task, group(question.task)})
                items.append((scene.sample, question))
    return items
