"""The contract of question-and-answer data: what a source gives, whatever it reads or renders.

Shapes: H, W pixels.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from g2vlm.data.types import SceneSample

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageAt:
    """The place of a semantic image: the sample's image number `index` stands here."""

    index: int


Part = str | ImageAt


@dataclass(frozen=True)
class Turn:
    """What the user says, text and images in order, and what the model should answer; None: no answer is learned."""

    parts: tuple[Part, ...]
    answer: str | None


@dataclass(frozen=True)
class ChatShape:
    """What is needed to count the tokens of a sample without decoding its pixels.

    Args:
        turns: of the conversation.
        image_sizes: (H, W) of each semantic image as it will be given.
        num_views: views of the scene; 0 without one.
        view_size: (H, W) of them.
        spare: how many more tokens of text the sample may have, for a source that learns its question while loading.
    """

    turns: tuple[Turn, ...]
    image_sizes: tuple[Size, ...] = ()
    num_views: int = 0
    view_size: Size = (0, 0)
    spare: int = 0

    @property
    def image_order(self) -> tuple[int, ...]:
        """Numbers of the semantic images in the order in which the conversation shows them."""
        return tuple(part.index for turn in self.turns for part in turn.parts if isinstance(part, ImageAt))


@dataclass(frozen=True, eq=False)
class ChatSample:
    """A conversation about images and a scene.

    Args:
        parts: of the first turn.
        answer: of the first turn; None: none is learned, the sample is there for its images.
        images: (H, W, 3) uint8 RGB each, the semantic encoder's copies; marks may be drawn on them.
        scene: the geometry encoder's views, which stand in front of everything else; depth and poses where known.
        name: where it comes from.
        task: what kind of question it is.
        later: further turns.
        clip: the scene that the images show, view i in image i, with depth and cameras where they are known: what
            geometric supervision compares with. None: unknown, or the images are not of one scene.

    Raises:
        ValueError: a clip of another number of views than there are images.
    """

    parts: tuple[Part, ...]
    answer: str | None
    images: tuple[np.ndarray, ...] = ()
    scene: SceneSample | None = None
    name: str = ""
    task: str = ""
    later: tuple[Turn, ...] = ()
    clip: SceneSample | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip.num_views != len(self.images):
            raise ValueError(f"clip: {self.clip.num_views} views of {len(self.images)} images")

    @property
    def shape(self) -> ChatShape:
        """The exact one."""
        views = (0, (0, 0)) if self.scene is None else (self.scene.num_views, self.scene.size)
        sizes = tuple((image.shape[0], image.shape[1]) for image in self.images)
        return ChatShape((Turn(self.parts, self.answer), *self.later), sizes, *views)


class ChatSource(Protocol):
    """Samples that can be drawn at random, deterministically: equal arguments give equal samples."""

    name: str
    """As in configs and logs."""

    def __len__(self) -> int:
        """Number of samples; an endless source gives a large number."""
        ...

    def shape(self, index: int, seed: int) -> ChatShape:
        """That of `load` with the same arguments, or a larger one.

        Raises:
            InputError: the sample cannot be read; the message names file and place.
        """
        ...

    def load(self, index: int, seed: int) -> ChatSample:
        """A sample; `seed` is of everything random in it.

        Raises:
            InputError: as `shape`.
        """
        ...
