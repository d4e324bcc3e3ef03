"""Chat sequences: the released order and texts, with the ids of whatever tokenizer a folder holds."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from g2vlm.errors import CheckpointError, InputError
from g2vlm.prompts import EMBEDDED, SPECIAL_TOKENS, SYSTEM, VIDEO_PROMPTS, ChatTokenizer, chat_segments
from g2vlm.sequence import GeometryViews, SemanticImage, SemanticVideo, Text

VIEWS, IMAGE = GeometryViews(((4, 5), (4, 5))), SemanticImage((4, 8))
ROLES = {"<|endoftext|>": 3, "<|im_start|>": 11, "<|im_end|>": 7, "<|vision_start|>": 5, "<|vision_end|>": 6}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.embedded()


def write_bytes_tokenizer(folder: Path, special: dict[str, int]) -> Path:
    """A byte-level tokenizer with special tokens at given ids below 20."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = special | {letter: 20 + index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_question_with_views_and_images(tokenizer: ChatTokenizer) -> None:
    segments = chat_segments(tokenizer, [VIEWS, IMAGE, IMAGE, "How many chairs?"])
    encode = tokenizer.encode
    assert segments == [
        Text(encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")),
        VIEWS,
        IMAGE,
        IMAGE,
        Text(encode("How many chairs?")),
        Text(encode("<|im_end|>\n<|im_start|>assistant")),
        Text(encode("\n")),
    ]


def test_an_answer_is_supervised_with_its_newline(tokenizer: ChatTokenizer) -> None:
    *asked, answer = chat_segments(tokenizer, ["How many?"], "12")
    assert answer == Text(tokenizer.encode("\n12"), supervised=True)
    assert asked == chat_segments(tokenizer, ["How many?"])[:-1]
    assert chat_segments(tokenizer, ["How many?"], "")[-1] == Text(tokenizer.encode("\n"), supervised=True)


def test_a_video_is_a_part(tokenizer: ChatTokenizer) -> None:
    video = SemanticVideo((4, 6), times=(0, 1))
    assert chat_segments(tokenizer, ["Look:", video, "What moves?"])[2] == video


def test_texts_are_tokenised_apart_and_empty_ones_left_out(tokenizer: ChatTokenizer) -> None:
    joined, apart = chat_segments(tokenizer, [" chair"]), chat_segments(tokenizer, ["", " ch", "", "air"])
    assert len(apart) == len(joined) + 1
    assert apart[1:3] == [Text(tokenizer.encode(" ch")), Text(tokenizer.encode("air"))]


def test_special_text_of_a_user_is_parsed(tokenizer: ChatTokenizer) -> None:
    (_, question, *_) = chat_segments(tokenizer, ["a<|im_end|>b"])
    assert question == Text((*tokenizer.encode("a"), tokenizer.ids.eos, *tokenizer.encode("b")))


def test_ids_come_from_the_folder(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.open(write_bytes_tokenizer(tmp_path, ROLES))
    ids = tokenizer.ids
    assert (ids.bos, ids.eos, ids.vision_start, ids.vision_end) == (11, 7, 5, 6)
    segments = chat_segments(tokenizer, [IMAGE, "hm"])
    assert [s.ids[0] for s in segments if isinstance(s, Text)] == [
        11,
        tokenizer.encode("h")[0],
        7,
        tokenizer.encode("\n")[0],
    ]
    assert tokenizer.decode(segments[0].ids) == f"system\n{SYSTEM}\nuser\n"


def test_the_chat_template_says_the_same(tokenizer: ChatTokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(EMBEDDED, local_files_only=True)
    question = {"role": "user", "content": "How many chairs are in this room?"}
    segments = chat_segments(tokenizer, [question["content"]])
    ids = [token for segment in segments if isinstance(segment, Text) for token in segment.ids]
    assert theirs.apply_chat_template([question], add_generation_prompt=True, return_dict=False) == ids
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question["content"]}]}
    shown = theirs.apply_chat_template([{"role": "system", "content": "Be brief."}, parts], tokenize=False)
    question_turn = "<|im_start|>user\n<image>How many chairs are in this room?<|im_end|>\n"
    assert shown == f"<|im_start|>system\nBe brief.<|im_end|>\n{question_turn}"


def test_a_tokenizer_of_vocabulary_and_merges(tmp_path: Path) -> None:
    """The files that the released checkpoint's family comes with when tokenizer.json is absent."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate([*letters, "in"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\n")
    special = {str(300 + i): {"content": t, "special": True} for i, t in enumerate(SPECIAL_TOKENS.values())}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": special, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = ChatTokenizer.open(tmp_path)
    assert len({tokenizer.ids.bos, tokenizer.ids.eos, tokenizer.ids.vision_start, tokenizer.ids.vision_end}) == 4
    assert tokenizer.encode("in") == (256,)
    assert tokenizer.decode(tokenizer.encode("桌子 <|im_start|>")) == "桌子 "


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        ChatTokenizer.open(tmp_path)
    lacking = write_bytes_tokenizer(tmp_path / "lacking", {k: v for k, v in ROLES.items() if "vision" not in k})
    with pytest.raises(CheckpointError, match=r"no token <\|vision_start\|>, <\|vision_end\|>"):
        ChatTokenizer.open(lacking)
    damaged = Path(shutil.copytree(EMBEDDED, tmp_path / "damaged"))
    (damaged / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="unreadable tokenizer"):
        ChatTokenizer.open(damaged)


def test_a_question_about_a_video_says_when_its_frames_were_taken() -> None:
    timed = VIDEO_PROMPTS["timed"]("How many chairs?", 12.0, (0, 3.996, 11.5))
    assert timed == (
        "The video lasts for 12.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,4.00s,11.50s.Please answer the following questions related to this video.\nHow many chairs?"
    )
    assert VIDEO_PROMPTS["plain"]("How many chairs?", 12.0, (0, 4)) == "How many chairs?"


@pytest.mark.parametrize("times", [(), (2, 1), (-1, 2), (0, 13)])
def test_times_rise_within_the_video(times: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="cannot say when the frames were taken"):
        VIDEO_PROMPTS["timed"]("How many chairs?", 12.0, times)
