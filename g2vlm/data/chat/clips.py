"""Clips of scenes without any words: what a geometric supervision learns from beside questions (GASP 5.2).

S frames of a clip, H, W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.frames import FrameSource
from g2vlm.data.qa.showing import shown_views
from g2vlm.data.registry import build_source
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError

FEWEST = 2
"""Frames of a clip that anything can be matched in."""


@dataclass(frozen=True)
class ClipLaw:
    """Which frames of a video are a clip (GASP 5.2).

    The anchor is any frame; the others lie at most `window` frames from it, all of them equally likely. Where the video
    has fewer frames there than the clip should have, the clip is shorter.

    Args:
        frames: fewest and most of a clip, all numbers equally likely.
        window: frames to either side of the anchor.

    Raises:
        InputError: less than two frames, or a window without others.
    """

    frames: tuple[int, int] = (8, 24)
    window: int = 48

    def __post_init__(self) -> None:
        if not FEWEST <= self.frames[0] <= self.frames[1] or self.window < 1:
            raise InputError(
                f"cannot cut clips of {list(self.frames)} frames from windows of {self.window}",
                f"a clip has {FEWEST} frames or more",
                "give frames as [fewest, most], and a window of 1 or more",
            )

    def num_frames(self, seed: int) -> int:
        """Of a clip in a video that is long enough."""
        return int(self._random(seed, 0).integers(self.frames[0], self.frames[1] + 1))

    def draw(self, count: int, seed: int) -> tuple[list[int], list[int]]:
        """A clip of a video of so many frames: the anchor, then the others in order of time.

        Also the rest of the window in random order, for whoever finds that a frame cannot be read.
        """
        random = self._random(seed, 1)
        anchor = int(random.integers(count))
        near = range(max(0, anchor - self.window), min(count, anchor + self.window + 1))
        others = random.permutation([index for index in near if index != anchor]).tolist()
        wanted = self.num_frames(seed) - 1
        return [anchor, *sorted(others[:wanted])], others[wanted:]

    def _random(self, seed: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, stream])


class SceneClips:
    """Clips of any source of scenes: images in a user's turn, nothing asked and nothing answered.

    Of stored frames, clips are cut as `ClipLaw` says. Rendered rooms have no time: their views are those of a request,
    the first one being the anchor; `cameras` of the source decides how much they share. The anchor stands first.

    Args:
        root: folder of the scenes; none for `rooms`.
        scenes: name of a source in g2vlm.data.registry.
        scene_options: further arguments of that source.
        frames, window: as of `ClipLaw`.
        view_size: (H, W) of the frames.
        geometry: the geometry encoder gets them too.
    """

    name = "scene_clips"

    def __init__(
        self,
        root: Path | None = None,
        scenes: str = "rooms",
        scene_options: Mapping[str, Any] | None = None,
        frames: Sequence[int] = (8, 24),
        window: int = 48,
        view_size: Sequence[int] = (84, 84),
        geometry: bool = False,
    ):
        self.scenes = build_source(scenes, root, **(scene_options or {}))
        self.law = ClipLaw((frames[0], frames[1]), window)
        self.size, self.geometry = (view_size[0], view_size[1]), geometry

    def __len__(self) -> int:
        return len(self.scenes)

    def shape(self, index: int, seed: int) -> ChatShape:
        """The exact one, unless frames prove unreadable.

        Raises:
            InputError: the scene cannot be read, or has a single frame.
        """
        if isinstance(self.scenes, FrameSource):
            count = len(self.law.draw(self._length(index), seed)[0])
        else:
            count = self._request(index, seed).num_views
        turn = Turn(tuple(ImageAt(i) for i in range(count)), None)
        views = (count, self.size) if self.geometry else (0, (0, 0))
        return ChatShape((turn,), (self.size,) * count, *views)

    def load(self, index: int, seed: int) -> ChatSample:
        """A clip of a scene; errors as in `shape`, and frames that cannot be read."""
        clip = self.clip(index, seed)
        images = tuple(shown_views(clip.images))
        parts = tuple(ImageAt(i) for i in range(clip.num_views))
        seen = clip if self.geometry else None
        return ChatSample(parts, None, images, seen, f"{self.name}/{clip.scene}", self.name, clip=clip)

    def clip(self, index: int, seed: int) -> SceneSample:
        """The frames alone, with depth and cameras where the source has them."""
        if not isinstance(self.scenes, FrameSource):
            return self.scenes.load(index, self._request(index, seed))
        chosen, rest = self.law.draw(self._length(index), seed)
        return self.scenes.load_first(index, [*chosen, *rest], len(chosen), self.size)

    def _request(self, index: int, seed: int) -> ViewRequest:
        return ViewRequest(min(self.law.num_frames(seed), self.scenes.num_views(index)), self.size, seed)

    def _length(self, index: int) -> int:
        count = self.scenes.num_views(index)
        if count < FEWEST:
            raise InputError(
                f"no clip of scene {index} of {self.scenes.name}", f"it has {count} frames", "leave it out"
            )
        return count
