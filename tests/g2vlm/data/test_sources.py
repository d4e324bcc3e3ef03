"""What all readers share: which views a sample gets, unreadable files, names of sources."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.data.canonical import CanonicalSource
from g2vlm.data.frames import orthonormal, rotation_error, view_candidates
from g2vlm.data.image_folder import ImageFolderSource
from g2vlm.data.registry import SOURCES, build_source, detect_source, option_names
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError, TooManyBadFiles
from tests.g2vlm.data.scenes import room_frames, write_canonical, write_pose


def candidates(count: int, num_views: int, seed: int, window: int = 5) -> list[int]:
    return view_candidates(count, num_views, window, np.random.default_rng(seed))


def photos(folder: Path, count: int, broken: int = 0) -> Path:
    """`count` small photos, the last `broken` of them torn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"photo{i}.png"
        Image.fromarray(np.full((40, 60, 3), i, np.uint8)).save(path)
        if i >= count - broken:
            path.write_bytes(path.read_bytes()[:60])
    return folder


# ---------------------------------------------------------------------------------------------- choosing views


@pytest.mark.parametrize(("count", "num_views"), [(1, 1), (4, 4), (3, 8), (100, 4), (100, 20), (1000, 24)])
def test_every_frame_is_a_candidate_once(count: int, num_views: int) -> None:
    for seed in range(20):
        assert sorted(candidates(count, num_views, seed)) == list(range(count))


def test_views_lie_in_a_window_and_come_shuffled() -> None:
    spans, ascending, firsts = [], 0, set()
    for seed in range(200):
        chosen = candidates(1000, 4, seed)[:4]
        spans.append(max(chosen) - min(chosen))
        ascending += chosen == sorted(chosen)
        firsts.add(chosen[0])
    assert max(spans) <= 2 * 5 * 4
    assert 1 < ascending < 25  # of 200, 1 in 24 by chance
    assert len(firsts) > 150


def test_many_views_sometimes_span_the_scene() -> None:
    spans = [np.ptp(candidates(10_000, 17, seed, window=2)[:17]) for seed in range(300)]
    assert 0.05 < np.mean(np.array(spans) > 1000) < 0.16  # a tenth


def test_substitutes_come_from_the_window_first() -> None:
    order = candidates(1000, 4, 0)
    near = [abs(i - order[0]) <= 2 * 5 * 4 for i in order]
    assert all(near[:20])
    assert not all(near[:60])


def test_equal_requests_give_equal_samples(tmp_path: Path) -> None:
    write_canonical(tmp_path, room_frames(8))
    source = CanonicalSource(tmp_path, focal_jitter=True)
    first, again, other = (source.load(0, ViewRequest(3, (56, 56), seed)) for seed in (7, 7, 8))
    for field in ("images", "depth", "intrinsics", "cam_to_world"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert first.view_ids == again.view_ids
    assert first.view_ids != other.view_ids
    assert first.intrinsics is not None
    assert first.intrinsics[:, 0, 0].unique().numel() == 3  # a zoom for each view


def test_views_of_evaluation_keep_their_order(tmp_path: Path) -> None:
    source = CanonicalSource(write_canonical(tmp_path))
    sample = source.load_views(0, [3, 0], (42, 42), "stretch")
    assert sample.view_ids == ("view-03", "view-00")
    assert sample.intrinsics is not None
    np.testing.assert_allclose(sample.intrinsics[0, :2, 2], [20.5, 20.5])
    np.testing.assert_allclose(sample.intrinsics[0, 1, 1] / sample.intrinsics[0, 0, 0], 112 / 84, rtol=1e-6)


def test_rotations_become_orthonormal(tmp_path: Path) -> None:
    pose = np.eye(4)
    pose[:3, :3] += 4e-4
    assert rotation_error(pose) > 7e-4
    assert rotation_error(orthonormal(pose)) < 1e-12
    write_pose(tmp_path / "pose.txt", pose)


# ---------------------------------------------------------------------------------------------- unreadable files


def test_damaged_images_are_left_out_and_each_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ImageFolderSource(photos(tmp_path, 40, broken=2), max_bad=0.05)
    caplog.set_level(logging.WARNING)
    for seed in range(30):
        sample = source.load(0, ViewRequest(4, (28, 42), seed))
        assert not {"photo38.png", "photo39.png"} & set(sample.view_ids)
    for name in ("photo38.png", "photo39.png"):
        assert sum(str(tmp_path / name) in record.message for record in caplog.records) == 1
    assert len(caplog.records) == 2


def test_samples_do_not_depend_on_what_was_met_before(tmp_path: Path) -> None:
    photos(tmp_path, 40, broken=2)
    fresh = [ImageFolderSource(tmp_path).load(0, ViewRequest(4, (28, 42), seed)).view_ids for seed in range(10)]
    used = ImageFolderSource(tmp_path)
    assert fresh == [used.load(0, ViewRequest(4, (28, 42), seed)).view_ids for seed in range(10)]


def test_too_many_damaged_images_stop_it(tmp_path: Path) -> None:
    source = ImageFolderSource(photos(tmp_path, 40, broken=3), max_bad=0.05)
    request = ViewRequest(40, (28, 42), 0)
    with pytest.raises(TooManyBadFiles, match="3 of 40") as error:
        source.load(0, request)
    assert error.value.code == 6


def test_views_that_cannot_be_cropped_are_left_out(tmp_path: Path) -> None:
    frames = list(room_frames(8))
    K = np.array([[100.0, 0, 5], [0, 100, 40], [0, 0, 1]])
    frames[3] = replace(frames[3], intrinsics=K)
    source = CanonicalSource(write_canonical(tmp_path, frames), max_bad=0.2)
    assert "view-03" not in source.load(0, ViewRequest(7, (56, 56), 0)).view_ids


def test_too_few_views(tmp_path: Path) -> None:
    source = ImageFolderSource(photos(tmp_path, 3))
    with pytest.raises(InputError, match="3 readable of 3, 4 asked for"):
        source.load(0, ViewRequest(4, (28, 42), 0))


# ---------------------------------------------------------------------------------------------- folders of images


def test_one_folder_or_a_folder_of_folders(tmp_path: Path) -> None:
    photos(tmp_path / "b2", 2)
    photos(tmp_path / "b10", 11)
    (tmp_path / "notes").mkdir()
    source = ImageFolderSource(tmp_path)
    assert [source.facts(i).name for i in range(len(source))] == ["b2", "b10"]
    assert source.frame_names(1)[-1] == "photo10.png"
    sample = source.load(0, ViewRequest(2, (28, 28), 0))
    assert sample.images.shape == (2, 3, 28, 28)
    assert sample.depth is None
    assert sample.cam_to_world is None
    assert sample.intrinsics is None
    for wrong, message in ((tmp_path / "notes", "no images"), (tmp_path / "none", "missing data folder")):
        with pytest.raises(InputError, match=message):
            ImageFolderSource(wrong)


# ---------------------------------------------------------------------------------------------- names


def test_sources_are_built_by_name(tmp_path: Path) -> None:
    write_canonical(tmp_path / "scenes")
    source = build_source("canonical", tmp_path / "scenes", max_bad=0.2, window=3)
    assert isinstance(source, CanonicalSource)
    assert (source.max_bad, source.window) == (0.2, 3)
    for name in set(SOURCES) - {"rooms"}:
        with pytest.raises(InputError, match="no folder was given"):
            build_source(name)
        with pytest.raises(InputError, match="missing data folder"):
            build_source(name, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seven-scenes", {}, "did you mean seven_scenes"),
        ("canonical", {"windows": 3}, "did you mean window"),
        ("seven_scenes", {"dept": "proj"}, "did you mean depth"),
        ("canonical", {"max_bad": 2.0}, "max_bad"),
        ("canonical", {"window": 0}, "window"),
    ],
)
def test_wrong_names_and_options_are_explained(tmp_path: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_source(name, tmp_path, **options)


def test_rooms_need_no_folder(tmp_path: Path) -> None:
    assert build_source("rooms", law="tiny", seed=3).name == "rooms"
    with pytest.raises(InputError, match="has no folder"):
        build_source("rooms", tmp_path)
    with pytest.raises(InputError, match="did you mean seed"):
        build_source("rooms", seeds=3)


def test_option_names_follow_the_class() -> None:
    assert option_names(ImageFolderSource) == ["window", "focal_jitter", "max_bad"]


def test_layouts_are_recognised(tmp_path: Path) -> None:
    write_canonical(tmp_path / "a")
    photos(tmp_path / "b", 1)
    (tmp_path / "c" / "office" / "seq-01").mkdir(parents=True)
    write_pose(tmp_path / "c" / "office" / "seq-01" / "frame-000000.pose.txt", np.eye(4))
    assert [detect_source(tmp_path / name) for name in "abc"] == ["canonical", "images", "seven_scenes"]
    assert detect_source(tmp_path / "c" / "office" / "seq-01") == "seven_scenes"
    with pytest.raises(InputError, match="missing data folder"):
        detect_source(tmp_path / "d")
