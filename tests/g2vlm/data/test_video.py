"""Video files through PyAV, an optional extra: small ones, written here."""

import math
from pathlib import Path

import numpy as np
import pytest

from g2vlm.data.chat.video import file_timing, read_frames, video_size
from g2vlm.errors import InputError

av = pytest.importorskip("av")

SIZE = (48, 64)


def write(path: Path, num_frames: int = 20, size: tuple[int, int] = SIZE, container: str | None = None) -> Path:
    """Frame i has the grey value 20 + 10 i."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 800_000
        for i in range(num_frames):
            grey = np.full((*size, 3), 20 + 10 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(("name", "container"), [("a.mp4", None), ("a.avi", None), ("a.mkv", None), ("a.m4v", "m4v")])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_frames_at_the_middles_of_equal_parts(name: str, container: str | None, count: int, tmp_path: Path) -> None:
    """`m4v` is a bare stream, without length or times."""
    path = write(tmp_path / name, container=container)
    assert video_size(path) == SIZE
    frames = read_frames(path, count)
    assert [frame.shape for frame in frames] == [(*SIZE, 3)] * count
    expected = [20 + 10 * math.floor(20 * (i + 0.5) / count) for i in range(count)]
    np.testing.assert_allclose([frame.mean() for frame in frames], expected, atol=3)


def test_more_frames_than_there_are(tmp_path: Path) -> None:
    frames = read_frames(write(tmp_path / "a.mp4", num_frames=2), 6)
    assert len(frames) == 6
    np.testing.assert_allclose([frame.mean() for frame in frames], [20] * 3 + [30] * 3, atol=4)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "sound"])
def test_damaged_files_are_one_clear_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    if damage == "sound":
        with av.open(str(path), "w") as file:
            stream = file.add_stream("aac", rate=16000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            file.mux(stream.encode(samples))
            file.mux(stream.encode())
    elif damage != "missing":
        content = write(path).read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no video" * 50}[damage])
    for read in (video_size, lambda path: read_frames(path, 3)):
        with pytest.raises(InputError, match=r"cannot read video  .*a\.mp4"):
            read(path)


def test_times_of_frames_are_told_by_the_header(tmp_path: Path) -> None:
    timing = file_timing(write(tmp_path / "a.mp4"), 4)
    assert timing.duration == pytest.approx(2.0)
    assert timing.times == pytest.approx((0.25, 0.75, 1.25, 1.75))
    with pytest.raises(InputError, match="does not say how long it is"):
        file_timing(write(tmp_path / "a.m4v", container="m4v"), 4)
