"""Correspondence as questions: the tracks that GASP learns from, put into words (GASP 5.4, its fairness baseline).

A point of the first frame is marked, or told by its coordinates; the question is where it is in another frame. Places
are in thousandths of the image's width and height, as SPAR tells them. S frames, H, W pixels, K points.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g2vlm.data.chat.clips import SceneClips
from g2vlm.data.chat.marks import COLOURS, UNITS, Mark, draw_marks
from g2vlm.data.chat.rooms import OPENING
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.qa.drafts import Letters, stream
from g2vlm.data.qa.marks import RADIUS
from g2vlm.data.qa.question import POST_PROMPTS, frame_name, opening
from g2vlm.data.qa.showing import shown_views
from g2vlm.data.registry import unknown
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.prompts import place_images
from geometry import invert_rigid
from geometry.correspondence import TrackRule, Tracks, grid_tracks

APART = 0.12
"""Least distance between two points that are options, as a share of the image's shorter side."""

NUM_PLACES = 4
"""Options of a question whose options are places."""

ASKED, *OFFERED = COLOURS
"""Colours of the point that is asked about, and of those that it may be."""

MOST_TEXT, FRAME_TEXT = 150, 14
"""Tokens that packs reserve for a question with its answer, and for the name of a frame."""

PLACES = "Coordinates are x, y in thousandths of the image's width and height."
ANSWER_PLACE = "Answer with x, y."


@dataclass(frozen=True)
class Asked:
    """A question about a clip, and what it marks in the images."""

    words: str
    answer: str
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, eq=False)
class Shown:
    """What is known of a clip.

    Args:
        places: (S, K, 2) coordinates of points in every frame, thousandths.
        visible: (S, K) bool.
        aspect: H / W.
    """

    places: Tensor
    visible: Tensor
    aspect: float

    @property
    def num_frames(self) -> int:
        """S."""
        return len(self.places)

    def pick(self, count: int, draws: Draws) -> tuple[int, list[int]] | None:
        """A frame and points that it and the first frame show, apart from each other there; None without any.

        The points are in random order, so that whichever is asked about, nothing sets it apart from the others.
        """
        for frame in draws.shuffled(range(1, self.num_frames)):
            both = (self.visible[0] & self.visible[frame]).nonzero().flatten().tolist()
            chosen: list[int] = []
            for point in draws.shuffled(both):
                if all(self._apart(frame, point, other) for other in chosen):
                    chosen.append(point)
                if len(chosen) == count:
                    return frame, draws.shuffled(chosen)
        return None

    def place(self, frame: int, point: int) -> tuple[int, int]:
        """Whole thousandths."""
        x, y = self.places[frame, point].round().long().tolist()
        return x, y

    def told(self, frame: int, point: int) -> str:
        """The place of a point in words."""
        x, y = self.place(frame, point)
        return f"({x}, {y})"

    def _apart(self, frame: int, point: int, other: int) -> bool:
        x, y = (self.places[frame, point] - self.places[frame, other]).tolist()
        shorter = min(1.0, self.aspect)  # the image being 1 wide and `aspect` high
        return (x**2 + (y * self.aspect) ** 2) ** 0.5 >= APART * shorter * UNITS


def colours(shown: Shown, letters: Letters, draws: Draws) -> Asked | None:
    """Which of some coloured points in another frame is the red one of the first frame."""
    if (picked := shown.pick(len(OFFERED), draws)) is None:
        return None
    frame, points = picked
    offered = draws.shuffled(OFFERED)
    options, answer = letters.options(f"the {offered[0]} point", [f"the {colour} point" for colour in offered[1:]])
    first, other = (frame_name(k, shown.num_frames) for k in (0, frame))
    words = f"Which point in {other} is the point marked in {ASKED} in {first}?"
    marks = [Mark(frame, colour, shown.place(frame, p)) for colour, p in zip(offered, points, strict=True)]
    return Asked(_with(words, options), answer, (Mark(0, ASKED, shown.place(0, points[0])), *marks))


def places(shown: Shown, letters: Letters, draws: Draws) -> Asked | None:
    """Which of some places in another frame shows a place of the first frame."""
    if (picked := shown.pick(NUM_PLACES, draws)) is None:
        return None
    frame, points = picked
    right, *wrong = [shown.told(frame, point) for point in points]
    options, answer = letters.options(right, wrong)
    return Asked(_with(f"{_where(shown, frame, points[0])} {PLACES}", options), answer)


def coordinates(shown: Shown, letters: Letters, draws: Draws) -> Asked | None:
    """Where a place of the first frame is in another frame."""
    if (picked := shown.pick(1, draws)) is None:
        return None
    frame, (point,) = picked
    return Asked(f"{_where(shown, frame, point)} {PLACES}\n{ANSWER_PLACE}", shown.told(frame, point)[1:-1])


Way = Callable[[Shown, Letters, Draws], Asked | None]
WAYS: Mapping[str, Way] = {"colours": colours, "places": places, "coordinates": coordinates}
"""How a point is asked about; None where the clip does not show enough."""


class CorrespondenceQuestions:
    """Questions about the tracks of clips whose depth and cameras are known, in one conversation per clip.

    Clips and tracks are those that `scene_clips` of the same arguments and GASP's defaults give for the same seed.
    Every letter, colour and frame is the right one equally often. A clip has at most one question with colours.

    Args:
        root, scenes, scene_options, frames, window, view_size, geometry: as of `SceneClips`.
        questions: about a clip.
        ways: keys of `WAYS`, equally likely.

    Raises:
        InputError: an unknown way.
    """

    name = "correspondence_questions"

    def __init__(
        self,
        root: Path | None = None,
        scenes: str = "rooms",
        scene_options: Mapping[str, Any] | None = None,
        frames: Sequence[int] = (8, 24),
        window: int = 48,
        view_size: Sequence[int] = (84, 84),
        geometry: bool = False,
        questions: int = 4,
        ways: Sequence[str] = tuple(WAYS),
    ):
        for way in ways:
            if way not in WAYS:
                raise unknown("way to ask about a point", way, list(WAYS))
        self.clips = SceneClips(root, scenes, scene_options, frames, window, view_size, geometry)
        self.questions, self.ways, self.tracks = questions, tuple(ways), TrackRule()

    def __len__(self) -> int:
        return len(self.clips)

    def shape(self, index: int, seed: int) -> ChatShape:
        """Everything but the text; errors as of `SceneClips`."""
        shape = self.clips.shape(index, seed)
        images, text = len(shape.image_sizes), self.questions * MOST_TEXT
        spare = OPENING + images * FRAME_TEXT + text
        turn = Turn(shape.turns[0].parts, "")
        return ChatShape((turn,), shape.image_sizes, shape.num_views, shape.view_size, spare)

    def load(self, index: int, seed: int) -> ChatSample:
        """A clip and questions about its points.

        Raises:
            InputError: nothing can be asked: depth or cameras are unknown, or no point is seen twice.
        """
        clip = self.clips.clip(index, seed)
        asked = list(self._asked(clip, stream("correspondence", seed, index)))
        if not asked:
            raise InputError(
                f"no question about points of {clip.scene or index}", "no other frame shows any", "show closer frames"
            )
        images = [ImageAt(i) for i in range(clip.num_views)]
        first, *later = asked
        parts = tuple(place_images(opening(clip.num_views, first.words), images))
        marks = [mark for question in asked for mark in question.marks]
        radius = max(2.0, RADIUS * min(clip.size))
        return ChatSample(
            parts=parts,
            answer=first.answer,
            images=draw_marks(list(shown_views(clip.images)), marks, radius),
            scene=clip if self.clips.geometry else None,
            name=f"{self.name}/{clip.scene}",
            task=self.name,
            later=tuple(Turn((question.words,), question.answer) for question in later),
        )

    def _asked(self, clip: SceneSample, draws: Draws) -> Iterator[Asked]:
        """Questions, at most one of them with marks."""
        shown, letters, marked = seen_points(clip, self.tracks), Letters(draws), False
        for _ in range(self.questions):
            ways = [way for way in self.ways if not (marked and way == "colours")]
            question = WAYS[draws.choice(ways)](shown, letters, draws) if ways else None
            if question is not None:
                marked |= bool(question.marks)
                yield question


def seen_points(clip: SceneSample, rule: TrackRule) -> Shown:
    """The tracks of a clip.

    Raises:
        InputError: its depth or cameras are unknown.
    """
    if clip.depth is None or clip.valid is None or clip.intrinsics is None or clip.cam_to_world is None:
        raise InputError(
            f"no question about points of {clip.scene or clip.dataset}",
            "its depth or cameras are unknown",
            "use a source that has them",
        )
    depth = torch.where(clip.valid, clip.depth, 0)
    tracks: Tracks = grid_tracks(depth, clip.intrinsics, invert_rigid(clip.cam_to_world), rule)
    height, width = clip.size
    places = UNITS * (tracks.points + 0.5) / torch.tensor([width, height])
    return Shown(places, tracks.visible, height / width)


def _where(shown: Shown, frame: int, point: int) -> str:
    first, other = (frame_name(k, shown.num_frames) for k in (0, frame))
    return f"Where in {other} is the point at {shown.told(0, point)} in {first}?"


def _with(words: str, options: Sequence[str]) -> str:
    return f"{words}\nOptions:\n" + "\n".join(options) + f"\n{POST_PROMPTS['choice']}"
