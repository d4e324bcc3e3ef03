"""7-Scenes in its official layout, with the constants of its evaluation protocols (geometry_eval sections 3.1, 3.2).

`<scene>/seq-XX/frame-000000.{color.png|color.jpg,depth.png,pose.txt}`, `TrainSplit.txt`, `TestSplit.txt`. Colour and
depth are different cameras: 525 and 585 pixels of focal length, 26 mm apart. Depth is uint16 millimetres with 0 and
65535 invalid; poses are camera-to-world. Three ways to use the depth:

- `proj`: moved to the colour camera as in the preparation behind published tables, its defect included: the code 65535
  is taken for 65.535 m, and about half of those pixels come out as 1 to 498 mm. For comparison.
- `proj_clean`: the same with 65535 removed first. For everything else.
- `rawdepth`: as stored, with the depth camera's intrinsics; it does not fit the colours. For comparison.

In all modes the pose file is used unchanged, as published tables do. Files `frame-*.depth.proj.png` that lie beside the
frames come from the published preparation and are used in mode `proj` only; otherwise the depth is moved here.
h, w pixels of a stored frame: 480, 640.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from g2vlm.data.frames import INVALID_CODE, Frame, FrameSource, SceneFacts, read_pose_file, read_stored_depth
from g2vlm.errors import InputError
from g2vlm.images import natural_key, read_image

log = logging.getLogger(__name__)

DepthMode = Literal["proj", "proj_clean", "rawdepth"]
Split = Literal["all", "train", "test"]
HEIGHT, WIDTH = 480, 640
DEPTH_FOCAL, COLOUR_FOCAL, CENTRE = 585.0, 525.0, (320.0, 240.0)
NEAREST, FARTHEST = 1e-3, 10.0  # metres; evaluators drop what lies outside
SPLAT_LIMIT = 100.0  # metres; the published preparation keeps 0 < z < 100
STRIDES = {"dense": 40, "sparse": 200}  # every n-th frame from 0: 7scenes-dense, 7scenes-sparse
TEST_SEQUENCES = {
    "chess": (3, 5), "fire": (3, 4), "heads": (1,), "office": (2, 6, 7, 9), "pumpkin": (1, 7),
    "redkitchen": (3, 4, 6, 12, 14), "stairs": (1, 4),
}  # fmt: skip
# Depth camera to colour camera: a public calibration of a Kinect v1, used by every published preparation of this set.
DEPTH_TO_COLOUR = np.array([
    [0.99996518012567637, 0.0026765126468950343, -0.0079041012313000904, -0.025558943178152542],
    [-0.0027409311281316700, 0.99996302803027592, -0.0081504520778013286, 0.00010109636268061706],
    [0.0078819942130445332, 0.0081718328771890631, 0.99993554558014031, 0.0020318321729487039],
    [0, 0, 0, 1],
])  # fmt: skip


class SevenScenesSource(FrameSource):
    """Sequences of 7-Scenes; one sequence is one scene, named `redkitchen/seq-01`.

    Args:
        root: the folder of all scenes, of one scene, or of one sequence.
        split: sequences listed in the scenes' split files; without the file the published test sequences.
        depth: see the module.
        options: those of FrameSource.
    """

    name = "seven_scenes"

    def __init__(self, root: Path, *, split: Split = "all", depth: DepthMode = "proj_clean", **options: Any):
        super().__init__(**options)
        for field, value, choices in (("split", split, get_args(Split)), ("depth", depth, get_args(DepthMode))):
            if value not in choices:
                raise InputError(f"unknown {field}  {value}", "", f"one of {', '.join(choices)}")
        self.depth: DepthMode = depth
        self.folders = [folder for folder in sequence_folders(Path(root)) if split == "all" or in_split(folder, split)]
        if not self.folders:
            raise InputError(f"no {split} sequences in  {root}", "the split files name none of the folders", "")
        self._names: dict[int, list[str]] = {}
        self._said: set[str] = set()

    def __len__(self) -> int:
        return len(self.folders)

    def facts(self, scene: int) -> SceneFacts:
        """Metric, of a noisy sensor, for non-commercial research."""
        folder = self.folders[scene].resolve()
        return SceneFacts(f"{folder.parent.name}/{folder.name}", "7scenes", True, "middle", "noncommercial")

    def frame_names(self, scene: int) -> Sequence[str]:
        """`frame-000000`, ... : every frame that has a colour image."""
        if scene not in self._names:
            images = self.folders[scene].glob("frame-*.color.*")
            found = {path.name.split(".")[0] for path in images if path.suffix in (".png", ".jpg")}
            self._names[scene] = sorted(found, key=lambda name: natural_key(Path(name)))
        return self._names[scene]

    def read_frame(self, scene: int, index: int) -> Frame:
        """One frame with the depth of this source's mode."""
        folder, name = self.folders[scene], self.frame_names(scene)[index]
        colour = folder / f"{name}.color.png"
        image = read_image(colour if colour.exists() else colour.with_suffix(".jpg")).pixels
        focal = DEPTH_FOCAL if self.depth == "rawdepth" else COLOUR_FOCAL
        K = np.array([[focal, 0, CENTRE[0]], [0, focal, CENTRE[1]], [0, 0, 1]])
        pose = read_pose_file(folder / f"{name}.pose.txt")
        if image.shape != (HEIGHT, WIDTH, 3):
            why = f"it has {image.shape[1]} x {image.shape[0]} pixels, not {WIDTH} x {HEIGHT}"
            raise InputError(f"wrong image size  {colour}", why, "the intrinsics of 7-Scenes belong to that size")
        return Frame(f"{folder.name}/{name}", image, in_metres(self._stored(folder, name)), K, pose)

    def strided(self, scene: int, stride: int) -> list[int]:
        """Indices of the frames whose number is a multiple of `stride`: a protocol's frame list for this scene."""
        return [i for i, name in enumerate(self.frame_names(scene)) if int(name.removeprefix("frame-")) % stride == 0]

    def _stored(self, folder: Path, name: str) -> np.ndarray:
        """(h, w) uint16 millimetres in the camera of this source's mode."""
        raw, moved = folder / f"{name}.depth.png", folder / f"{name}.depth.proj.png"
        if self.depth == "proj" and moved.exists():
            self._say("depth: the depth.proj.png files found beside the frames")
            return _checked(read_stored_depth(moved), moved)
        depth = _checked(read_stored_depth(raw), raw)
        if self.depth == "rawdepth":
            self._say("depth: as stored, in the depth camera; it does not fit the colours")
            return depth
        self._say("depth: depth.png moved to the colour camera")
        return move_to_colour_camera(depth, clean=self.depth == "proj_clean")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.info("%s %s", self.name, text)


def _checked(depth: np.ndarray, path: Path) -> np.ndarray:
    if depth.shape != (HEIGHT, WIDTH):
        why = f"it has {depth.shape[1]} x {depth.shape[0]} pixels, not {WIDTH} x {HEIGHT}"
        raise InputError(f"wrong depth size  {path}", why, "the intrinsics of 7-Scenes belong to that size")
    return depth


# ---------------------------------------------------------------------------------------------- files


def sequence_folders(root: Path) -> list[Path]:
    """Every folder `seq-XX` of a data set, of a scene, or `root` itself when it is one.

    Raises:
        InputError: there is none, or `root` is no folder.
    """
    if not root.is_dir():
        raise InputError(f"missing data folder  {root}", "there is no folder of that name", "check the spelling")
    if re.fullmatch(r"seq-\d+", root.resolve().name):
        return [root]
    found = [path for pattern in ("seq-*", "*/seq-*") for path in root.glob(pattern) if path.is_dir()]
    if not found:
        fix = "expected <scene>/seq-01/frame-000000.color.png; the archives inside a scene must be unpacked"
        raise InputError(f"no sequences in  {root}", "there is no folder seq-XX", fix)
    return sorted(found, key=natural_key)


def in_split(sequence: Path, split: Split) -> bool:
    """Whether a sequence belongs to a split, by the split file of its scene or else by the published list."""
    scene, number = sequence.resolve().parent, int(sequence.resolve().name.removeprefix("seq-"))
    file = scene / ("TrainSplit.txt" if split == "train" else "TestSplit.txt")
    if file.is_file():
        return number in read_split(file)
    if scene.name not in TEST_SEQUENCES:
        raise InputError(f"unknown split of  {sequence}", f"{file} is missing", "add the split file")
    return (number in TEST_SEQUENCES[scene.name]) == (split == "test")


def read_split(path: Path) -> list[int]:
    """Numbers of the sequences in lines like `sequence3`.

    Raises:
        InputError: a line of another form.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read  {path}", str(error), "check the file") from error
    numbers = [re.fullmatch(r"sequence\s*(\d+)", line) for line in lines]
    if None in numbers:
        raise InputError(f"cannot read  {path}", f"unexpected line {lines[numbers.index(None)]!r}", "e.g. sequence3")
    return [int(match[1]) for match in numbers if match]


# ---------------------------------------------------------------------------------------------- depth


def in_metres(stored: np.ndarray) -> np.ndarray:
    """(h, w) float32 metres, 0 where invalid: 0, 65535, or outside 1 mm .. 10 m."""
    depth = np.where(stored == INVALID_CODE, 0, stored.astype(np.float32) / 1000)
    return np.where((depth >= NEAREST) & (depth <= FARTHEST), depth, 0).astype(np.float32)


def move_to_colour_camera(stored: np.ndarray, clean: bool) -> np.ndarray:
    """Depth of the depth camera seen from the colour camera, as in the published preparation (geometry_eval 3.2).

    A pixel is lifted at its centre, 0.5 from its index, and lands at the index nearest to its new coordinate (half to
    even): the half pixel is not taken off again, so the result fits (320, 240) on the integer grid. The nearest depth
    wins; pixels that nothing reaches stay 0; millimetres are cut off to uint16, beyond 65.535 m they wrap around.

    Args:
        stored: (480, 640) uint16 millimetres.
        clean: remove the code 65535 first; the published preparation does not.
    """
    if clean:
        stored = np.where(stored == INVALID_CODE, 0, stored)
    z = stored / 1000.0
    rows, columns = np.nonzero((z > 0) & (z < SPLAT_LIMIT))
    z = z[rows, columns]
    x, y = (columns + 0.5 - CENTRE[0]) / DEPTH_FOCAL * z, (rows + 0.5 - CENTRE[1]) / DEPTH_FOCAL * z
    x, y, z = DEPTH_TO_COLOUR[:3, :3] @ np.stack([x, y, z]) + DEPTH_TO_COLOUR[:3, 3:]
    u = np.rint(x / z * COLOUR_FOCAL + CENTRE[0]).astype(int)
    v = np.rint(y / z * COLOUR_FOCAL + CENTRE[1]).astype(int)
    inside = (u >= 0) & (u < WIDTH) & (v >= 0) & (v < HEIGHT)
    nearest = np.full((HEIGHT, WIDTH), np.inf)
    np.minimum.at(nearest, (v[inside], u[inside]), z[inside])
    millimetres = np.where(np.isinf(nearest), 0, nearest * 1000)
    return millimetres.astype(np.int64).astype(np.uint16)  # through int64, so that the wrap is the same everywhere
