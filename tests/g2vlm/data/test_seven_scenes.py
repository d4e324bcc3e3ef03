import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g2vlm.data.frames import FrameSource
from g2vlm.data.seven_scenes import SevenScenesSource, in_metres, move_to_colour_camera, sequence_folders
from g2vlm.errors import InputError
from tests.g2vlm.data.scenes import kinect_view, write_seven_scenes


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("7scenes")
    write_seven_scenes(root / "office" / "seq-01")
    write_seven_scenes(root / "office" / "seq-02", suffix="jpg")
    (root / "office" / "TrainSplit.txt").write_text("sequence1 \n")
    (root / "office" / "TestSplit.txt").write_text("sequence2\n\n")
    return root


@pytest.fixture
def layout(written: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(written, tmp_path / "7scenes")


def names(source: FrameSource) -> list[str]:
    return [source.facts(scene).name for scene in range(len(source))]


# ---------------------------------------------------------------------------------------------- layout


def test_sequences_of_a_set_a_scene_and_one_folder(written: Path) -> None:
    assert names(SevenScenesSource(written)) == ["office/seq-01", "office/seq-02"]
    assert names(SevenScenesSource(written / "office")) == ["office/seq-01", "office/seq-02"]
    assert names(SevenScenesSource(written / "office" / "seq-02")) == ["office/seq-02"]


def test_splits(layout: Path) -> None:
    assert names(SevenScenesSource(layout, split="train")) == ["office/seq-01"]
    assert names(SevenScenesSource(layout, split="test")) == ["office/seq-02"]
    (layout / "office" / "TestSplit.txt").unlink()
    assert names(SevenScenesSource(layout, split="test")) == ["office/seq-02"]  # the published list: 2, 6, 7, 9
    (layout / "office").rename(layout / "cellar")
    with pytest.raises(InputError, match="unknown split"):
        SevenScenesSource(layout, split="test")
    (layout / "cellar" / "TestSplit.txt").write_text("seq-01\n")
    with pytest.raises(InputError, match=r"TestSplit\.txt"):
        SevenScenesSource(layout, split="test")


def test_frames_come_with_exact_poses_from_both_image_formats(written: Path) -> None:
    source = SevenScenesSource(written)
    for scene, tolerance in ((0, 0), (1, 60)):  # lossless and lossy
        for index in range(3):
            pose, _, colours, _ = kinect_view(index, 3)
            frame = source.read_frame(scene, index)
            assert frame.cam_to_world is not None
            np.testing.assert_allclose(frame.cam_to_world, pose, atol=1e-6)
            assert np.abs(frame.image.astype(int) - colours).max() <= tolerance
    assert source.facts(0).is_metric
    assert source.facts(0).license_class == "noncommercial"


def test_strided_frames_are_chosen_by_number(written: Path) -> None:
    source = SevenScenesSource(written)  # frames 0, 20, 40
    assert source.strided(0, 40) == [0, 2]
    assert source.strided(0, 200) == [0]


# ---------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("view", [0, 1, 2])
def test_moved_depth_is_what_the_colour_camera_sees(view: int) -> None:
    _, depth, _, truth = kinect_view(view, 3)
    moved = in_metres(move_to_colour_camera(np.rint(depth * 1000).astype(np.uint16), clean=True))
    known = moved > 0
    assert known.mean() > 0.75  # 0.8 of the area is covered: (525 / 585)^2
    error = np.abs(moved - truth)[known]
    assert np.median(error) < 2e-3
    assert (error < 0.02).mean() > 0.97  # the rest are edges


@pytest.mark.parametrize(
    ("row", "column", "stored", "landing"),
    [
        (240, 320, 2000, (236, 310, 2001)),
        (100, 200, 1234, (111, 197, 1231)),
        (400, 600, 3456, (378, 562, 3478)),
        (50, 620, 800, (66, 567, 803)),
        (300, 30, 9000, (291, 54, 8973)),
        (479, 320, 1500, (450, 308, 1506)),
        (11, 17, 650, (31, 22, 647)),
    ],
)
def test_single_pixels_land_where_the_formula_says(
    row: int, column: int, stored: int, landing: tuple[int, int, int]
) -> None:
    """Calculated one by one in plain Python: centres at 0.5, rounded half to even, millimetres cut off."""
    depth = np.zeros((480, 640), np.uint16)
    depth[row, column] = stored
    moved = move_to_colour_camera(depth, clean=False)
    assert (*np.argwhere(moved)[0].tolist(), int(moved.max())) == landing
    assert np.count_nonzero(moved) == 1


def test_moving_needs_the_calibration() -> None:
    """The depth as stored, or only rescaled to the other focal length, does not fit the colour camera as well."""
    _, depth, _, truth = kinect_view(1, 3)
    assert np.median(np.abs(depth - truth)) > 5e-3


def test_the_invalid_code_wraps_in_the_published_mode_only() -> None:
    everything = np.full((480, 640), 65535, np.uint16)
    moved = move_to_colour_camera(everything, clean=False)
    bogus = (moved > 0) & (moved <= 498)
    assert 0.47 < bogus.sum() / (moved > 0).sum() < 0.51  # geometry_eval 3.2: about 49%
    assert moved[(moved > 0) & ~bogus].min() > 65_000
    assert (in_metres(moved)[bogus] < 0.5).all()
    assert not move_to_colour_camera(everything, clean=True).any()


def test_the_nearest_surface_wins_and_metres_are_limited() -> None:
    stored = np.zeros((480, 640), np.uint16)
    stored[100, 400], stored[101, 382] = 700, 4000  # both land at (111, 368), the farther one later
    moved = move_to_colour_camera(stored, clean=True)
    assert np.argwhere(moved).tolist() == [[111, 368]]
    assert 600 < moved[111, 368] < 800
    limits = in_metres(np.array([0, 1, 10_000, 10_001, 65_535], np.uint16))
    np.testing.assert_array_equal(limits, np.float32([0, 1e-3, 10, 0, 0]))


def test_modes(layout: Path, caplog: pytest.LogCaptureFixture) -> None:
    def depth(mode: str) -> np.ndarray:
        caplog.clear()
        frame = SevenScenesSource(layout, depth=mode).read_frame(0, 0)  # pyright: ignore[reportArgumentType]
        assert frame.depth is not None
        assert frame.intrinsics is not None
        assert frame.intrinsics[0, 0] == (585 if mode == "rawdepth" else 525)
        return frame.depth

    caplog.set_level(logging.INFO)
    raw, clean, compatible = depth("rawdepth"), depth("proj_clean"), depth("proj")
    assert not raw[:40, -60:].any()
    assert clean.max() < 7
    assert (clean[clean > 0] > 0.5).all()
    assert ((compatible > 0) & (compatible < 0.5)).sum() > 1000  # the wrapped corner
    Image.fromarray(np.full((480, 640), 1234, np.uint16)).save(
        layout / "office" / "seq-01" / "frame-000000.depth.proj.png"
    )
    assert (depth("proj") == np.float32(1.234)).all()
    assert "found beside the frames" in caplog.text
    np.testing.assert_array_equal(depth("proj_clean"), clean)
    assert "moved to the colour camera" in caplog.text


def test_prepared_depth_alone_serves_the_published_mode(layout: Path) -> None:
    folder = layout / "office" / "seq-01"
    (folder / "frame-000000.depth.png").rename(folder / "frame-000000.depth.proj.png")
    SevenScenesSource(layout, depth="proj").read_frame(0, 0)
    with pytest.raises(InputError, match=r"frame-000000\.depth\.png"):
        SevenScenesSource(layout).read_frame(0, 0)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0 0\n0 1 0 0\n0 0 1 0\n", "shape"),
        ("1 0 0 0\n0 1 0\n0 0 1 0\n0 0 0 1\n", "matrix"),
        ("nan nan nan nan\n" * 4, "not finite"),
        ("-inf 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "not finite"),
        ("1 0 0 x\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "x"),
        ("2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "rotation"),
        ("", "shape"),
        (b"\xff\xfe\x00", "decode"),
        (None, "No such file"),
    ],
)
def test_bad_poses_are_named(layout: Path, text: str | bytes | None, message: str) -> None:
    path = layout / "office" / "seq-01" / "frame-000000.pose.txt"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=rf"(?s)frame-000000\.pose\.txt.*{message}"):
        SevenScenesSource(layout).read_frame(0, 0)


def test_other_sizes_are_refused(layout: Path) -> None:
    folder = layout / "office" / "seq-01"
    Image.fromarray(np.zeros((240, 320, 3), np.uint8)).save(folder / "frame-000000.color.png")
    with pytest.raises(InputError, match=r"frame-000000\.color\.png.*\n.*320 x 240"):
        SevenScenesSource(layout).read_frame(0, 0)
    Image.fromarray(np.zeros((240, 320), np.uint16)).save(folder / "frame-000020.depth.png")
    with pytest.raises(InputError, match=r"frame-000020\.depth\.png.*\n.*320 x 240"):
        SevenScenesSource(layout).read_frame(0, 1)


def test_missing_folders_and_wrong_options(tmp_path: Path, written: Path) -> None:
    with pytest.raises(InputError, match="missing data folder"):
        sequence_folders(tmp_path / "nothing")
    with pytest.raises(InputError, match="no sequences"):
        sequence_folders(tmp_path)
    with pytest.raises(InputError, match="unknown depth"):
        SevenScenesSource(written, depth="raw")  # pyright: ignore[reportArgumentType]
