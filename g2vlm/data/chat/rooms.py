"""Questions about rendered rooms: views of a room, and a conversation about what is in them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.marks import draw_marks
from g2vlm.data.qa.question import Mark
from g2vlm.data.qa.source import AskedScene, RoomsQA
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError

MOST_TEXT = 120
"""Tokens that packs reserve for a question and its answer, which are known only when the room is rendered."""
GREY = 128


class RoomsChats:
    """Rooms as `RoomsQA` draws them; the views are semantic images, and views of the geometry encoder with depth.

    Several questions about a room, of different tasks and in random order, are the turns of one conversation; what the
    first of them marks is marked in the images.

    Args:
        split, seed: as of `RoomsQA`.
        views: fewest and most views of a room.
        view_size: (H, W) of the views.
        questions: most about a room; fewer where it does not allow them.
        geometry: give the views to the geometry encoder too.
        blank: show grey images without marks in place of the room's, for models that answer without looking.
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
        geometry: bool = True,
        blank: bool = False,
        **options: Any,
    ):
        self.rooms = RoomsQA(split=split, seed=seed, **options)
        self.views, self.view_size = (views[0], views[1]), (view_size[0], view_size[1])
        self.questions, self.geometry, self.blank = questions, geometry, blank

    def __len__(self) -> int:
        return len(self.rooms)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text."""
        count = self._request(seed).num_views
        turn = Turn(tuple(ImageAt(i) for i in range(count)), "")
        spare = self.questions * MOST_TEXT
        return ChatShape((turn,), (self.view_size,) * count, count * self.geometry, self.view_size, spare)

    def load(self, index: int, seed: int) -> ChatSample:
        """A room and questions about it; the room decides which it allows.

        Raises:
            InputError: it allows none.
        """
        asked = self.rooms.load(index, self._request(seed), self.questions)
        if not asked.questions:
            raise InputError(f"no question about room {index}", f"with {self._request(seed).num_views} views", "")
        asked = replace(asked, questions=tuple(stream("order", seed, index).shuffled(asked.questions)))
        return self.sample(asked)

    def sample(self, asked: AskedScene) -> ChatSample:
        """A scene and its questions as a conversation."""
        first, *later = asked.questions
        scene = blanked(asked.sample) if self.blank else asked.sample
        marks = () if self.blank else next((q.marks for q in asked.questions if q.marks), ())
        return ChatSample(
            parts=(*(ImageAt(i) for i in range(scene.num_views)), first.prompt),
            answer=first.answer,
            images=shown(scene, marks),
            scene=scene if self.geometry else None,
            name=f"{self.name}/{scene.scene}",
            task=first.task,
            later=tuple(Turn((question.prompt,), question.answer) for question in later),
        )

    def _request(self, seed: int) -> ViewRequest:
        random = np.random.default_rng([seed, 1])
        return ViewRequest(int(random.integers(self.views[0], self.views[1] + 1)), self.view_size, seed)


def shown(scene: SceneSample, marks: Sequence[Mark] = ()) -> tuple[np.ndarray, ...]:
    """The semantic encoder's copies of a scene's views (H, W, 3), with a question's marks."""
    return tuple(draw_marks(np.ascontiguousarray(scene.images.permute(0, 2, 3, 1).numpy()), marks))


def blanked(scene: SceneSample) -> SceneSample:
    """The scene as a blind model sees it: all views grey."""
    return replace(scene, images=torch.full_like(scene.images, GREY))
