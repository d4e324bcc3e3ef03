"""What a model is shown when it is asked: images or grey ones; its geometry encoder these, another scene's, or none.

S views, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from g2vlm.asking import Context, look
from g2vlm.chat_model import ChatModel
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.showing import blank_views, shown_views
from g2vlm.errors import InputError
from g2vlm.images import from_memory

Geometry = Literal["on", "off", "shuffled"]
Shown = Literal["shown", "blank"]
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Conditions:
    """What the encoders are given.

    Args:
        geometry: `on`: the geometry encoder sees the scene's views; `off`: it sees nothing, there are no such tokens;
            `shuffled`: those of another scene (`donors`).
        images: `blank`: both encoders get grey images of the same size, without marks.

    Raises:
        InputError: another value, or blank views of another scene.
    """

    geometry: Geometry = "on"
    images: Shown = "shown"

    def __post_init__(self) -> None:
        for name, allowed in (("geometry", get_args(Geometry)), ("images", get_args(Shown))):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} is {value!r}", "", f"allowed are {', '.join(allowed)}")
        if self.geometry == "shuffled" and self.images == "blank":
            raise InputError("cannot shuffle the geometry of blank images", "they are all the same", "choose one")

    def context(self, chat: ChatModel, images: Tensor, views: Tensor, question: Question) -> Context:
        """What a model sees before it is asked a question, and every other one with the same marks.

        Args:
            chat: the model.
            images: (S, 3, H, W) uint8, of the scene.
            views: the same for the geometry encoder: of the scene, or of its donor; without marks.
            question: its marks are drawn on the images.

        Raises:
            InputError: more than fits into the context.
        """
        if self.images == "blank":
            images, views, question = blank_views(images), blank_views(views), replace(question, marks=())
        if views.shape != images.shape:
            given = " and ".join(str(tuple(value.shape)) for value in (images, views))
            raise InputError("views of another shape than the images", given, "use scenes of one shape")
        shown = [from_memory(image) for image in shown_views(images, question.marks)]
        seen = [from_memory(view) for view in views.permute(0, 2, 3, 1).numpy()]
        return look(chat, shown, [] if self.geometry == "off" else seen)

    def sources(self, scenes: Sequence[str]) -> dict[str, str]:
        """Whose views the geometry encoder gets of each scene; errors as in `donors`."""
        return donors(scenes) if self.geometry == "shuffled" else dict(zip(scenes, scenes, strict=True))

    def key(self, question: Question) -> object:
        """Equal for questions about a scene that share a context."""
        return () if self.images == "blank" else question.marks


def donors(scenes: Sequence[str], seed: int = SHUFFLE_SEED) -> dict[str, str]:
    """Whose views each scene's geometry encoder gets: one cycle through all scenes in random order, so never its own.

    It is drawn over the scenes that are evaluated: another limit shuffles differently.

    Raises:
        InputError: a single scene.
    """
    if len(scenes) == 1:
        raise InputError("cannot shuffle one scene", "there is no other", "ask about more (--limit)")
    order: list[int] = np.random.default_rng(seed).permutation(len(scenes)).tolist()
    return {scenes[i]: scenes[j] for i, j in zip(order, [*order[1:], order[0]], strict=True)}
