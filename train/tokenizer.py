"""The tokenizer of the presets `tiny` and `small`: built from how questions about rooms are worded.

    python -m train.tokenizer            # writes g2vlm/assets/tokenizer again; a test holds that nothing changes

Trained weights depend on every id, so the texts below are a vocabulary, frozen: they follow the question formats of
VSI-Bench, VSTI-Bench and SPAR, and repeat the categories of `g2vlm.data.rooms.scene` instead of importing them.
"""

import json
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parents[1] / "g2vlm" / "assets" / "tokenizer"
SIZE = 512
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
RECON_PROMPT = ("Reconstruct", " the", " ", "3D", " scene", ".")
"""Ids 0 to 3 and 4 to 9, which weights trained before there was a tokenizer rely on."""

WORDS = r"'(?:[sdmt]|ll|ve|re)|3D\b|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 cuts text into words, each digit alone; here "3D" is a word."""

CATEGORIES = (
    "ball", "bed", "bin", "bookshelf", "box", "cabinet", "chair", "desk", "door", "lamp", "nightstand", "picture",
    "plant", "refrigerator", "rug", "sofa", "stool", "table", "tv", "window",
)  # fmt: skip
CHAT = (
    "system\nYou are a helpful assistant.", "user\n", "assistant\n", "Reconstruct the 3D scene.",
)  # fmt: skip
QUESTIONS = (
    "These are frames of a video.\n",
    "\nOptions:\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n",
    "\nPlease answer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    "How many {a}(s) are in this room?\n",
    "What is the length of the longest dimension (length, width, or height) of the {a}, measured in centimeters?",
    "What is the size of this room (in square meters)? \n"
    "If multiple rooms are shown, estimate the size of the combined space.",
    "Measuring from the closest point of each object, what is the direct distance between the {a} and the {b} "
    "(in meters)?",
    "Measuring from the closest point of each object, which of these objects ({b}, {c}, {d}) is the closest to the "
    "{a}?\nIf there are multiple instances of an object category, measure to the closest.",
    "If I am standing by the {a} and facing the {b}, is the {c} to my front-left, front-right, back-left, or "
    "back-right?\nThe directions refer to the quadrants of a Cartesian plane (if I am standing at the origin and "
    "facing along the positive y-axis).",
    "If I am standing by the {a} and facing the {b}, is the {c} to my left, right, or back?\nAn object is to my back "
    "if I would have to turn at least 135 degrees in order to face it.",
    "If I am standing by the {a} and facing the {b}, is the {c} to the left or the right of the {b}?",
    "What will be the first-time appearance order of the following categories in the video: {a}, {b}, {c}, {d}?\n",
    "What is the approximate distance (in meters) between the camera (or the person filming) and the nearest point of "
    "the {a} in frame 1 of 4?",
    "Measuring from the closest point of each object, which of these objects ({a}, {b}, {c}, {d}) is the closest to "
    "the camera in frame 2 of 4?",
    "Approximately how far (in meters) did the camera move between frame 1 and frame 3 of 4?",
    "During the sequence between frame 2 and frame 4 of 4, what was the primary consistent direction of the camera's "
    "movement relative to its orientation at the start? The options are Forward, Backward, Left, Right.",
    "In frame 3 of 4, relative to the camera, is {a} Near/Far compared to {b}?",
    "In frame 3 of 4, relative to {b}, is {a} to the Left/Right?",
    "In frame 3 of 4, relative to {b}, is {a} to the Up/Down?",
    "What is the depth of the {a} at the red point in image 2 (in meters)? Calculate the depth of the object marked.",
    "Which is closer to the camera, the {a} or the {b}? How wide is the {a}?",
    "Is the {a} on the floor, the wall or the ceiling, above or below the {b}? The red, green and blue points.",
)
ANSWERS = ("Forward", "Backward", "Left", "Right", "left", "right", "back", "front-left", "Near", "Far", "Up", "Down")

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts() -> list[str]:
    """The corpus: every question often enough that each category stands in each of its places."""
    names = cycle(CATEGORIES)
    asked = [q.format(**dict(zip("abcd", islice(names, 4), strict=True))) for q in QUESTIONS for _ in CATEGORIES]
    return [*asked, *CHAT * len(CATEGORIES), *ANSWERS, *CATEGORIES, *(f" {name}" for name in CATEGORIES)]


def cutter() -> pre_tokenizers.PreTokenizer:
    """Text -> words, in the 256 printable characters that stand for bytes."""
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def merges_in_order(corpus: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, up to the point where each word of the corpus is one token."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = cutter()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1 << 16, initial_alphabet=alphabet, show_progress=False)
    )
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def vocabulary(corpus: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Token of every id: special, the reconstruction prompt, bytes, words by frequency, then the first merges."""
    words = Counter(word for text in corpus for word, _ in cutter().pre_tokenize_str(text))
    prompt = [cutter().pre_tokenize_str(word)[0][0] for word in RECON_PROMPT]
    ranked = sorted(words, key=lambda word: (-words[word], word))
    parts = ["".join(pair) for pair in merges]
    tokens = dict.fromkeys([*SPECIAL, *prompt, *sorted(pre_tokenizers.ByteLevel.alphabet()), *ranked])
    assert len(tokens) < SIZE, f"{len(tokens)} tokens before the first merge; only {SIZE} fit"
    return list(dict.fromkeys([*tokens, *parts]))[:SIZE]


def build() -> Tokenizer:
    """The tokenizer. Words in the vocabulary are one token; others are joined from bytes by the merges that remain."""
    corpus = texts()
    merges = merges_in_order(corpus)
    ids = {token: index for index, token in enumerate(vocabulary(corpus, merges))}
    kept = [(left, right) for left, right in merges if {left, right, left + right} <= ids.keys()]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=kept, ignore_merges=True))
    tokenizer.pre_tokenizer = cutter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def files() -> dict[str, str]:
    """Name -> content of every file of the folder."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": build().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
