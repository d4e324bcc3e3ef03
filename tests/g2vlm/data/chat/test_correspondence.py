"""Questions about points: the answers are the rooms' own geometry, and nothing but the images tells them."""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2vlm.data.chat.correspondence import (
    APART,
    OFFERED,
    WAYS,
    Asked,
    CorrespondenceQuestions,
    Shown,
    seen_points,
)
from g2vlm.data.chat.marks import COLOURS
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ChatSample, Turn
from g2vlm.data.qa.drafts import Letters, stream
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from geometry import invert_rigid
from geometry.correspondence import TrackRule
from tests.g2vlm.data.rooms_oracle import trace
from tests.g2vlm.data.test_sources import photos
from tests.train.chats import layout

SIDE = 84
PIXEL = 1000 / SIDE
Place = tuple[float, float]


def source(way: str, **options: Any) -> CorrespondenceQuestions:
    known = {"frames": [3, 4], "questions": 3, "scene_options": {"cameras": "near"}, "ways": [way], **options}
    made = build_chat_source("correspondence_questions", None, (SIDE, SIDE), **known)
    assert isinstance(made, CorrespondenceQuestions)
    return made


@cache
def samples(way: str, count: int = 16) -> list[tuple[SceneSample, ChatSample]]:
    """Rooms, and questions about them; the geometry encoder's views are not marked."""
    made = source(way, geometry=True)
    found = [made.load(index, index) for index in range(count)]
    return [(sample.scene, sample) for sample in found if sample.scene is not None]


def turns(sample: ChatSample) -> list[tuple[str, str]]:
    """Words and answer of every question."""
    found = []
    for turn in (Turn(sample.parts, sample.answer), *sample.later):
        assert turn.answer is not None
        found.append((str(turn.parts[-1]), turn.answer))
    return found


def places(text: str) -> list[Place]:
    return [(float(x), float(y)) for x, y in re.findall(r"\((\d+), (\d+)\)", text)]


def frame_asked(words: str) -> int:
    """The number, from 0, of the frame in which a point is looked for."""
    numbers = [int(number) - 1 for number in re.findall(r"frame (\d+) of \d+", words)]
    assert numbers[1] == 0
    return numbers[0]


def truth(scene: SceneSample, room: int, place: Place, frame: int) -> tuple[Place, bool]:
    """Where another frame shows what is at a place of the first one, by rays in float64; and whether it does."""
    assert scene.intrinsics is not None
    assert scene.cam_to_world is not None
    K = scene.intrinsics[0].double().numpy()
    pixel = np.array([place[0] * SIDE / 1000 - 0.5, place[1] * SIDE / 1000 - 0.5, 1])
    pose, world_to_cam = (
        scene.cam_to_world[0].double().numpy(),
        invert_rigid(scene.cam_to_world.double())[frame].numpy(),
    )
    state = RoomsSource("tiny", cameras="near").scene(room)
    ray = pose[:3, :3] @ np.linalg.solve(K, pixel)
    point = pose[:3, 3] + trace(state, pose[:3, 3], ray[None]).depth[0] * ray
    there = world_to_cam[:3, :3] @ point + world_to_cam[:3, 3]
    u, v, _ = K @ there / there[2]
    centre = scene.cam_to_world[frame, :3, 3].double().numpy()
    seen = abs(trace(state, centre, (point - centre)[None]).depth[0] - 1) < 0.06  # the rule's tolerance
    return ((u + 0.5) * PIXEL, (v + 0.5) * PIXEL), bool(seen)


def distance(a: Place, b: Place) -> float:
    """In pixels."""
    return float(np.hypot(a[0] - b[0], a[1] - b[1])) / PIXEL


def middle(image: np.ndarray, plain: np.ndarray, colour: str) -> Place:
    """The middle of a coloured disc, in thousandths."""
    marked = (image == np.array(COLOURS[colour])).all(-1) & (image != plain).any(-1)
    rows, columns = np.nonzero(marked)
    assert len(rows) > 10
    return (columns.mean() + 0.5) * PIXEL, (rows.mean() + 0.5) * PIXEL


def judged(found: list[tuple[float, bool]]) -> None:
    """Distances and visibility: all but a few at the edges of things, which a pixel's ray may miss."""
    off = np.array([error for error, _ in found])
    assert len(off) > 12
    assert np.mean(off < 1) > 0.95
    assert np.mean([seen for _, seen in found]) > 0.95


def test_coordinates_are_where_the_point_is() -> None:
    found = []
    for room, (clip, sample) in enumerate(samples("coordinates")):
        for words, answer in turns(sample):
            (start,) = places(words)
            right, seen = truth(clip, room, start, frame_asked(words))
            found.append((distance(right, places(f"({answer})")[0]), seen))
    judged(found)


def test_the_right_place_is_where_the_point_is() -> None:
    found = []
    for room, (clip, sample) in enumerate(samples("places")):
        for words, letter in turns(sample):
            start, *options = places(words)
            right, seen = truth(clip, room, start, frame_asked(words))
            errors = [distance(right, option) for option in options]
            chosen = "ABCD".index(letter)
            found.append((errors[chosen], seen))
            assert len(options) == 4
            for i in range(4):
                assert all(distance(options[i], other) > 0.98 * APART * SIDE for other in options[:i])
    judged(found)


def test_the_right_colour_is_where_the_point_is() -> None:
    found = []
    for room, (clip, sample) in enumerate(samples("colours")):
        ((words, letter),) = turns(sample)  # one question with marks, however many are wanted
        frame, plain = frame_asked(words), clip.images.permute(0, 2, 3, 1).numpy()
        colour = re.findall(rf"{letter}\. the (\w+) point", words)[0]
        start, there = (middle(sample.images[k], plain[k], c) for k, c in ((0, "red"), (frame, colour)))
        right, seen = truth(clip, room, start, frame)
        found.append((max(distance(right, there) - 2.0, 0.0), seen))  # a disc's middle is known to pixels, at both ends
        marked = [bool((image != own).any()) for image, own in zip(sample.images, plain, strict=True)]
        assert marked == [k in (0, frame) for k in range(clip.num_views)]
        assert {c for c in COLOURS if f"the {c} point" in words} == set(OFFERED)
    judged(found)


@cache
def shown() -> Shown:
    return seen_points(source("places", frames=[4, 4]).clips.clip(0, 0), TrackRule())


def asked(way: str, count: int = 600) -> list[Asked]:
    """Questions about one clip, each with random draws of its own."""
    found = [WAYS[way](shown(), Letters(stream("a", i)), stream("b", i)) for i in range(count)]
    return [question for question in found if question is not None]


@pytest.mark.parametrize("way", ["colours", "places"])
def test_every_letter_is_right_equally_often(way: str) -> None:
    letters, chosen = Counter[str](), Counter[str]()
    questions = asked(way)
    for question in questions:
        letters[question.answer] += 1
        chosen[re.findall(rf"{question.answer}\. (?:the )?(\w*)", question.words)[0]] += 1
    assert len(questions) > 500
    for counter in (letters, chosen) if way == "colours" else (letters,):
        expected = 1 / (3 if way == "colours" else 4)
        assert len(counter) == round(1 / expected)
        assert max(abs(count / len(questions) - expected) for count in counter.values()) < 0.08  # four deviations


def test_the_right_option_is_like_the_others() -> None:
    """The places that are right are as far from the middle of the image as those that are wrong."""
    right, wrong = [], []
    for question in asked("places"):
        _, *options = places(question.words)
        for letter, option in zip("ABCD", options, strict=True):
            (right if letter == question.answer else wrong).append(distance(option, (500.0, 500.0)))
    assert abs(np.mean(right) - np.mean(wrong)) < 4 * np.std(wrong) / len(right) ** 0.5


def test_every_frame_is_asked_about() -> None:
    frames = Counter(frame_asked(question.words) for question in asked("coordinates"))
    assert set(frames) == {1, 2, 3}
    assert min(frames.values()) > 0.25 * sum(frames.values())


def test_ways_are_mixed_and_at_most_one_question_has_marks() -> None:
    made = source("", ways=["colours", "places", "coordinates"], questions=5)
    seen: Counter[str] = Counter()
    for index in range(12):
        said = turns(made.load(index, index))
        kinds = ["colours" if "marked" in w else "places" if "Options" in w else "coordinates" for w, _ in said]
        assert kinds.count("colours") <= 1
        seen.update(kinds)
    assert min(seen[kind] for kind in ("colours", "places", "coordinates")) > 5


@pytest.mark.parametrize("frames", [2, 24])
def test_packs_reserve_enough_tokens(frames: int) -> None:
    for way in ("places", "colours", "coordinates"):
        made = source(way, frames=[frames, frames], scene_options={"cameras": "smooth"}, questions=4)
        for index in range(3):
            sample, shape = made.load(index, index), made.shape(index, index)
            assert shape.image_sizes == sample.shape.image_sizes
            assert layout().num_tokens(sample.shape) <= layout().num_tokens(shape)


def test_equal_seeds_ask_the_same_about_the_same_frames() -> None:
    made = source("colours")
    first, again, other = made.load(2, 5), made.load(2, 5), made.load(2, 6)
    assert turns(first) == turns(again)
    assert all(np.array_equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert turns(first) != turns(other)
    clips = build_chat_source("scene_clips", None, (SIDE, SIDE), frames=[3, 4], scene_options={"cameras": "near"})
    clip = clips.load(2, 5).clip
    assert clip is not None
    assert torch.equal(clip.images, made.clips.clip(2, 5).images)
    assert (first.clip, first.scene) == (None, None)  # text alone teaches
    shown = source("places", geometry=True).load(2, 5)
    assert shown.scene is not None
    assert shown.shape.num_views == len(shown.images)


def test_without_depth_nothing_can_be_asked(tmp_path: Path) -> None:
    made = build_chat_source("correspondence_questions", photos(tmp_path, 9), (28, 28), scenes="images")
    with pytest.raises(InputError, match="depth or cameras are unknown"):
        made.load(0, 0)


def test_unknown_ways_name_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean places"):
        source("place")
