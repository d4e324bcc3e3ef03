"""SPAR's spatial questions with posed views, from parquet files (extra `data`).

A row has `question`, `answer`, `scene_name`, `dataset_name`, `image_list`, `depth_list`, `poses`, `intrinsic`,
`depth_intrinsic` and `metadata` (g2vlm_model section 11); what follows `answer` may be null. Paths are relative to the
media root, poses camera-to-world with OpenCV axes, depth 16-bit PNG. S views, h, w pixels of a stored depth map.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from g2vlm.data.chat.marks import draw_marks, read_marks
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt, Turn
from g2vlm.data.frames import Frame, SceneFacts, assemble, checked_pose, read_stored_depth
from g2vlm.data.transforms import move_intrinsics, whole_box
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError, MissingExtra
from g2vlm.images import image_size, natural_key, read_image, resize

COLUMNS = (
    "question", "answer", "scene_name", "dataset_name", "image_list", "depth_list", "poses", "intrinsic",
    "depth_intrinsic", "metadata",
)  # fmt: skip
NEEDED = ("question", "answer", "image_list")
MILLIMETRES, MATTERPORT = 1000.0, 4000.0  # units per metre of stored depth
FARTHEST = 80.0  # metres; deeper pixels are invalid (released joint data)


class SparChats:
    """The rows of a parquet file, or of all in a folder.

    Args:
        root: file or folder.
        media_root: folder that paths are relative to; by default the folder of the parquet files.
        geometry: the images are also the views of a scene.
        view_size: (H, W) of the views, cropped around the principal point.

    Raises:
        MissingExtra: pyarrow is not installed.
        InputError: no parquet file, or one that is damaged or lacks a column.
    """

    name = "spar"

    def __init__(
        self,
        root: Path,
        media_root: str | None = None,
        geometry: bool = True,
        view_size: Sequence[int] = (518, 518),
    ):
        self.files = sorted(root.rglob("*.parquet"), key=natural_key) if root.is_dir() else [root]
        if not self.files:
            raise InputError(f"no parquet files in  {root}", "neither there nor below", "check root")
        self.media_root = Path(media_root) if media_root is not None else root if root.is_dir() else root.parent
        self.geometry, self.view_size = geometry, (view_size[0], view_size[1])
        self._groups = [group for file in self.files for group in _row_groups(file)]
        self._ends = list(accumulate(rows for _, _, rows in self._groups))
        self._read: tuple[int, list[dict[str, Any]]] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def shape(self, index: int, seed: int) -> ChatShape:
        """From the row and the headers of its images."""
        row = self._row(index)
        sizes = tuple(image_size(file) for file in row.images)
        return ChatShape((row.turn,), sizes, *((len(sizes), self.view_size) if self.geometry else (0, (0, 0))))

    def load(self, index: int, seed: int) -> ChatSample:
        """The row with its images, used as listed; nothing is random."""
        row = self._row(index)
        images = [read_image(file).pixels for file in row.images]
        scene = row.scene(images, self.media_root, self.view_size) if self.geometry else None
        marked = draw_marks(images, row.marks)
        return ChatSample(row.turn.parts, row.turn.answer, marked, scene, f"{self.name}/{index}", row.task)

    def _row(self, index: int) -> "_Row":
        group = bisect_right(self._ends, index)
        if self._read is None or self._read[0] != group:
            file, number, _ = self._groups[group]
            self._read = group, _open(file).read_row_group(number).to_pylist()
        rows = self._read[1]
        place = f"{self._groups[group][0]}:{index}"
        try:
            row = _Row(rows[index - self._ends[group]], self.media_root, place)
            row.marks  # noqa: B018 (refuses a damaged row before a pack counts on it)
            return row
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"bad row  {place}", str(error), "remove the row") from error


class _Row:
    """One record, read when asked.

    Raises:
        ValueError: what a row must have is missing.
    """

    def __init__(self, record: Mapping[str, Any], media_root: Path, place: str):
        self.record, self.place = record, place
        if not record["image_list"] or not all(isinstance(record[key], str) for key in NEEDED[:2]):
            raise ValueError("no images, or question or answer is not a text")
        self.images = [media_root / name for name in record["image_list"]]
        parts = [*(ImageAt(i) for i in range(len(self.images))), record["question"]]
        self.turn = Turn(tuple(parts), record["answer"])
        metadata = record.get("metadata")
        self.metadata: Mapping[str, Any] = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
        self.task = str(self.metadata.get("type") or self.metadata.get("task") or self.metadata.get("qa_type") or "")

    @cached_property
    def marks(self) -> list[Any]:
        return read_marks(self.metadata, len(self.images))

    def scene(self, images: Sequence[np.ndarray], media_root: Path, size: tuple[int, int]) -> SceneSample:
        """The images as views, with depth, poses and intrinsics where the row has them for all.

        Raises:
            InputError: a file of them is missing or damaged, or a matrix is none.
        """
        record, dataset = self.record, str(self.record.get("dataset_name") or "")
        depths = record.get("depth_list") or [None] * len(images)
        poses = record.get("poses") or [None] * len(images)
        frames = []
        for i, (image, depth_name, pose) in enumerate(zip(images, depths, poses, strict=True)):
            depth = None if depth_name is None else _depth(media_root / depth_name, dataset)
            K = self._intrinsics(i, (image.shape[0], image.shape[1]), depth)
            if depth is not None and depth.shape != image.shape[:2]:
                image = resize(image, (depth.shape[0], depth.shape[1]), Image.Resampling.LANCZOS)
            matrix = None if pose is None else checked_pose(np.reshape(pose, (4, 4)), f"{self.place}, view {i}")
            frames.append(Frame(str(i), image, depth, K, matrix))
        facts = SceneFacts(str(record.get("scene_name") or ""), dataset or "spar", is_metric=True)
        return assemble(frames, facts, size)

    def _intrinsics(self, view: int, size: tuple[int, int], depth: np.ndarray | None) -> np.ndarray | None:
        """K (3, 3) of the depth map's grid, or of the image's without depth."""
        own, stored = self.record.get("intrinsic"), self.record.get("depth_intrinsic")
        if depth is not None and stored is not None:
            return _matrix(stored, view)
        if own is None:
            return None
        target = size if depth is None else (depth.shape[0], depth.shape[1])
        return move_intrinsics(_matrix(own, view), whole_box(size), target)


def _matrix(values: Any, view: int) -> np.ndarray:
    """One K for all views or one for each, 3 x 3 or 4 x 4, nested or flat -> (3, 3) float64."""
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size % 16 and numbers.size % 9:
        raise InputError("not intrinsics", f"{numbers.size} numbers", "give 3 x 3 or 4 x 4")
    side = 4 if numbers.shape[-1] in (4, 16) else 3
    matrices = numbers.reshape(-1, side, side)
    return matrices[view if len(matrices) > 1 else 0, :3, :3].copy()


def _depth(path: Path, dataset: str) -> np.ndarray:
    """(h, w) float32 metres, 0 = invalid."""
    unit = MATTERPORT if "matterport" in dataset.lower() else MILLIMETRES
    depth = read_stored_depth(path).astype(np.float32) / unit
    return np.where(depth < FARTHEST, depth, 0).astype(np.float32)


def _row_groups(file: Path) -> list[tuple[Path, int, int]]:
    """(file, number, rows) of each row group.

    Raises:
        MissingExtra: pyarrow is not installed.
        InputError: the file is damaged or lacks a column.
    """
    opened = _open(file)
    if missing := [name for name in NEEDED if name not in opened.schema_arrow.names]:
        raise InputError(f"cannot use  {file}", f"no column {', '.join(missing)}", f"columns: {', '.join(COLUMNS)}")
    metadata = opened.metadata
    return [(file, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]


def _open(file: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra(f"cannot read  {file}", "pyarrow is not installed", "pip install 'g2vlm[data]'") from None
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise InputError(f"cannot read  {file}", str(error).splitlines()[0], "check the file") from error
