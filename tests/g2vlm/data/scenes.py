"""Exact scenes of the box room as frames, and writers of the layouts that the readers read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from g2vlm.data.canonical import SceneWriter
from g2vlm.data.frames import Frame, SceneFacts
from g2vlm.data.seven_scenes import DEPTH_TO_COLOUR
from tests.g2vlm.rooms import camera, look

FACTS = SceneFacts("room", "test", is_metric=True, license_class="permissive")
_BESIDE = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents[4:]]
SHARED_DATA = next((folder for folder in _BESIDE if folder.is_dir()), _BESIDE[0])
COLOUR_K = np.array([[525.0, 0, 320], [0, 525, 240], [0, 0, 1]])
DEPTH_K = np.array([[585.0, 0, 319.5], [0, 585, 239.5], [0, 0, 1]])  # the published 320, 240 with centres at 0.5


@cache
def room_frames(num_views: int = 4, size: tuple[int, int] = (84, 112)) -> tuple[Frame, ...]:
    """Views of the box room with exact depth and cameras."""
    height, width = size
    K = np.array([[0.8 * width, 0, (width - 1) / 2], [0, 0.8 * width, (height - 1) / 2], [0, 0, 1]])
    frames = []
    for view in range(num_views):
        pose = camera(view, num_views)
        local, _, colours = look(pose, K, size)
        frames.append(Frame(f"view-{view:02d}", colours, local[..., 2].astype(np.float32), K, pose))
    return tuple(frames)


def changed(frames: Sequence[Frame], **functions) -> list[Frame]:
    """Frames with fields replaced by functions of them."""
    return [replace(frame, **{name: f(getattr(frame, name)) for name, f in functions.items()}) for frame in frames]


def write_canonical(folder: Path, frames: Sequence[Frame] | None = None, **options) -> Path:
    """A scene folder of the box room."""
    SceneWriter(folder, FACTS, **options).write(room_frames() if frames is None else frames)
    return folder


@cache
def kinect_view(view: int, num_views: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pose of the depth camera, its depth (480, 640), and colours and depth of the colour camera beside it."""
    pose = camera(view, num_views)
    depth = look(pose, DEPTH_K, (480, 640))[0][..., 2]
    local, _, colours = look(pose @ np.linalg.inv(DEPTH_TO_COLOUR), COLOUR_K, (480, 640))
    return pose, depth, colours, local[..., 2]


def write_seven_scenes(folder: Path, num_views: int = 3, step: int = 20, suffix: str = "png") -> Path:
    """One sequence of the box room in the official layout, frames `step` apart; a corner has the code 65535."""
    folder.mkdir(parents=True)
    for view in range(num_views):
        pose, depth, colours, _ = kinect_view(view, num_views)
        name = folder / f"frame-{view * step:06d}"
        stored = np.rint(depth * 1000).astype(np.uint16)
        stored[:40, -60:] = 65535
        Image.fromarray(stored).save(f"{name}.depth.png")
        Image.fromarray(colours).save(f"{name}.color.{suffix}", quality=95)
        write_pose(Path(f"{name}.pose.txt"), pose)
    return folder


def write_pose(path: Path, pose: np.ndarray) -> None:
    """As in the release: tabs, three-digit exponents."""
    rows = ["\t ".join(f"{value: .7e}".replace("e+", "e+0").replace("e-", "e-0") for value in row) for row in pose]
    path.write_text("\t \n".join(rows) + "\t \n", encoding="utf-8")
