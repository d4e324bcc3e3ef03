"""Clips of scenes: which frames they have, that nothing is said about them, how often they come beside questions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.data.chat.clips import ClipLaw, SceneClips
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ImageAt
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError, TooManyBadFiles
from g2vlm.sequence import IGNORED, Text, segment_length
from tests.g2vlm.data.scenes import room_frames, write_canonical
from tests.g2vlm.data.test_sources import photos
from tests.train.chats import layout
from train.packing import ChatMixture, PackStream

LAW = ClipLaw()
SEEDS = range(4000)


def video(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """A folder of frames, each of its own grey."""
    folder.mkdir()
    for i in range(count):
        file = folder / f"{i:03d}.png"
        Image.fromarray(np.full((28, 28, 3), i, np.uint8)).save(file)
        if i in broken:
            file.write_bytes(b"nothing")
    return folder


# ---- the law --------------------------------------------------------------------------------------------------------


def test_numbers_of_frames_are_equally_likely() -> None:
    counts = Counter(LAW.num_frames(seed) for seed in SEEDS)
    assert set(counts) == set(range(8, 25))
    assert max(abs(count / len(SEEDS) - 1 / 17) for count in counts.values()) < 0.02  # five standard deviations
    assert {len(LAW.draw(1000, seed)[0]) for seed in SEEDS[:300]} == set(range(8, 25))


def test_frames_lie_in_a_window_around_the_anchor_each_once() -> None:
    offsets: Counter[int] = Counter()
    for seed in SEEDS:
        (anchor, *others), rest = LAW.draw(1000, seed)
        assert sorted([anchor, *others, *rest]) == list(range(max(0, anchor - 48), min(1000, anchor + 49)))
        assert others == sorted(others)
        if 48 <= anchor < 952:
            offsets.update(other - anchor for other in others)
    assert set(offsets) == set(range(-48, 49)) - {0}
    share = np.array(list(offsets.values())) / sum(offsets.values())
    assert abs(share * 96 - 1).max() < 0.2  # uniform


def test_every_frame_is_the_anchor_equally_often() -> None:
    anchors = Counter(LAW.draw(20, seed)[0][0] for seed in SEEDS)
    assert set(anchors) == set(range(20))
    assert max(abs(count / len(SEEDS) - 1 / 20) for count in anchors.values()) < 0.02


def test_clips_end_with_the_video() -> None:
    for seed in range(50):
        assert sorted(LAW.draw(5, seed)[0]) == list(range(5))
        assert LAW.draw(5, seed)[1] == []
        anchor, *others = ClipLaw((8, 8), 2).draw(100, seed)[0]
        assert len(others) <= 4
        assert all(abs(other - anchor) <= 2 for other in others)


@pytest.mark.parametrize(("frames", "window"), [((1, 4), 48), ((8, 4), 48), ((2, 4), 0)])
def test_laws_that_cannot_be(frames: tuple[int, int], window: int) -> None:
    with pytest.raises(InputError, match="cannot cut clips"):
        ClipLaw(frames, window)


# ---- stored frames --------------------------------------------------------------------------------------------------


def test_a_clip_has_the_frames_of_the_law(tmp_path: Path) -> None:
    source = build_chat_source("scene_clips", video(tmp_path / "v", 120), (28, 28), scenes="images", frames=[3, 6])
    assert isinstance(source, SceneClips)
    for seed in range(20):
        expected = source.law.draw(120, seed)[0]
        sample = source.load(0, seed)
        assert [int(image[0, 0, 0]) for image in sample.images] == expected
        assert sample.clip is not None
        assert sample.clip.view_ids == tuple(f"{index:03d}.png" for index in expected)
        assert sample.parts == tuple(ImageAt(i) for i in range(len(expected)))
        assert source.shape(0, seed) == sample.shape
        again = source.load(0, seed)
        assert all(np.array_equal(a, b) for a, b in zip(again.images, sample.images, strict=True))


def test_depth_and_cameras_come_with_the_frames(tmp_path: Path) -> None:
    frames = room_frames(8)
    source = build_chat_source("scene_clips", write_canonical(tmp_path, frames), (56, 56), scenes="canonical", window=3)
    clip = source.load(0, 1).clip
    assert clip is not None
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.cam_to_world is not None
    poses = {frame.name: frame.cam_to_world for frame in frames}
    for name, pose in zip(clip.view_ids, clip.cam_to_world, strict=True):
        right = poses[name]
        assert right is not None
        np.testing.assert_allclose(pose.numpy(), right, atol=1e-5)


def test_another_frame_takes_the_place_of_an_unreadable_one(tmp_path: Path) -> None:
    folder = video(tmp_path / "v", 12, broken=(4,))
    source = build_chat_source("scene_clips", folder, (28, 28), scenes="images", frames=[6, 6], window=12,
                               scene_options={"max_bad": 0.1})  # fmt: skip
    for seed in range(12):
        sample = source.load(0, seed)
        shown = [int(image[0, 0, 0]) for image in sample.images]
        assert len(set(shown)) == 6
        assert 4 not in shown
    with pytest.raises(TooManyBadFiles):
        build_chat_source("scene_clips", folder, (28, 28), scenes="images").load(0, 1)


def test_a_single_photo_is_no_clip(tmp_path: Path) -> None:
    source = build_chat_source("scene_clips", photos(tmp_path, 1), (28, 28), scenes="images")
    for ask in (source.shape, source.load):
        with pytest.raises(InputError, match="has 1 frames"):
            ask(0, 0)


# ---- rooms ----------------------------------------------------------------------------------------------------------


def test_rooms_give_their_own_views() -> None:
    """Exact depth and poses; the geometry encoder gets the views only when it is told so."""
    options = {"frames": [2, 5], "scene_options": {"cameras": "near"}}
    plain, seen = (build_chat_source("scene_clips", None, (56, 56), geometry=own, **options) for own in (False, True))
    counts = set()
    for seed in range(8):
        sample = plain.load(3, seed)
        assert sample.clip is not None
        counts.add(sample.clip.num_views)
        request = ViewRequest(sample.clip.num_views, (56, 56), seed)
        right = RoomsSource(cameras="near").load(3, request)
        assert torch.equal(sample.clip.images, right.images)
        assert right.depth is not None
        assert sample.clip.depth is not None
        assert torch.equal(sample.clip.depth, right.depth)
        assert sample.scene is None
        assert plain.shape(3, seed) == sample.shape
        both = seen.load(3, seed)
        assert both.scene is both.clip is not None
        assert seen.shape(3, seed) == both.shape
        assert both.shape.num_views == sample.clip.num_views
    assert counts <= {2, 3, 4, 5}
    assert len(counts) > 2


def test_nothing_is_said_about_a_clip() -> None:
    """A system prompt and a turn of images: no token has a label."""
    sample = build_chat_source("scene_clips", None, (56, 56), frames=[3, 3]).load(0, 0)
    assert sample.answer is None
    assert not sample.later
    segments = layout().segments(sample.shape)
    assert not any(segment.supervised for segment in segments if isinstance(segment, Text))
    assert sum(segment_length(segment) for segment in segments) == layout().num_tokens(sample.shape)
    assert IGNORED == -100


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean window"):
        build_chat_source("scene_clips", None, (56, 56), windo=3)
    with pytest.raises(InputError, match="did you mean rooms"):
        build_chat_source("scene_clips", None, (56, 56), scenes="room")
    with pytest.raises(InputError, match="no folder was given"):
        build_chat_source("scene_clips", None, (56, 56), scenes="canonical")


# ---- beside questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_clips_and_questions_come_in_the_ratio_of_their_weights(weights: tuple[float, float]) -> None:
    clips = build_chat_source("scene_clips", None, (56, 56), frames=[2, 3])
    questions = build_chat_source("rooms_qa", None, (56, 56))
    stream = PackStream(ChatMixture((clips, questions), weights), layout(), 0, 2000, (56, 56))
    packs = [pack for pack, _ in zip(stream.packs(), range(150), strict=False)]
    items = [item for pack in packs for item in pack.items]
    share = np.mean([item.source == 0 for item in items])
    expected = weights[0] / sum(weights)
    assert len(items) > 800
    assert abs(share - expected) < 5 * (expected * (1 - expected) / len(items)) ** 0.5
    assert np.mean([len({item.source for item in pack.items}) == 2 for pack in packs]) > 0.5  # within a step, too
