"""Lines of a large text file by number, found by their byte offsets."""

from pathlib import Path

import numpy as np

from g2vlm.errors import InputError

CHUNK = 1 << 24
NEWLINE = 10


class Lines:
    """The lines of a file that are not empty; sixteen bytes of memory each, whatever their length.

    `numbers` has their line numbers, from 1.

    Args:
        path: of the file.

    Raises:
        InputError: it cannot be read, or holds no line.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            edges = _line_edges(path)
        except OSError as error:
            raise InputError(f"cannot read  {path}", error.strerror or str(error), "check the path") from error
        filled = np.diff(edges) > 1
        self._starts, self.numbers = edges[:-1][filled], np.flatnonzero(filled) + 1
        if not filled.any():
            raise InputError(f"nothing in  {path}", "the file has no line", "check the file")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        """One line with its end.

        Raises:
            InputError: the file cannot be read any more.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(int(self._starts[index]))
                return file.readline()
        except OSError as error:
            raise InputError(f"cannot read  {self.path}", error.strerror or str(error), "check the path") from error


def _line_edges(path: Path) -> np.ndarray:
    """Offsets (n + 1,) int64 of the starts of all lines and of what would follow the last, read in chunks."""
    starts, position = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == NEWLINE)
            starts.append(ends.astype(np.int64) + position + 1)
            position += len(chunk)
    return np.append(np.concatenate(starts), position + 1)
