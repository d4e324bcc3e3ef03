import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from g2vlm.data.chat.jsonl import JsonlChats
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ImageAt, Turn
from g2vlm.errors import InputError, MissingExtra
from g2vlm.geometry_tokens import Clip


def asked(question: str = "What?", answer: str = "This.", **media: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 1, "conversations": said, **media}


@pytest.fixture
def write(tmp_path: Path):
    """A JSONL file of rows or raw lines; images a.png (20 x 30), b.jpg, and frames/0.png ... 11.png beside it."""
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 50), (0, 200, 0)).save(tmp_path / "b.jpg")
    for i in range(12):
        Image.new("RGB", (16, 16), (i * 20, 0, 0)).save(tmp_path / f"frames/{i}.png")

    def write(*rows: Any, **options: Any) -> JsonlChats:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return JsonlChats(tmp_path / "rows.jsonl", **options)

    return write


def test_rows_and_shapes_agree(write) -> None:
    source = write(asked(), asked(image="a.png"), "", asked(image=["b.jpg", "a.png"]), asked(video="frames"))
    assert len(source) == 4
    for index in range(4):
        sample = source.load(index, 0)
        assert sample.shape == source.shape(index, 0)
        assert sample.answer == "This."
        assert sample.name == f"jsonl/{index}"
    assert [len(source.load(i, 0).images) for i in range(4)] == [0, 1, 2, 8]
    assert source.shape(2, 0).image_sizes == ((50, 40), (20, 30))
    assert source.load(1, 0).parts == (ImageAt(0), "What?")


def test_images_stand_at_their_marks(write) -> None:
    source = write(
        asked("<image>\nWhat?", image="a.png"),
        asked("Is <image> like <image>?", image=["a.png", "b.jpg"]),
        asked("See:\n<video>\nWhat?", video="frames"),
        asked("<image>What?", image=["a.png", "b.jpg"]),
    )
    parts = [source.load(i, 0).parts for i in range(4)]
    assert parts[0] == (ImageAt(0), "What?")
    assert parts[1] == ("Is ", ImageAt(0), " like ", ImageAt(1), "?")
    assert parts[2] == ("See:", *map(ImageAt, range(8)), "What?")
    assert parts[3] == (ImageAt(0), ImageAt(1), "What?")


def test_frames_are_evenly_spread(write) -> None:
    reds = [int(image[0, 0, 0]) for image in write(asked(video="frames"), frames=4).load(0, 0).images]
    assert reds == [0, 80, 140, 220]


def test_all_turns_or_the_first(write) -> None:
    row = asked("<image>\nWhat?", "A box.", image="a.png")
    row["conversations"] = [{"from": "system", "value": "Be brief."}, *row["conversations"]]
    row["conversations"] += [{"from": "user", "value": "Sure?"}, {"from": "assistant", "value": "Yes. "}]
    assert write(row).load(0, 0).later == (Turn(("Sure?",), "Yes."),)
    assert write(row, turns="first").load(0, 0).later == ()


def test_marks_in_later_turns(write) -> None:
    row = asked("First <image>", image=["a.png", "b.jpg"])
    row["conversations"] += [{"from": "human", "value": "<image> then?"}, {"from": "gpt", "value": "That."}]
    sample = write(row).load(0, 0)
    assert sample.parts == ("First ", ImageAt(0))
    assert sample.later == (Turn((ImageAt(1), " then?"), "That."),)


def test_images_may_be_views_too(write) -> None:
    sample = write(asked(video="frames"), geometry=True, frames=3, view_size=(28, 42)).load(0, 0)
    assert sample.scene.images.shape == (3, 3, 28, 42)
    assert sample.scene.depth is None
    assert sample.shape.num_views == 3
    assert write(asked(), geometry=True).shape(0, 0).num_views == 0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"conversations": [', "Expecting value"),
        ("[1, 2]", "not a JSON object"),
        ({"image": "a.png"}, "conversations"),
        (asked(image="absent.png"), "absent.png: there is no file"),
        (asked(video="absent.mp4"), "absent.mp4"),
        (asked("<image> <image>", image="a.png"), "2 marks of images and 1 images"),
        (asked("<image>"), "1 marks of images and 0 images"),
        (asked(image=3), "image is not a path"),
        ({"conversations": [{"from": "gpt", "value": "Hello"}]}, "human and gpt in turn"),
        ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}, "human and gpt in turn"),
        (asked(question=None), "not a text"),
    ],
)
def test_bad_rows_name_file_line_and_cause(write, row: Any, why: str, monkeypatch) -> None:
    source = write(asked(), "", row)
    for read in (source.shape, source.load):
        with pytest.raises((InputError, MissingExtra)) as caught:
            read(1, 0)
        assert why in str(caught.value)
        if isinstance(caught.value, InputError):
            assert f"{source.lines.path}:3" in caught.value.what


def test_damaged_pixels_are_named(write, tmp_path: Path) -> None:
    source = write(asked(image="b.jpg"))
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match=r"b\.jpg"):
        source.load(0, 0)


def test_long_files_are_indexed_in_chunks(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2vlm.data.chat.rows.CHUNK", 7)
    source = write(*(asked(answer=f"number {i}") for i in range(20)), "")
    assert [source.load(i, 0).answer for i in (0, 7, 19)] == ["number 0", "number 7", "number 19"]
    assert source.lines.numbers.tolist() == [*range(1, 21)]


def test_opened_by_name(write, tmp_path: Path) -> None:
    write(asked(image="a.png"))
    source = build_chat_source("jsonl", tmp_path / "rows.jsonl", (28, 42), geometry=True)
    assert source.shape(0, 0).view_size == (28, 42)
    for arguments, words in [
        (("json", None), "unknown source of questions"),
        (("jsonl", None), "no file or folder was given"),
        (("jsonl", tmp_path / "absent.jsonl"), "cannot read"),
    ]:
        with pytest.raises(InputError, match=words):
            build_chat_source(*arguments, (28, 28))
    with pytest.raises(InputError, match="did you mean frames"):
        build_chat_source("jsonl", tmp_path / "rows.jsonl", (28, 28), frame=3)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="nothing in"):
        build_chat_source("jsonl", tmp_path / "empty.jsonl", (28, 28))
    assert np.asarray(source.load(0, 0).images[0]).shape == (20, 30, 3)


# Videos.


def test_a_timed_question_says_when_its_frames_were_taken(write) -> None:
    """Frames 0, 4, 7, 11 of 12, two a second; the frames come first, wherever the mark stands."""
    timed = (
        "The video lasts for 6.00 seconds, and 4 frames are uniformly sampled from it. These frames are located at "
        "0.00s,2.00s,3.50s,5.50s.Please answer the following questions related to this video.\nHow many?"
    )
    for question in ("<video>\nHow many?", "How many?\n<video>", "How many?"):
        source = write(asked(question, video="frames"), frames=4, video_prompt="timed", fps=2)
        assert source.load(0, 0).parts == (*map(ImageAt, range(4)), timed)
        assert source.shape(0, 0) == source.load(0, 0).shape
    plain = write(asked("<video>\nHow many?", video="frames"), frames=4, fps=2)
    assert plain.load(0, 0).parts == (*map(ImageAt, range(4)), "How many?")
    images = write(asked("<image>\nWhat?", image="a.png"), video_prompt="timed")
    assert images.load(0, 0).parts == (ImageAt(0), "What?")


def test_later_turns_are_left_as_they_are(write) -> None:
    row = asked("<video>\nHow many?", video="frames")
    row["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    sample = write(row, frames=2, video_prompt="timed", fps=2).load(0, 0)
    assert sample.later == (Turn(("Sure?",), "Yes."),)


def test_a_video_is_a_clip_and_so_are_images(write) -> None:
    rows = asked(video="frames"), asked(image="a.png"), asked()
    source = write(*rows, frames=3, clips=True, view_size=(28, 42))
    sample = source.load(0, 0)
    assert sample.scene is None
    assert sample.clip.images.shape == (3, 3, 14, 14)
    assert Clip.of(sample.clip).name == "jsonl/frames:0,6,11"
    image = source.load(1, 0).clip
    assert image.num_views == 1
    assert source.load(2, 0).clip is None
    assert write(*rows, frames=3).load(0, 0).clip is None
    both = write(asked(video="frames"), frames=3, clips=True, geometry=True, view_size=(28, 42)).load(0, 0)
    assert both.scene is both.clip
    assert both.clip.size == (28, 42)


def test_a_clip_keeps_the_aspect_ratio(write, tmp_path: Path) -> None:
    """A teacher sees what the model sees; a view of the geometry encoder is stretched to the run's size."""
    Image.new("RGB", (640, 480)).save(tmp_path / "wide.png")
    Image.new("RGB", (240, 320)).save(tmp_path / "high.png")
    for name, size in (("wide.png", (448, 588)), ("high.png", (322, 238))):
        sample = write(asked(image=name), clips=True).load(0, 0)
        assert sample.clip.size == size
        height, width, _ = sample.images[0].shape
        assert abs(size[0] / size[1] / (height / width) - 1) < 0.05


@pytest.mark.parametrize(
    ("row", "options", "why"),
    [
        (asked(video="frames"), {"video_prompt": "timed"}, "nothing says when they were taken: give fps"),
        (asked(video="frames", image="a.png"), {"video_prompt": "timed", "fps": 2}, "there are images beside it"),
    ],
)
def test_times_that_nobody_knows(write, row: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        write(row, **options).shape(0, 0)


@pytest.mark.parametrize(
    ("options", "why"), [({"video_prompt": "timely"}, "did you mean timed"), ({"fps": 0}, "fps=0")]
)
def test_options_of_videos(write, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        write(asked(), **options)
