"""Conversations in the LLaVA layout: one JSON object a line (LLaVA-OneVision, LLaVA-Video, VSI-590K, VLM-3R's data).

A line has `conversations`, a list of {"from": "human" or "gpt", "value": text}, and `image` (a path or a list of them)
or `video` (a folder of frames, or a file with the extra `video`), relative to the media root. Images stand where
`<image>` or `<video>` is written, several at a single mark, and without any mark in front of the first words. With
`video_prompt: timed` the first words about a video follow its frames, and say its duration and their times first.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from g2vlm.data.chat.rows import Lines
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Part, Size, Turn
from g2vlm.data.chat.video import Timing, file_timing, folder_timing, read_frames, spread, video_size
from g2vlm.data.frames import Frame, SceneFacts, assemble
from g2vlm.data.registry import unknown
from g2vlm.errors import InputError
from g2vlm.images import image_size, list_images, read_image
from g2vlm.prompts import VIDEO_PROMPTS
from g2vlm.semantic_images import smart_size

CELL = 14
"""Sides of clips are multiples of this many pixels, a patch of most networks that are asked about them."""

MARK = re.compile(r"\n*<(?:image|video)>\n*")
USER, MODEL, SYSTEM = ("human", "user"), ("gpt", "assistant"), ("system",)


class JsonlChats:
    """The lines of a file.

    Args:
        root: the file.
        media_root: folder that paths of images and videos are relative to; by default the file's.
        turns: `all`: every answer is learned; `first`: the first alone (released data code).
        frames: of a video, evenly spread.
        geometry: the images are also the views of a scene, without depth.
        clips: all images of a line, or the frames of its video, are of one scene: a clip for geometry tokens and
            geometric supervision. It has the aspect ratio of its first image, unless it is also the views of a scene.
        video_prompt: what the first question about a video says, a key of `VIDEO_PROMPTS`.
        fps: of videos that are folders of frames; needed to say their times.
        view_size: (H, W) of the views, which are stretched to it; its area is the largest of a clip.

    Raises:
        InputError: the file cannot be read, or an argument makes no sense.
    """

    name = "jsonl"

    def __init__(
        self,
        root: Path,
        media_root: str | None = None,
        turns: Literal["all", "first"] = "all",
        frames: int = 8,
        geometry: bool = False,
        clips: bool = False,
        video_prompt: str = "plain",
        fps: float | None = None,
        view_size: Sequence[int] = (518, 518),
    ):
        if turns not in ("all", "first") or frames < 1:
            raise InputError(f"cannot use  turns={turns}, frames={frames}", "", "turns: all or first; frames >= 1")
        if video_prompt not in VIDEO_PROMPTS:
            raise unknown("video_prompt", video_prompt, [*VIDEO_PROMPTS])
        if fps is not None and fps <= 0:
            raise InputError(f"cannot use  fps={fps}", "", "fps is above 0")
        self.lines = Lines(Path(root))
        self.media_root = Path(media_root) if media_root is not None else Path(root).parent
        self.turns, self.frames, self.geometry, self.clips = turns, frames, geometry, clips
        self.video_prompt, self.fps = video_prompt, fps
        self.view_size = (view_size[0], view_size[1])

    def __len__(self) -> int:
        return len(self.lines)

    def shape(self, index: int, seed: int) -> ChatShape:
        """From the line and the headers of its images."""
        row = self._row(index)
        views = (len(row.sizes), self.view_size) if self.geometry else (0, (0, 0))
        return ChatShape(row.turns, row.sizes, *views)

    def load(self, index: int, seed: int) -> ChatSample:
        """The line with its images; nothing is random."""
        row = self._row(index)
        images = tuple(image for media in row.media for image in media.pixels())
        seen = None
        if images and (self.geometry or self.clips):
            names = [str(i) for i in range(len(images))] if row.video is None else row.video.frame_names()
            frames = [Frame(name, image) for name, image in zip(names, images, strict=True)]
            facts = SceneFacts(f"{self.lines.path.stem}/{index}" if row.video is None else row.video.name, self.name)
            seen = assemble(
                frames, facts, self.view_size if self.geometry else self._clip_size(row.sizes[0]), "stretch"
            )
        first, *later = row.turns
        scene, clip = seen if self.geometry else None, seen if self.clips else None
        return ChatSample(first.parts, first.answer, images, scene, f"{self.name}/{index}", "chat", tuple(later), clip)

    def _clip_size(self, first: Size) -> Size:
        """Of clips that are no views: the first image's, in whole cells, with the area of a view at most."""
        return smart_size(first, CELL**2, self.view_size[0] * self.view_size[1], CELL)

    def _row(self, index: int) -> "_Row":
        place = f"{self.lines.path}:{self.lines.numbers[index]}"
        try:
            record = json.loads(self.lines[index])
            media = _media(record, self.media_root, self.frames)
            turns = _turns(record)[: 1 if self.turns == "first" else None]
            row = _Row((), tuple(media), tuple(size for one in media for size in one.sizes()))
            if self.video_prompt != "plain" and row.videos:
                turns[0] = (self._timed(row, turns[0][0]), turns[0][1])
            return row._replace(turns=_placed(turns, len(row.sizes)))
        except InputError as error:
            raise InputError(f"bad row  {place}", f"{error.what}: {error.why}", "repair or remove the row") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"bad row  {place}", str(error), "repair or remove the row") from error

    def _timed(self, row: "_Row", question: str) -> str:
        """The first question about a video, its frames in front."""
        if row.video is None:
            raise ValueError(f"video_prompt {self.video_prompt} is for a video alone, and there are images beside it")
        timing = row.video.timing(self.fps)
        return "<video>" + VIDEO_PROMPTS[self.video_prompt](MARK.sub("", question), timing.duration, timing.times)


class _Row(NamedTuple):
    turns: tuple[Turn, ...]
    media: "tuple[_Images | _Folder | _File, ...]"
    sizes: tuple[Size, ...]

    @property
    def videos(self) -> "list[_Folder | _File]":
        return [one for one in self.media if not isinstance(one, _Images)]

    @property
    def video(self) -> "_Folder | _File | None":
        """The video that all images are of."""
        return self.videos[0] if len(self.videos) == len(self.media) == 1 else None


class _Images(NamedTuple):
    """Image files."""

    files: tuple[Path, ...]

    def sizes(self) -> list[Size]:
        return [image_size(file) for file in self.files]

    def pixels(self) -> list[np.ndarray]:
        return [read_image(file).pixels for file in self.files]


class _Folder(NamedTuple):
    """Frames of a video that is a folder of `total` of them."""

    name: str
    files: tuple[Path, ...]
    places: tuple[int, ...]
    total: int

    @classmethod
    def open(cls, name: str, folder: Path, frames: int) -> "_Folder":
        """At most `frames` images in natural order, evenly spread."""
        files = list_images(folder)
        places = spread(len(files), frames)
        return cls(name, tuple(files[i] for i in places), tuple(places), len(files))

    def sizes(self) -> list[Size]:
        return _Images(self.files).sizes()

    def pixels(self) -> list[np.ndarray]:
        return _Images(self.files).pixels()

    def frame_names(self) -> list[str]:
        return [file.stem for file in self.files]

    def timing(self, fps: float | None) -> Timing:
        if fps is None:
            raise ValueError(f"{self.name} is a folder of frames, and nothing says when they were taken: give fps")
        return folder_timing(self.total, self.places, fps)


class _File(NamedTuple):
    """A video file of which `frames` are wanted."""

    name: str
    path: Path
    frames: int

    def sizes(self) -> list[Size]:
        return [video_size(self.path)] * self.frames

    def pixels(self) -> list[np.ndarray]:
        return read_frames(self.path, self.frames)

    def frame_names(self) -> list[str]:
        return [f"{i}/{self.frames}" for i in range(self.frames)]

    def timing(self, fps: float | None) -> Timing:
        return file_timing(self.path, self.frames)


def _media(record: Any, root: Path, frames: int) -> list[_Images | _Folder | _File]:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    images, video = record.get("image") or [], record.get("video")
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in (*names, video or "")):
        raise ValueError("image is not a path or a list of paths, or video is not a path")
    media: list[_Images | _Folder | _File] = [_Images(tuple(root / name for name in names))] if names else []
    if video:
        path = root / video
        media.append(_Folder.open(video, path, frames) if path.is_dir() else _File(video, path, frames))
    return media


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of question and answer."""
    said = [(entry["from"], entry["value"]) for entry in record["conversations"]]
    said = [(speaker, text) for speaker, text in said if speaker not in SYSTEM]
    if not all(isinstance(text, str) for _, text in said):
        raise ValueError("a value of conversations is not a text")
    pairs = list(zip(said[:-1:2], said[1::2], strict=True))
    if not pairs or not all(asked[0] in USER and told[0] in MODEL for asked, told in pairs):
        raise ValueError("conversations is not human and gpt in turn")
    return [(asked[1], told[1]) for asked, told in pairs]


def _placed(pairs: list[tuple[str, str]], num_images: int) -> tuple[Turn, ...]:
    """The turns with images at their marks."""
    marks = sum(len(MARK.findall(question)) for question, _ in pairs)
    if num_images and not marks:
        pairs = [(f"<image>{pairs[0][0]}", pairs[0][1]), *pairs[1:]]
    per_mark = 1 if marks > 1 else num_images
    if marks and marks * per_mark != (num_images or 1):
        raise ValueError(f"{marks} marks of images and {num_images} images")
    turns, used = [], 0
    for question, answer in pairs:
        parts: list[Part] = []
        for i, text in enumerate(MARK.split(question)):
            if i:
                parts += [ImageAt(used + k) for k in range(per_mark)]
                used += per_mark
            parts += [text] if text else []
        turns.append(Turn(tuple(parts), answer.strip()))
    return tuple(turns)
