"""Questions about images. What a model has seen is a `Context`: computed once, asked many times, never changed.

A question may say where its images stand: `<image>` for each of them, in order. Without it they stand before the text.
The views of the geometry encoder stand before both, right after the system's words (released code, `chat_with_recon`).
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from g2vlm import generation
from g2vlm.chat_model import ChatModel
from g2vlm.errors import InputError
from g2vlm.generation import Prefix, Stream
from g2vlm.geometry_tokens import expert_tokens
from g2vlm.images import PATCH, SourceImage, geometry_pixels, geometry_size
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.predictions import scene_of
from g2vlm.processing import normalise_views
from g2vlm.prompts import Part, chat_segments, next_turn, place_images
from g2vlm.sampling import GenerationOptions
from g2vlm.scene import Scene
from g2vlm.semantic_images import semantic_grid, semantic_pixels
from g2vlm.sequence import GeometryViews, Segment, SemanticImage

Segments = tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the model says to one question.

    Args:
        question: as it was asked.
        text: the answer.
        ids: its tokens, without eos.
        finish: what ended it: the eos token, a stop string, or `max_new_tokens` ("length").
        seconds: wall time of the batch that it was answered in, with the images if they were new.
        scene: points and cameras from the same pass over the views, if asked for.
    """

    question: str
    text: str
    ids: tuple[int, ...]
    finish: Literal["eos", "stop", "length"]
    seconds: float
    scene: Scene | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Views:
    """What the geometry encoder sees: S views of one size.

    Args:
        sources: the S images as read.
        pixels: (S, 3, H, W) in [0, 1] on the CPU.
    """

    sources: tuple[SourceImage, ...]
    pixels: Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """What the semantic encoder sees, for a question to place.

    Args:
        segments: one for each image.
        pixel_values: (patches, 1176) of all of them.
        grid_thw: (images, 3) their grids in patches.
    """

    segments: tuple[SemanticImage, ...]
    pixel_values: Tensor
    grid_thw: Tensor


def look(
    chat: ChatModel,
    images: Sequence[SourceImage],
    views: Sequence[SourceImage],
    width: int | None = None,
    predict_geometry: bool = False,
) -> "Context":
    """What a model sees before it is asked.

    Args:
        chat: the model.
        images: for the semantic encoder.
        views: for the geometry encoder: the images themselves; none to ask without geometry; or those of another scene,
            which shows whether the model uses them.
        width: of the views in pixels; by default the processor's `view_width`.
        predict_geometry: answers come with the scene.

    Raises:
        InputError: more than fits into the context, or an image that an encoder does not take.
    """
    processor, device = chat.processor, chat.model.device
    if chat.model.config.fusion and images and views and len(images) != len(views):
        why = "the model's fusion pairs them one by one"
        raise InputError(f"{len(images)} images and {len(views)} views", why, "give as many views as images")
    width = processor.view_width if width is None else width
    segments = tuple(SemanticImage(semantic_grid(image.size, processor.rule)) for image in images)
    parts: list[Part] = []
    if views:
        rows, columns = (side // PATCH for side in geometry_size(views[0].size, width))
        parts = [processor.views_prompt, GeometryViews(((rows, columns),) * len(views))]
    opening = tuple(chat_segments(chat.tokenizer, parts)[:-2])  # without what ends a turn
    chat.require_fit((*opening, *segments))
    pixel_values, grid_thw = semantic_pixels([image.pixels for image in images], processor.rule)
    return Context(
        chat,
        opening,
        Images(segments, torch.from_numpy(pixel_values).to(device), torch.from_numpy(grid_thw).to(device)),
        Views(tuple(views), torch.from_numpy(geometry_pixels(views, width))) if views else None,
        predict_geometry,
    )


@dataclass(frozen=True, eq=False)
class Context:
    """What a model has seen and said so far. Asking does not change it, so no question knows of another.

    Args:
        chat: the model.
        opening: what stands before the user's next words, after `before`.
        images: for the next question to place; None once they are placed.
        views: of the opening.
        predict_geometry: answers come with the scene.
        before: keys and values of what stands before the opening.
    """

    chat: ChatModel
    opening: Segments
    images: Images | None = None
    views: Views | None = None
    predict_geometry: bool = False
    before: Prefix | None = None

    def ask(self, question: str, options: GenerationOptions | None = None, stream: Stream | None = None) -> Answer:
        """The answer to one question; arguments and errors as in `ask_all`."""
        (answer,) = self.ask_all([question], options, stream)
        return answer

    def ask_all(
        self, questions: Sequence[str], options: GenerationOptions | None = None, stream: Stream | None = None
    ) -> list[Answer]:
        """The answers to questions that do not know of each other.

        Args:
            questions: texts, with one `<image>` for each image or none.
            options: how to answer.
            stream: called with the index of a question and the next piece of its answer.

        Raises:
            InputError: an empty question, a wrong number of `<image>`, or more than fits into the context.
        """
        options = options or GenerationOptions()
        started = time.perf_counter()
        turns = [self.turn(question, options) for question in questions]
        alike: dict[Segments, list[int]] = {}
        for index, (lead, _) in enumerate(turns):
            alike.setdefault(lead, []).append(index)
        found: dict[int, tuple[generation.Answer, Scene | None]] = {}
        for lead, members in alike.items():
            seen = self._seen(lead)
            rests, heard = [turns[index][1] for index in members], _renumbered(stream, members)
            decode = self.chat.tokenizer.decode
            answers = generation.answer(self.chat.model, seen.prefix, rests, options, decode, heard)
            found |= {index: (answer, seen.scene) for index, answer in zip(members, answers, strict=True)}
        seconds = time.perf_counter() - started
        return [
            Answer(question, answer.text or "", answer.ids, answer.finish, seconds, scene)
            for index, question in enumerate(questions)
            for answer, scene in [found[index]]
        ]

    def then(self, question: str, answer: Answer) -> Self:
        """The context of what the user says next, after a question and its answer."""
        lead, rest = self.turn(question)
        opening = (*rest, *next_turn(self.chat.tokenizer, answer.ids))
        before = self._seen(lead).prefix
        return replace(self, opening=opening, images=None, views=None, predict_geometry=False, before=before)

    def turn(self, question: str, options: GenerationOptions | None = None) -> tuple[Segments, Segments]:
        """A question as segments: those up to its last image, and the text after it.

        Raises:
            InputError: as in `ask_all`.
        """
        images = self.images.segments if self.images else ()
        _, *turn = chat_segments(self.chat.tokenizer, place_images(question, images))
        num_cached = self.before.num_tokens if self.before else 0
        num_answer = 1 if options is None else options.max_new_tokens
        self.chat.require_fit((*self.opening, *turn), num_cached, num_answer)
        stop = max((i + 1 for i, segment in enumerate(turn) if isinstance(segment, SemanticImage)), default=0)
        return tuple(turn[:stop]), tuple(turn[stop:])

    def _seen(self, lead: Segments) -> "_Seen":
        """Everything up to the last image of a question; what images before the text leave is kept."""
        if self.images is None or lead == self.images.segments:
            return self._front
        return _Seen(self._prefill(lead, self.images, None, self._opened.prefix), self._opened.scene)

    @cached_property
    def _front(self) -> "_Seen":
        """Opening and images, in one forward."""
        images = self.images.segments if self.images else ()
        prefix = self._prefill((*self.opening, *images), self.images, self.views, self.before)
        return _Seen(prefix, self._scene(prefix))

    @cached_property
    def _opened(self) -> "_Seen":
        """The opening alone, for questions with text before an image."""
        prefix = self._prefill(self.opening, None, self.views, self.before)
        return _Seen(prefix, self._scene(prefix))

    def _prefill(self, segments: Segments, images: Images | None, views: Views | None, after: Prefix | None) -> Prefix:
        model, shown = self.chat.model, images if images and images.segments else None
        with model.given_frames.use(self._frames) if shown and self._fuses else nullcontext():
            return generation.prefill(
                model,
                segments,
                views=[_normalised(views, model)] if views else [],
                pixel_values=shown.pixel_values if shown else None,
                image_grid_thw=shown.grid_thw if shown else None,
                predict_geometry=self.predict_geometry,
                after=after,
            )

    @property
    def _fuses(self) -> bool:
        """Whether images are fused with what the model's own expert knows of the views."""
        fusion = self.chat.model.config.fusion
        return fusion is not None and fusion.source == "geometric_expert"

    @cached_property
    def _frames(self) -> list[Tensor | None]:
        """The geometry tokens that each image is fused with, whichever forward it is in; none without views."""
        model, fusion = self.chat.model, self.chat.model.config.fusion
        assert fusion is not None
        assert self.images is not None
        if self.views is None:
            return [None] * len(self.images.segments)
        (tokens,) = expert_tokens(model, [_normalised(self.views, model)], fusion.layer, fusion.camera)
        return [*tokens.only(fusion.tokens).frames(fusion.scope)]

    def _scene(self, prefix: Prefix) -> Scene | None:
        if self.views is None or not prefix.geometry:
            return None
        (prediction,) = prefix.geometry
        return scene_of(prediction, self.views.pixels, self.views.sources, self.chat.name)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A context and the scene that the geometric expert made of its views."""

    prefix: Prefix
    scene: Scene | None


def _normalised(views: Views, model: G2VLMForConditionalGeneration) -> Tensor:
    """(S, 3, H, W) on the model's device, as its geometry encoder takes them."""
    return normalise_views(views.pixels.to(model.device))


def _renumbered(stream: Stream | None, members: Sequence[int]) -> Stream | None:
    """A stream for some of the questions."""
    return None if stream is None else lambda index, piece: stream(members[index], piece)
