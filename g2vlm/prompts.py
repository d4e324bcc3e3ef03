"""Text into ids and questions into segments: the released chat template around views, images and text.

Ids are looked up in the tokenizer of the checkpoint. As in the released code, the text of a special token inside a
prompt becomes that token: `<|im_end|>` typed by a user ends the user's turn. Whoever passes on text of strangers and
minds that removes such strings first; `SPECIAL_TOKENS` holds those that mean something to the model.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from g2vlm.config import G2VLMConfig
from g2vlm.errors import CheckpointError, InputError
from g2vlm.sequence import GeometryViews, Segment, SemanticImage, SemanticVideo, SpecialIds, Text

SYSTEM = "You are a helpful assistant."
USER = "\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant"
RECON_PROMPT = "Reconstruct the 3D scene."
SPECIAL_TOKENS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
"""Text of the fields of `SpecialIds`."""
EMBEDDED = Path(__file__).parent / "assets" / "tokenizer"

PLACEHOLDER = "<image>"
"""Where an image stands in the text of a question."""
Placed = TypeVar("Placed")

Part = str | GeometryViews | SemanticImage | SemanticVideo
"""What a question consists of."""


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer that lies in a folder, None without one; nothing is downloaded and no code of the folder runs.

    Raises:
        CheckpointError: its files are damaged.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise bare Exception on damaged files
        raise CheckpointError(f"unreadable tokenizer in {folder}", str(error), "copy its files again") from None
    return None


class ChatTokenizer:
    """A tokenizer that has the special tokens of a G2VLM.

    Args:
        tokenizer: of a checkpoint.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: a special token is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str = "the model"):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]:
            raise CheckpointError(
                f"unusable tokenizer of {name}",
                f"it has no token {', '.join(missing)}",
                "put the checkpoint's own tokenizer files into its folder",
            )
        self.ids = SpecialIds(**{name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()})

    @classmethod
    def open(cls, folder: Path) -> "ChatTokenizer":
        """The tokenizer of a checkpoint folder.

        Raises:
            CheckpointError: it is absent, damaged, or lacks a special token.
        """
        tokenizer = open_tokenizer(folder)
        if tokenizer is None:
            raise CheckpointError(
                f"no tokenizer in {folder}",
                "there is neither tokenizer.json nor vocab.json with merges.txt",
                "put the checkpoint's own tokenizer files into the folder",
            )
        return cls(tokenizer, str(folder))

    @classmethod
    def embedded(cls) -> "ChatTokenizer":
        """The tokenizer of the presets `tiny` and `small`."""
        return cls.open(EMBEDDED)

    def require_fits(self, config: G2VLMConfig, name: str = "the model") -> None:
        """Refuse a tokenizer whose ids mean something else to a model.

        Raises:
            CheckpointError: a special token has another id, or there are ids beyond the vocabulary.
        """
        largest = max(self.tokenizer.get_vocab().values())
        wrong = [
            f"{token} is {getattr(self.ids, key)}, but {getattr(config.tokens, key)} in the model"
            for key, token in SPECIAL_TOKENS.items()
            if getattr(self.ids, key) != getattr(config.tokens, key)
        ]
        if largest >= config.vocab_size:
            wrong.append(f"it has ids up to {largest}, the model {config.vocab_size} of them")
        if wrong:
            fix = "put the checkpoint's own tokenizer files into its folder"
            raise CheckpointError(f"the tokenizer of {name} is not the model's", "; ".join(wrong), fix)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text; the text of a special token becomes its id, and nothing is added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens."""
        return self.tokenizer.backend_tokenizer.decode([*ids], skip_special_tokens=True)


def chat_segments(tokenizer: ChatTokenizer, parts: Sequence[Part], answer: str | None = None) -> list[Segment]:
    """One question to the model (G2VLM released code, `chat_with_recon` and the joint training samples).

    Header, parts in order, assistant header, each text tokenised on its own; empty texts are left out. What follows is
    the newline whose successor is the first token of the answer, or, to train, the newline and the answer.

    Args:
        tokenizer: of the checkpoint.
        parts: text, geometry views, semantic images and videos of the user's turn.
        answer: what the model should say; None if it is to be asked.
    """
    return _turn(tokenizer, f"<|im_start|>system\n{SYSTEM}<|im_end|>{USER}", parts, answer)


def later_segments(tokenizer: ChatTokenizer, parts: Sequence[Part], answer: str | None = None) -> list[Segment]:
    """A further question, after the eos of the answer before it (Qwen's chat template); arguments as above."""
    return _turn(tokenizer, USER, parts, answer)


def next_turn(tokenizer: ChatTokenizer, answer: Sequence[int]) -> list[Segment]:
    """What follows the newline after "assistant" up to the user's next words: an answer, its end, the user's header."""
    return [Text((*answer, tokenizer.ids.eos, *tokenizer.encode(USER)))]


def _turn(tokenizer: ChatTokenizer, header: str, parts: Sequence[Part], answer: str | None) -> list[Segment]:
    turn = [header, *parts, ASSISTANT]
    segments = [Text(tokenizer.encode(part)) if isinstance(part, str) else part for part in turn if part != ""]
    return [*segments, Text(tokenizer.encode(f"\n{answer or ''}"), supervised=answer is not None)]


def plain_question(question: str, duration: float, times: Sequence[float]) -> str:
    """The question as it is: how VLM-3R is evaluated."""
    return question


def timed_question(question: str, duration: float, times: Sequence[float]) -> str:
    """A question about a video behind its duration and the times of its frames: how VLM-3R is trained.

    Args:
        question: the user's words.
        duration: of the video in seconds.
        times: of the frames in seconds, rising, within the video.

    Raises:
        InputError: no frames, or times that do not rise within the video.
    """
    if not times or list(times) != sorted(times) or times[0] < 0 or times[-1] > duration:
        why = f"the times {list(times)} must rise from 0 to the duration, {duration} s"
        raise InputError("cannot say when the frames were taken", why, "give the time of every frame in seconds")
    located = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {located}.Please answer the following questions related to this video.\n"
        f"{question}"
    )


VIDEO_PROMPTS: dict[str, Callable[[str, float, Sequence[float]], str]] = {
    "plain": plain_question,
    "timed": timed_question,
}
"""Name, as configs and results record it -> what makes the text of a question about a video."""


def place_images(question: str, images: Sequence[Placed]) -> list[str | Placed]:
    """A question with images in the places of `<image>`, or before the text if it has none.

    Raises:
        InputError: no text, or another number of places than images.
    """
    pieces = question.split(PLACEHOLDER)
    if not "".join(pieces).strip():
        raise InputError("the question is empty", f"it reads {question!r}", "ask something")
    if len(pieces) == 1:
        return [*images, question]
    if len(pieces) != len(images) + 1:
        raise InputError(
            f"the question has {len(pieces) - 1} {PLACEHOLDER}, and there are {len(images)} images",
            f"it reads {question!r}",
            f"write {PLACEHOLDER} once for each image, or not at all: then the images stand before the text",
        )
    placed = [part for pair in zip(pieces[:-1], images, strict=True) for part in pair]
    return [part for part in (*placed, pieces[-1]) if part != ""]
