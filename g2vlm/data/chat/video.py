"""Frames of a video: of a folder of images, or of a file through PyAV (extra `video`).

T frames, H, W pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from g2vlm.errors import InputError, MissingExtra


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, the first and the last among them, evenly spread."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})


class Timing(NamedTuple):
    """When the frames of a video were taken, in seconds from its start, and how long all of it lasts."""

    duration: float
    times: tuple[float, ...]


def folder_timing(total: int, indices: Sequence[int], fps: float) -> Timing:
    """Of the frames with these numbers among `total` frames, `fps` a second."""
    return Timing(total / fps, tuple(index / fps for index in indices))


def file_timing(path: Path, count: int) -> Timing:
    """Of the frames that `read_frames` takes, from the file's header; errors as in `video_size`.

    Raises:
        InputError: the header does not say how long the video is.
    """
    with _opened(path) as container:
        end = _duration(container)
    if end <= 0:
        fix = "write it into a container such as MP4, or use a folder of frames with fps"
        raise InputError(f"cannot tell the times of frames of {path}", "the file does not say how long it is", fix)
    return Timing(end, tuple(_middles(end, count)))


def video_size(path: Path) -> tuple[int, int]:
    """(H, W) of a video file, from its header.

    Raises:
        MissingExtra: PyAV is not installed.
        InputError: the file cannot be read.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


def read_frames(path: Path, count: int) -> list[np.ndarray]:
    """`count` frames (H, W, 3) uint8 RGB at evenly spread times of a video file; errors as in `video_size`.

    A bare stream that knows neither its length nor the times of its frames is decoded twice, and its frames are taken
    as evenly spread in time.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        end = _duration(container)
        first, unit = stream.start_time or 0, stream.time_base
        timed = (
            (float((frame.pts - first) * unit), frame) for frame in container.decode(stream) if frame.pts is not None
        )
        found = _shown(timed, end, count) if end > 0 else []
    return found or _read_untimed(path, count)


def _read_untimed(path: Path, count: int) -> list[np.ndarray]:
    with _opened(path) as container:
        total = sum(1 for _ in container.decode(video=0))
    with _opened(path) as container:
        found = _shown(enumerate(container.decode(video=0)), total, count)
    if not found:
        raise InputError(f"cannot read video  {path}", "it holds no frame", "remove or replace it")
    return found


def _shown(timed: Iterable[tuple[float, Any]], end: float, count: int) -> list[np.ndarray]:
    """What is on the screen in the middle of each of `count` equal parts of a video; nothing of one without frames."""
    wanted = _middles(end, count)
    found: list[np.ndarray] = []
    on_screen: Any = None
    for time, frame in timed:
        on_screen = on_screen or frame
        while len(found) < count and time > wanted[len(found)]:
            found.append(on_screen.to_ndarray(format="rgb24"))
        on_screen = frame
        if len(found) == count:
            break
    return found + [on_screen.to_ndarray(format="rgb24")] * (count - len(found)) if on_screen else []


def _middles(end: float, count: int) -> list[float]:
    return [end * (i + 0.5) / count for i in range(count)]


def _duration(container: Any) -> float:
    """In seconds; 0 if the file does not say."""
    stream = container.streams.video[0]
    return float((stream.duration or 0) * (stream.time_base or 0)) or float(container.duration or 0) / 1e6


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra(
            f"cannot read video  {path}",
            "PyAV is not installed",
            "pip install 'g2vlm[video]', or use folders of frames",
        ) from None
    try:
        with av.open(str(path)) as container:
            yield container
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"cannot read video  {path}", str(error), "remove or replace it") from error
