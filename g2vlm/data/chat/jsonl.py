"""Conversations in the LLaVA layout: one JSON object a line (LLaVA-OneVision, LLaVA-Video, VSI-590K, VLM-3R's data).

A line has `conversations`, a list of {"from": "human" or "gpt", "value": text}, and `image` (a path or a list of them)
or `video` (a folder of frames, or a file with the extra `video`), relative to the media root. Images stand where
`<image>` or `<video>` is written, several at a single mark, and without any mark in front of the first words.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from g2vlm.data.chat.rows import Lines
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Part, Size, Turn
from g2vlm.data.chat.video import frame_files, read_frames, video_size
from g2vlm.data.frames import Frame, SceneFacts, assemble
from g2vlm.errors import InputError
from g2vlm.images import image_size, read_image

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
        view_size: (H, W) of the views, which are stretched to it.

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
        view_size: Sequence[int] = (518, 518),
    ):
        if turns not in ("all", "first") or frames < 1:
            raise InputError(f"cannot use  turns={turns}, frames={frames}", "", "turns: all or first; frames >= 1")
        self.lines = Lines(Path(root))
        self.media_root = Path(media_root) if media_root is not None else Path(root).parent
        self.turns, self.frames, self.geometry = turns, frames, geometry
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
        images = tuple(image for clip in row.clips for image in clip.pixels())
        scene = None
        if self.geometry and images:
            frames = [Frame(str(i), image) for i, image in enumerate(images)]
            scene = assemble(frames, SceneFacts(str(index), self.name), self.view_size, "stretch")
        first, *later = row.turns
        return ChatSample(first.parts, first.answer, images, scene, f"{self.name}/{index}", "chat", tuple(later))

    def _row(self, index: int) -> "_Row":
        place = f"{self.lines.path}:{self.lines.numbers[index]}"
        try:
            record = json.loads(self.lines[index])
            clips = _clips(record, self.media_root, self.frames)
            turns = _turns(record)[: 1 if self.turns == "first" else None]
            sizes = tuple(size for clip in clips for size in clip.sizes())
            return _Row(_placed(turns, len(sizes)), tuple(clips), sizes)
        except InputError as error:
            raise InputError(f"bad row  {place}", f"{error.what}: {error.why}", "repair or remove the row") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"bad row  {place}", str(error), "repair or remove the row") from error


class _Row(NamedTuple):
    turns: tuple[Turn, ...]
    clips: "tuple[_Clip, ...]"
    sizes: tuple[Size, ...]


class _Clip(NamedTuple):
    """Image files, or one video file of which `frames` are wanted."""

    files: tuple[Path, ...]
    frames: int = 0

    def sizes(self) -> list[Size]:
        if self.frames:
            return [video_size(self.files[0])] * self.frames
        return [image_size(file) for file in self.files]

    def pixels(self) -> list[np.ndarray]:
        if self.frames:
            return read_frames(self.files[0], self.frames)
        return [read_image(file).pixels for file in self.files]


def _clips(record: Any, root: Path, frames: int) -> list[_Clip]:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    images, video = record.get("image") or [], record.get("video")
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in (*names, video or "")):
        raise ValueError("image is not a path or a list of paths, or video is not a path")
    clips = [_Clip(tuple(root / name for name in names))] if names else []
    if video:
        path = root / video
        clips.append(_Clip(tuple(frame_files(path, frames))) if path.is_dir() else _Clip((path,), frames))
    return clips


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
