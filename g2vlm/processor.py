"""`G2VLMProcessor`: from questions with images to the keyword arguments of the model's forward.

It is saved as processor_config.json beside the tokenizer's files, and registered with `AutoProcessor`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from g2vlm.config import G2VLMConfig
from g2vlm.errors import InputError
from g2vlm.images import PATCH, SourceImage, geometry_pixels, to_source
from g2vlm.processing import normalise_views, view_grid
from g2vlm.prompts import RECON_PROMPT, ChatTokenizer, Part, chat_segments, place_images
from g2vlm.semantic_images import SemanticRule, semantic_grid, semantic_pixels
from g2vlm.sequence import (
    GeometryAttention,
    GeometrySees,
    GeometryViews,
    SemanticImage,
    SemanticImageAttention,
    SequenceBuilder,
    ViewPositions,
)

ImageLike = SourceImage | Image.Image | np.ndarray | str | Path
Images = ImageLike | Sequence[ImageLike] | None
Content = Mapping[str, Any]
"""A part: {"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "views", "views": [...]}."""

"""Where, in the text of a question, an image stands."""


class ModelInputs(BatchFeature):
    """Keyword arguments of the model's forward.

    `sequence` and `views` always; with semantic images `pixel_values` (patches, 6 * patch_size^2) and `image_grid_thw`
    (images, 3).
    """

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "ModelInputs":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same inputs on `device`, their pixels in `dtype`."""
        moved: dict[str, Any] = {
            "sequence": self["sequence"].to(device),
            "views": [images.to(device, dtype) for images in self["views"]],
        }
        if "pixel_values" in self:
            moved["pixel_values"] = self["pixel_values"].to(device, dtype)
            moved["image_grid_thw"] = self["image_grid_thw"].to(device)
        return ModelInputs(moved)


class G2VLMProcessor(ProcessorMixin):
    """Questions with images, in the released chat template, as one packed sequence.

    Args:
        tokenizer: of the checkpoint.
        chat_template: for transformers' text rendering, by default the tokenizer's; the model's sequence follows
            `g2vlm.prompts.chat_segments`.
        semantic_rule: fields of `SemanticRule`.
        view_width: width in pixels that views are brought to for the geometry encoder.
        views_prompt: the sentence before the views, as in the released training samples; the released `chat_with_recon`
            leaves it out ("").
        geometry_attention, semantic_image_attention, view_positions, geometry_sees: as in `SequenceBuilder`.
        trained_video_prompts: keys of `VIDEO_PROMPTS` that questions about videos had in training; a record, which
            changes nothing.

    Raises:
        CheckpointError: the tokenizer lacks a special token.
        InputError: a rule that no image can follow.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        semantic_rule: Mapping[str, Any] | None = None,
        view_width: int = 518,
        views_prompt: str = RECON_PROMPT,
        geometry_attention: str = "global",
        semantic_image_attention: str = "full",
        view_positions: str = "sequential",
        geometry_sees: str = "everything",
        trained_video_prompts: Sequence[str] = (),
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.rule = SemanticRule.official() if semantic_rule is None else SemanticRule(**semantic_rule)
        self.semantic_rule = self.rule.plain()
        self.view_width = view_width
        self.views_prompt = views_prompt
        self.geometry_attention = geometry_attention
        self.semantic_image_attention = semantic_image_attention
        self.view_positions = view_positions
        self.geometry_sees = geometry_sees
        self.trained_video_prompts = [*trained_video_prompts]
        self.chat = ChatTokenizer(tokenizer, tokenizer.name_or_path or "the processor")

    @classmethod
    def from_config(
        cls, config: G2VLMConfig, tokenizer: PreTrainedTokenizerFast, rule: SemanticRule
    ) -> "G2VLMProcessor":
        """The processor of a model that has none saved."""
        return cls(tokenizer, **processor_fields(config, rule))

    @property
    def model_input_names(self) -> list[str]:
        """Names that `__call__` may give."""
        return ["sequence", "views", "pixel_values", "image_grid_thw"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Images | Sequence[Images] = None,
        text: str | Sequence[str] | None = None,
        geometry: bool = True,
        views: Images | Sequence[Images] = None,
        return_tensors: str = "pt",
    ) -> ModelInputs:
        """One question, or several packed into one sequence, whose tokens never see each other.

        Args:
            images: semantic images of the question, one or several: paths, PIL images or (H, W, 3) arrays. They stand
                where the text says `<image>`; without any `<image>` they stand before the text.
            text: the question; or several, with `images` and `views` holding what belongs to each.
            geometry: give the geometry encoder the views, first in the user's turn.
            views: other views for the geometry encoder than `images`.
            return_tensors: "pt".

        Raises:
            InputError: no text, another number of `<image>` than images, or an unusable image.
        """
        _require("return_tensors", return_tensors, "pt")
        if isinstance(text, str):
            return self._inputs([self._content(images, text, views, geometry)])  # pyright: ignore[reportArgumentType]
        if not text:
            raise InputError("no question", "text is empty", "give text, and images if it is about images")
        per_question = zip(text, _belonging("images", images, text), _belonging("views", views, text), strict=True)
        return self._inputs([self._content(own, question, seen, geometry) for question, own, seen in per_question])

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, conversation: Sequence[Content], geometry: bool = True, **options: Any
    ) -> ModelInputs:
        """One question whose text, images and views are interleaved.

        Args:
            conversation: the parts in order, or one message {"role": "user", "content": text or parts}.
            geometry: with `False` views are left out; with `True` and without any, the images are views as well.
            options: transformers' own, where they have the only value that a question to the model can have.

        Raises:
            InputError: more than one turn, an unknown part or option, or an unusable image.
        """
        for name, value in options.items():
            _require(name, value, _OPTIONS.get(name))
        content = [_read(part) for part in _parts(conversation)]
        images = [part["image"] for part in content if part["type"] == "image"]
        if not any(part["type"] == "views" for part in content) and images:
            content.insert(0, {"type": "views", "views": images})
        return self._inputs([[part for part in content if geometry or part["type"] != "views"]])

    def _content(self, images: Images, text: str, views: Images, geometry: bool) -> list[Content]:
        """The parts of a question that is given as text with placeholders."""
        own = [to_source(image) for image in _listed(images)]
        seen = [to_source(image) for image in _listed(views)] or own
        content: list[Content] = [{"type": "views", "views": seen}] if geometry and seen else []
        for part in place_images(text, own):
            content += [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}]
        return content

    def _inputs(self, questions: Sequence[Sequence[Content]]) -> ModelInputs:
        """Packed questions, whose images have been read."""
        media = _Media([], [])
        samples = [chat_segments(self.chat, [*self._turn(question, media)]) for question in questions]
        inputs: dict[str, Any] = {"sequence": self._builder().build(samples), "views": media.views}
        if media.images:
            pixel_values, grids = semantic_pixels(media.images, self.rule)
            inputs |= {"pixel_values": torch.from_numpy(pixel_values), "image_grid_thw": torch.from_numpy(grids)}
        return ModelInputs(inputs)

    def _turn(self, question: Sequence[Content], media: "_Media") -> Iterator[Part]:
        """The user's turn; its pixels are added to `media` in the order of their segments."""
        if not any(part["type"] == "text" and part["text"] for part in question):
            raise InputError("no question", "there is no text", "give text, and images if it is about images")
        for part in question:
            if part["type"] == "text":
                yield part["text"]
            elif part["type"] == "image":
                media.images.append(part["image"].pixels)
                yield SemanticImage(semantic_grid(part["image"].size, self.rule))
            else:
                views = torch.from_numpy(geometry_pixels(part["views"], self.view_width))  # (S, 3, H, W)
                media.views.append(normalise_views(views))
                yield self.views_prompt
                yield GeometryViews((view_grid(views, PATCH),) * len(views))

    def _builder(self) -> SequenceBuilder:
        return SequenceBuilder(
            self.chat.ids,
            cast(GeometryAttention, self.geometry_attention),
            cast(SemanticImageAttention, self.semantic_image_attention),
            cast(ViewPositions, self.view_positions),
            cast(GeometrySees, self.geometry_sees),
        )


@dataclass(frozen=True)
class _Media:
    """Pixels of the segments so far: normalised views (S, 3, H, W) per segment, images (H, W, 3) uint8."""

    views: list[Tensor]
    images: list[np.ndarray]


_OPTIONS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
_PARTS = ("text", "image", "views")


def _require(name: str, value: object, only: object) -> None:
    if value != only or only is None:
        fix = "leave it out" if only is None else f"it can only be {only!r}"
        raise InputError(f"unusable {name}={value!r}", "the processor makes one packed sequence of tensors", fix)


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return [*images] if isinstance(images, list | tuple) else [images]


def _belonging(name: str, values: Any, questions: Sequence[str]) -> list[Any]:
    """What belongs to each of several questions."""
    if values is None:
        return [None] * len(questions)
    if not isinstance(values, list | tuple) or len(values) != len(questions):
        count = len(values) if isinstance(values, list | tuple) else 1
        raise InputError(
            f"{len(questions)} questions and {count} entries of {name}",
            f"with several questions, {name} holds what belongs to each",
            f"give {name}=[[...], [...]], one list or None for each question",
        )
    return [*values]


def _parts(conversation: Sequence[Content]) -> list[Content]:
    """The parts of the only message, or the parts themselves."""
    if any("role" in part for part in conversation):
        if [part.get("role") for part in conversation] != ["user"]:
            raise InputError(
                "cannot use the conversation",
                f"its roles are {', '.join(str(part.get('role')) for part in conversation)}",
                "give one message of the user; the system text is fixed, and earlier turns are not part of a question",
            )
        content = conversation[0]["content"]
        return [{"type": "text", "text": content}] if isinstance(content, str) else [*content]
    return [*conversation]


def _read(part: Content) -> Content:
    """A checked part with its images read."""
    kind = part.get("type")
    if kind not in _PARTS or kind not in part:
        raise InputError(
            f"cannot use a part of type {kind!r} with the keys {', '.join(map(str, part))}",
            "a part holds its content under the name of its type",
            'give {"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "views", "views": [...]}',
        )
    if kind == "text":
        return part
    if kind == "image":
        return {"type": kind, "image": to_source(part["image"])}
    return {"type": kind, "views": [to_source(view) for view in _listed(part["views"])]}


def processor_fields(config: G2VLMConfig, rule: SemanticRule) -> dict[str, Any]:
    """Arguments of a model's processor, without its tokenizer."""
    mixed = config.geometry_attention == "mixed"
    return {
        "semantic_rule": rule.plain(),
        "view_width": config.view_width,
        "views_prompt": RECON_PROMPT,
        "geometry_attention": "global" if mixed else config.geometry_attention,
        "semantic_image_attention": config.semantic_image_attention,
        "view_positions": config.view_positions,
        "geometry_sees": config.geometry_sees,
        "trained_video_prompts": [],
    }


AutoProcessor.register(G2VLMConfig, G2VLMProcessor, exist_ok=True)
