"""Questions about rendered rooms: views of a room, and a conversation about what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.question import Mark, Question, opening
from g2vlm.data.qa.showing import blank_views, shown_views
from g2vlm.data.qa.source import RoomsQA
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from g2vlm.prompts import place_images

OPENING, MOST_TEXT = 60, 110
"""Tokens that packs reserve for the words before the first question, and for each question and answer, which are known
only when the room is rendered."""


@dataclass(frozen=True)
class Showing:
    """How a rendered room is shown.

    Args:
        views: fewest and most of them, as many as the sample's seed says.
        size: (H, W) of each.
        geometry: the geometry encoder gets them too.
        blank: all encoders get grey images, for a model that must answer without seeing.
    """

    views: tuple[int, int]
    size: tuple[int, int]
    geometry: bool
    blank: bool

    def request(self, seed: int) -> ViewRequest:
        """The views of a sample."""
        count = np.random.default_rng([seed, 1]).integers(self.views[0], self.views[1] + 1)
        return ViewRequest(int(count), self.size, seed)

    def shape(self, seed: int, spare: int) -> ChatShape:
        """That of a sample but for its text."""
        count = self.request(seed).num_views
        turn = Turn(tuple(ImageAt(i) for i in range(count)), "")
        return ChatShape((turn,), (self.size,) * count, count * self.geometry, self.size, spare)

    def sample(
        self, scene: SceneSample, turns: Sequence[Turn], name: str, task: str, marks: Sequence[Mark] = ()
    ) -> ChatSample:
        """A room and what is said about it, with marks on the semantic copies."""
        if self.blank:
            scene, marks = replace(scene, images=blank_views(scene.images)), ()
        first, *later = turns
        images = tuple(shown_views(scene.images, marks))
        seen = scene if self.geometry else None
        clip = None if self.blank else scene
        return ChatSample(first.parts, first.answer, images, seen, f"{name}/{scene.scene}", task, tuple(later), clip)


class RoomsChats:
    """Rooms as `RoomsQA` draws them; the views are semantic images, and views of the geometry encoder with depth.

    Several questions about a room, of different tasks and in random order, are the turns of one conversation; what one
    of them marks is marked in the images.

    Args:
        split, seed: as of `RoomsQA`.
        views, view_size, geometry, blank: as of `Showing`.
        questions: most about a room; fewer where it does not allow them.
        openly: probability that a question with options is asked without them, to be answered in words.
        options: further arguments of `RoomsQA`.
    """

    name = "rooms_qa"

    def __init__(
        self,
        split: Any = "train",
        seed: int = 0,
        views: Sequence[int] = (2, 4),
        view_size: Sequence[int] = (84, 84),
        questions: int = 1,
        openly: float = 0.0,
        geometry: bool = True,
        blank: bool = False,
        **options: Any,
    ):
        self.rooms, self.questions, self.openly = RoomsQA(split=split, seed=seed, **options), questions, openly
        self.showing = Showing((views[0], views[1]), (view_size[0], view_size[1]), geometry, blank)

    def __len__(self) -> int:
        return len(self.rooms)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text."""
        return self.showing.shape(seed, OPENING + self.questions * MOST_TEXT)

    def load(self, index: int, seed: int) -> ChatSample:
        """A room and questions about it; the room decides which it allows.

        Raises:
            InputError: it allows none.
        """
        request = self.showing.request(seed)
        asked = self.rooms.load(index, request, self.questions)
        if not asked.questions:
            raise InputError(f"no question about room {index}", f"with {request.num_views} views", "")
        draws = stream("order", seed, index)
        order = draws.shuffled(asked.questions)
        (words, answer), *later = [said(question, openly=draws.chance(self.openly)) for question in order]
        images = [ImageAt(i) for i in range(request.num_views)]
        first = Turn(tuple(place_images(opening(len(images), words), images)), answer)
        turns = [first, *(Turn((words,), answer) for words, answer in later)]
        marks = next((question.marks for question in asked.questions if question.marks), ())
        return self.showing.sample(asked.sample, turns, self.name, order[0].task, marks)


def said(question: Question, openly: bool) -> tuple[str, str]:
    """What is asked and answered; openly, without the options."""
    return (question.open_words, question.answer_text) if openly else (question.words, question.answer)
