"""The tokenizer of the presets: what its ids must be, and that building it again changes nothing."""

import pytest

from g2vlm.config import PRESETS
from g2vlm.data.rooms.scene import CATEGORIES
from g2vlm.prompts import RECON_PROMPT, SPECIAL_TOKENS, ChatTokenizer
from train import tokenizer as built


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.embedded()


def test_building_again_gives_the_files_of_the_package() -> None:
    for name, content in built.files().items():
        assert (built.FOLDER / name).read_text(encoding="utf-8") == content


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_ids_of_the_presets(tokenizer: ChatTokenizer, preset: str) -> None:
    config = PRESETS[preset]()
    tokens = config.tokens
    ids = tokenizer.ids
    assert (ids.bos, ids.eos, ids.vision_start, ids.vision_end) == (0, 1, 2, 3)
    assert (tokens.bos, tokens.eos, tokens.vision_start, tokens.vision_end) == (0, 1, 2, 3)
    assert tokenizer.encode(RECON_PROMPT) == tokens.recon_prompt == (4, 5, 6, 7, 8, 9)
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= config.vocab_size


@pytest.mark.parametrize("text", [
    "Wie groß ist der Tisch?", "这张桌子有多大？", "👩‍🚀 🪑", "a\tb  c\r\n\n d ", "don't I'm  he'll", "3D 13D 3Ds x3D",
    " ,.!?;:", "\x00\x01\x7f\u0301é", "def f(x):\n    return x ** 2\n",
])  # fmt: skip
def test_any_text_comes_back(tokenizer: ChatTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_an_id(tokenizer: ChatTokenizer) -> None:
    """Characters that together hold each byte that UTF-8 can hold; those it cannot have a token all the same."""
    text = "".join(map(chr, range(0x800))) + "".join(chr(point) for point in range(0x1000, 0x110000, 0x1000)
                                                     if not 0xD800 <= point < 0xE000)  # fmt: skip
    assert tokenizer.decode(tokenizer.encode(text)) == text
    single = [token for token in tokenizer.tokenizer.get_vocab() if len(token) == 1]
    assert len(single) == 256


def test_digits_are_single_tokens(tokenizer: ChatTokenizer) -> None:
    digits = [tokenizer.encode(digit) for digit in "0123456789"]
    assert all(len(ids) == 1 for ids in digits)
    assert tokenizer.encode("0123456789") == tuple(ids[0] for ids in digits)
    assert tokenizer.encode("2.75") == (*digits[2], *tokenizer.encode("."), *digits[7], *digits[5])


def test_questions_about_rooms_are_short(tokenizer: ChatTokenizer) -> None:
    for category in CATEGORIES:
        assert len(tokenizer.encode(f" {category}")) <= 2, category
    question = (
        "If I am standing by the chair and facing the window, is the nightstand to my left, right, or back?\nAn object "
        "is to my back if I would have to turn at least 135 degrees in order to face it.\nOptions:\nA. left\nB. right"
    )
    assert len(tokenizer.encode(question)) <= len(question) / 3.5


def test_special_text_becomes_special_tokens(tokenizer: ChatTokenizer) -> None:
    for name, text in SPECIAL_TOKENS.items():
        assert tokenizer.encode(f"a{text}b") == (
            *tokenizer.encode("a"),
            getattr(tokenizer.ids, name),
            *tokenizer.encode("b"),
        )
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"
