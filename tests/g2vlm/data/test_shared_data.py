"""Real data beside the checkout, where it exists; nothing of it is part of the project."""

from pathlib import Path

import numpy as np
import pytest

from g2vlm.data.canonical import CanonicalSource, SceneWriter
from g2vlm.data.checks import CheckRules, check_source
from g2vlm.data.frames import Frame, SceneFacts, read_pose_file, read_stored_depth
from g2vlm.data.seven_scenes import SevenScenesSource, in_metres, move_to_colour_camera
from g2vlm.data.types import ViewRequest
from g2vlm.images import read_image
from tests.g2vlm.data.scenes import SHARED_DATA

FEW = CheckRules(max_frames=12)


def data(name: str) -> Path:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"no {name} beside the checkout")
    return SHARED_DATA / name


@pytest.mark.parametrize("depth", ["proj", "proj_clean"])
def test_kitchen_passes(depth: str) -> None:
    source = SevenScenesSource(data("seven_scenes"), depth=depth)  # pyright: ignore[reportArgumentType]
    scene = check_source(source, FEW).scenes[0]
    assert scene.verdict == "ok"
    assert scene.agreement is not None
    assert scene.agreement.pairs > 40
    assert scene.agreement.error < 0.012


def test_kitchen_with_swapped_poses_fails() -> None:
    class Swapped(SevenScenesSource):
        def read_frame(self, scene: int, index: int) -> Frame:
            frame = super().read_frame(scene, index)
            assert frame.cam_to_world is not None
            return Frame(frame.name, frame.image, frame.depth, frame.intrinsics, np.linalg.inv(frame.cam_to_world))

    report = check_source(Swapped(data("seven_scenes")), FEW)
    assert "look like world_to_cam" in report.failures[0]


def test_kitchen_depth_moves_as_it_was_moved_for_us() -> None:
    """The files beside the frames were made with integer pixels and rounding: single pixels differ, surfaces do not."""
    source = SevenScenesSource(data("seven_scenes"))
    folder, name = source.folders[0], source.frame_names(0)[30]
    ours = in_metres(move_to_colour_camera(read_stored_depth(folder / f"{name}.depth.png"), clean=True))
    theirs = in_metres(read_stored_depth(folder / f"{name}.depth.proj.png"))
    common = (ours > 0) & (theirs > 0)
    assert common.mean() > 0.65
    assert np.median(np.abs(ours - theirs)[common]) < 5e-3


def test_stairs_read_and_their_invalid_codes_go() -> None:
    source = SevenScenesSource(data("seven_scenes_stairs_tiny"))
    assert len(source) == 4
    assert len(SevenScenesSource(data("seven_scenes_stairs_tiny"), split="test")) == 2
    sample = source.load(1, ViewRequest(3, (84, 112), 0))
    assert sample.depth is not None
    assert sample.valid is not None
    assert sample.depth[sample.valid].min() > 0.5
    compatible = SevenScenesSource(data("seven_scenes_stairs_tiny"), depth="proj").read_frame(1, 0).depth
    assert compatible is not None
    assert ((compatible > 0) & (compatible < 0.5)).sum() > 1000
    assert check_source(source).failures == []


def pi3_room() -> list[Frame]:
    folder = data("pi3_room")
    with np.load(folder / "condition.npz") as arrays:
        depths, poses, K = (arrays[name] for name in ("depths", "poses", "intrinsics"))
    return [
        Frame(
            f"{i}", read_image(folder / "rgb" / f"{i}.png").pixels, depth, intrinsics.astype(float), pose.astype(float)
        )
        for i, (depth, intrinsics, pose) in enumerate(zip(depths, K, poses, strict=True))
    ]


def apc_shelf() -> list[Frame]:
    folder = data("apc_shelf")
    K = np.loadtxt(folder / "intrinsics.K.txt")
    return [
        Frame(
            path.name.split(".")[0],
            read_image(path).pixels,
            in_metres(read_stored_depth(Path(str(path).replace("color", "depth")))),
            K * [[1, 0, 1], [0, 1, 1], [1, 1, 1]],
            read_pose_file(Path(str(path).replace("color.png", "pose.txt"))),
        )
        for path in sorted(folder.glob("*.color.png"))
    ]


@pytest.mark.parametrize("frames", [pi3_room, apc_shelf])
def test_other_real_scenes_pass_in_our_format(tmp_path: Path, frames) -> None:
    SceneWriter(tmp_path, SceneFacts("scene", "test", is_metric=True)).write(frames())
    report = check_source(CanonicalSource(tmp_path))
    assert report.failures == []
    assert report.scenes[0].agreement is not None
    assert report.scenes[0].agreement.error < 0.01
