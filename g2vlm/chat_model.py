"""A model that can be asked: its weights, its processor, and how much it takes at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Self

from g2vlm.companions import PROCESSOR, has_tokenizer, preset_rule, released_rule
from g2vlm.config import EMBEDDED_TOKENS, G2VLMConfig
from g2vlm.errors import CheckpointError, InputError
from g2vlm.model.decoder import MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processor import G2VLMProcessor
from g2vlm.prompts import ChatTokenizer
from g2vlm.sequence import GeometryViews, Segment, SemanticImage, segment_length

log = logging.getLogger(__name__)

MAX_CONTEXT = 32_768
"""Tokens that the language model of the released checkpoint was made for."""


@dataclass(frozen=True, eq=False)
class ChatModel:
    """What answering needs besides images and questions.

    Args:
        model: in evaluation mode, on its device.
        name: of the model, for people.
        processor: the model's own.
        max_context: an answer and everything before it have at most this many tokens.

    Raises:
        CheckpointError: the tokenizer is not the model's.
    """

    model: G2VLMForConditionalGeneration
    name: str
    processor: G2VLMProcessor
    max_context: int = MAX_CONTEXT

    def __post_init__(self) -> None:
        self.tokenizer.require_fits(self.model.config, self.name)

    @classmethod
    def of(cls, model: G2VLMForConditionalGeneration, name: str, max_context: int = MAX_CONTEXT) -> Self:
        """A loaded model with the processor of the folder that it comes from; the log says when it cannot answer.

        Raises:
            CheckpointError: there is no tokenizer, or it is damaged or another model's.
        """
        chat = cls(model, name, processor_of(model.config), max_context)
        if never_answered(model):
            log.warning("%s: the semantic expert was never trained, its answers mean nothing", name)
        return chat

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's."""
        return self.processor.chat

    def require_fit(self, segments: Sequence[Segment], num_cached: int = 0, num_answer: int = 1) -> None:
        """Refuse what does not fit into the context.

        Args:
            segments: what is asked now.
            num_cached: tokens of what came before.
            num_answer: tokens that the answer may take.

        Raises:
            InputError: too many images (with the number that fits), a conversation or a question that is too long.
        """
        total = num_cached + sum(map(segment_length, segments)) + num_answer
        if total <= self.max_context:
            return
        why = f"{total:,} tokens with {num_answer:,} for the answer; the context has {self.max_context:,}"
        if costs := image_costs(segments):
            room = self.max_context - (total - sum(costs))
            fitting = sum(used <= room for used in accumulate(costs))
            fix = f"at most {fitting} fit; wide views take more room than narrow ones"
            raise InputError(f"{len(costs)} images do not fit into the context", why, fix)
        if num_cached:
            raise InputError("the conversation does not fit into the context", why, "begin a new one")
        raise InputError("the question does not fit into the context", why, "shorten it, or the answer")


def image_costs(segments: Sequence[Segment]) -> list[int]:
    """Tokens of each image, as a semantic image and as a view."""
    images = [segment_length(segment) for segment in segments if isinstance(segment, SemanticImage)]
    grids = [grid for segment in segments if isinstance(segment, GeometryViews) for grid in segment.grids]
    views = [segment_length(GeometryViews((grid,))) for grid in grids]
    return [image + view for image, view in zip_longest(images, views, fillvalue=0)]


def processor_of(config: G2VLMConfig) -> G2VLMProcessor:
    """The processor in the folder that a model was loaded from; for what began as a preset, otherwise the embedded one.

    Raises:
        CheckpointError: there is no tokenizer, or a file is damaged.
    """
    folder = Path(config.name_or_path or "")
    if config.name_or_path and has_tokenizer(folder):
        tokenizer = ChatTokenizer.open(folder).tokenizer
        if not (folder / PROCESSOR).is_file():
            return G2VLMProcessor.from_config(config, tokenizer, released_rule(folder))
        try:
            return G2VLMProcessor.from_pretrained(folder, tokenizer=tokenizer, local_files_only=True)
        except Exception as error:  # transformers raises many kinds on damaged files
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"unusable {folder / PROCESSOR}", reason, "copy the file again") from None
    if config.tokens == EMBEDDED_TOKENS:
        return G2VLMProcessor.from_config(config, ChatTokenizer.embedded().tokenizer, preset_rule(config))
    raise CheckpointError(
        f"{config.name_or_path or 'the model'} has no tokenizer, so it cannot be asked",
        "there is neither tokenizer.json nor vocab.json with merges.txt beside its weights",
        "put the checkpoint's own tokenizer files into its folder",
    )


def never_answered(model: G2VLMForConditionalGeneration) -> bool:
    """Whether the semantic expert's norms are all one, as random weights begin and no training leaves them."""
    layers = [layer.semantic for layer in model.decoder.layers if isinstance(layer, MoTLayer)]
    norms = [norm.weight for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]
    return all(bool((norm == 1).all()) for norm in (*norms, model.decoder.semantic_norm.weight))
