"""Questions about rendered rooms: views of a room, and one question about what is in them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.showing import blank_views, shown_views
from g2vlm.data.qa.source import RoomsQA
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError

MOST_TEXT = 160
"""Tokens that packs reserve for question and answer, which are known only when the room is rendered."""


class RoomsChats:
    """Rooms as `RoomsQA` draws them; the views are semantic images, and views of the geometry encoder with depth.

    Args:
        split, seed: as of `RoomsQA`.
        views: fewest and most views of a room.
        view_size: (H, W) of the views.
        blank: both encoders get grey images, for a model that must answer without seeing.
        options: further arguments of `RoomsQA`.
    """

    name = "rooms_qa"

    def __init__(
        self,
        split: Any = "train",
        seed: int = 0,
        views: Sequence[int] = (2, 4),
        view_size: Sequence[int] = (84, 84),
        blank: bool = False,
        **options: Any,
    ):
        self.rooms, self.blank = RoomsQA(split=split, seed=seed, **options), blank
        self.views, self.view_size = (views[0], views[1]), (view_size[0], view_size[1])

    def __len__(self) -> int:
        return len(self.rooms)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text."""
        count = self._request(seed).num_views
        turn = Turn(tuple(ImageAt(i) for i in range(count)), "")
        return ChatShape((turn,), (self.view_size,) * count, count, self.view_size, MOST_TEXT)

    def load(self, index: int, seed: int) -> ChatSample:
        """A room and a question about it; the room decides whether it allows one.

        Raises:
            InputError: it allows none.
        """
        asked = self.rooms.load(index, self._request(seed))
        if not asked.questions:
            raise InputError(f"no question about room {index}", f"with {self._request(seed).num_views} views", "")
        question, scene = asked.questions[0], asked.sample
        name = f"{self.name}/{scene.scene}"
        parts = (*(ImageAt(i) for i in range(scene.num_views)), question.prompt)
        if self.blank:
            scene, question = replace(scene, images=blank_views(scene.images)), replace(question, marks=())
        images = tuple(shown_views(scene.images, question))
        return ChatSample(parts, question.answer, images, scene, name, question.task)

    def _request(self, seed: int) -> ViewRequest:
        random = np.random.default_rng([seed, 1])
        return ViewRequest(int(random.integers(self.views[0], self.views[1] + 1)), self.view_size, seed)
