"""Frames of a video: of a folder of images, or of a file through PyAV (extra `video`).

T frames, H, W pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from g2vlm.errors import InputError, MissingExtra
from g2vlm.images import list_images


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, the first and the last among them, evenly spread."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})


def frame_files(folder: Path, wanted: int) -> list[Path]:
    """At most `wanted` images of a folder in natural order, evenly spread.

    Raises:
        InputError: it holds no image.
    """
    files = list_images(folder)
    return [files[i] for i in spread(len(files), wanted)]


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
        end = float((stream.duration or 0) * (stream.time_base or 0)) or float(container.duration or 0) / 1e6
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
    wanted = [end * (i + 0.5) / count for i in range(count)]
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
