"""From a conversation to the tokens of a stock Qwen-VL, through its processor's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from g2vlm.data.chat.types import ChatShape, ImageAt, Size, Turn
from g2vlm.errors import CheckpointError, InputError
from g2vlm.prompts import SPECIAL_TOKENS
from g2vlm.semantic_images import MERGE, SemanticRule, semantic_grid
from g2vlm.sequence import IGNORED

END = SPECIAL_TOKENS["eos"]


@dataclass(frozen=True)
class Row:
    """The tokens of one conversation.

    Args:
        ids: every image stands for as many placeholders as it has tokens.
        labels: of each token, its own id in an answer and its end, else `IGNORED`.
        weights: of each label 1 / sqrt(number of labels of its answer), else 0.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class StockLayout:
    """How conversations become the tokens of one model.

    Args:
        processor: the model's, of transformers.
        rule: of the images' sizes.
        camera_probes, scale_probe: whether a probe token will follow every image, and one more a sample's last.

    Raises:
        CheckpointError: the processor has no chat template.
    """

    processor: Any
    rule: SemanticRule
    camera_probes: bool = False
    scale_probe: bool = False

    def __post_init__(self) -> None:
        if not (self.processor.chat_template or self.processor.tokenizer.chat_template):
            fix = "put the checkpoint's own chat_template.jinja or tokenizer_config.json into its folder"
            raise CheckpointError("the model's processor has no chat template", "questions are laid out by it", fix)

    @cached_property
    def filler(self) -> Row:
        """One image of one token and no label."""
        start, end = SPECIAL_TOKENS["vision_start"], SPECIAL_TOKENS["vision_end"]
        return _joined([(self._encode(f"{start}{self.processor.image_token}{end}"), False)])

    @property
    def padding(self) -> int:
        """The id of tokens that nothing attends to."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def num_tokens(self, shape: ChatShape) -> int:
        """Length of the row at most, with its probe tokens; errors as in `row`."""
        num_images = len(shape.image_order)
        probes = num_images * self.camera_probes + (num_images > 0) * self.scale_probe
        return len(self.row(shape).ids) + shape.spare + probes

    def row(self, shape: ChatShape) -> Row:
        """The tokens of a conversation; views of the geometry encoder have none.

        Raises:
            InputError: an image that is too narrow, or text that holds placeholders of images.
            CheckpointError: the chat template does not lay out turns one after the other.
        """
        counts = [self.image_tokens(size) for size in shape.image_sizes]
        left = [counts[place] for place in shape.image_order]
        pieces = []
        for text, learned in self._pieces(shape.turns):
            shown = text.count(self.processor.image_token)
            pieces.append((self._expanded(text, left[:shown]), learned))
            left = left[shown:]
        row = _joined(pieces)
        placeholders = {self.processor.image_token_id, self.processor.video_token_id}
        if sum(token in placeholders for token in row.ids) != sum(counts[place] for place in shape.image_order):
            raise InputError("the text holds placeholders of images", "they would be taken for images", "remove them")
        return row

    def image_tokens(self, size: Size) -> int:
        """Tokens of an image (H, W).

        Raises:
            InputError: it is too narrow.
        """
        rows, columns = semantic_grid(size, self.rule)
        return rows * columns // MERGE**2

    def _pieces(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        """What is said in turn, and whether it is learned: an answer up to its end."""
        messages: list[dict[str, Any]] = []
        pieces, said = [], ""
        for turn in turns:
            messages.append({"role": "user", "content": [_content(part) for part in turn.parts]})
            asked = self._render(messages, True)
            pieces.append((_after(said, asked), False))
            said = asked
            if turn.answer is None:
                break
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            answer = _up_to_end(_after(asked, self._render(messages, False)))
            pieces.append((answer, True))
            said = asked + answer
        return pieces

    def _render(self, messages: list[dict[str, Any]], asks: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)

    def _expanded(self, text: str, counts: Sequence[int]) -> list[int]:
        first, *rest = text.split(self.processor.image_token)
        ids = self._encode(first)
        for count, following in zip(counts, rest, strict=False):
            ids += [self.processor.image_token_id] * count + self._encode(following)
        return ids + [self.processor.image_token_id] * (len(rest) - len(counts))

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenizer.encode(text, add_special_tokens=False)


def _content(part: str | ImageAt) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, ImageAt) else {"type": "text", "text": part}


def _after(before: str, whole: str) -> str:
    """What follows in a longer conversation.

    Raises:
        CheckpointError: the longer one does not begin with the shorter.
    """
    if not whole.startswith(before):
        raise CheckpointError(
            "unusable chat template",
            f"a longer conversation changes what came before: {before[-60:]!r}",
            "use the template of an instruction-tuned Qwen-VL",
        )
    return whole[len(before) :]


def _up_to_end(answer: str) -> str:
    """Without what the template writes between turns.

    Raises:
        CheckpointError: the template ends answers with something else.
    """
    if END not in answer:
        raise CheckpointError("unusable chat template", f"it does not end answers with {END}", "use a Qwen-VL's own")
    return answer[: answer.rindex(END) + len(END)]


def _joined(pieces: Sequence[tuple[list[int], bool]]) -> Row:
    ids = [token for own, _ in pieces for token in own]
    labels = [token if learned else IGNORED for own, learned in pieces for token in own]
    weights = [len(own) ** -0.5 if learned else 0.0 for own, learned in pieces for _ in own]
    return Row(tuple(ids), tuple(labels), tuple(weights))
