"""`load` a model, `reconstruct` scenes and `ask` about them: the only place that joins files, pixels and the model."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from g2vlm.asking import Answer, Context, look
from g2vlm.chat_model import MAX_CONTEXT, ChatModel
from g2vlm.checkpoint import DEMO_NAME, load_model, or_demo
from g2vlm.errors import InputError
from g2vlm.generation import Stream
from g2vlm.images import SourceImage, from_memory, geometry_pixels, list_images, read_images
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.predictions import scene_of
from g2vlm.processing import recon_inputs
from g2vlm.sampling import GenerationOptions
from g2vlm.scene import Scene
from geometry import GeometryPrediction

log = logging.getLogger(__name__)

ImageInput = str | Path | Image.Image | np.ndarray
Images = ImageInput | Iterable[ImageInput]
Geometry = Literal["on", "off"]
"""Whether the geometric expert sees the images too, or the semantic expert answers alone."""


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    max_context: int = MAX_CONTEXT,
) -> "Pipeline":
    """Load a model for inference.

    Args:
        model: a folder in our layout or in the released one, a hub id, or the name of a preset (random weights); by
            default the demo weights of the package.
        device: where to run; by default the first GPU, else the CPU.
        dtype: precision of the weights; by default bfloat16 on a GPU, float32 on the CPU.
        revision: commit of a hub id.
        max_context: a question, its images and its answer have at most this many tokens.

    Raises:
        CheckpointError: the weights are absent, incomplete, damaged or of another architecture.
        InputError: there is no such model.
    """
    source = or_demo(model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    name = DEMO_NAME if model is None else str(model)
    return Pipeline(load_model(source, dtype=dtype, device=device, revision=revision), name, max_context)


class Pipeline:
    """A loaded model with the steps from photographs to scenes and answers; no call leaves anything to the next."""

    def __init__(self, model: G2VLMForConditionalGeneration, name: str, max_context: int = MAX_CONTEXT):
        self.model = model.eval()
        self.name = name
        self.max_context = max_context
        if not model.config.tokens.recon_prompt:
            log.warning("%s knows no reconstruction prompt (converted without a tokenizer): bos alone is used", name)

    def reconstruct(
        self,
        images: Images,
        width: int | None = None,
        max_views: int | None = None,
        skip_bad: bool = False,
    ) -> Scene:
        """Points, depth, normals and cameras of the views of one scene.

        Args:
            images: a folder, files, glob patterns, PIL images or uint8 arrays (H, W, 3).
            width: width in pixels that the views are brought to; by default the config's `view_width`.
            max_views: use at most this many views, evenly chosen.
            skip_bad: continue without unreadable files instead of refusing.

        Raises:
            InputError: nothing to read, or an unreadable file.
        """
        return self.reconstruct_sources(read_sources(images, max_views, skip_bad), width)

    def reconstruct_sources(self, sources: list[SourceImage], width: int | None = None) -> Scene:
        """Like `reconstruct`, from images already read."""
        width = self.model.config.view_width if width is None else width
        pixels = torch.from_numpy(geometry_pixels(sources, width))  # (S, 3, H, W)
        return scene_of(self.predict(pixels), pixels, sources, self.name)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor, backend: str | None = None) -> GeometryPrediction:
        """The model's prediction for the views (S, 3, H, W) in [0, 1] of one scene, float32 on the CPU.

        Args:
            pixels: the views.
            backend: attention backend; None chooses.
        """
        inputs = recon_inputs(pixels, self.model.config, self.model.device)
        output = self.model(**inputs, backend=backend)
        (prediction,) = output.geometry
        return prediction.to("cpu")

    @cached_property
    def chat(self) -> ChatModel:
        """The model as one that can be asked.

        Raises:
            CheckpointError: it has no tokenizer, or another model's.
        """
        return ChatModel.of(self.model, self.name, self.max_context)

    def ask(
        self,
        images: Images | Scene | None,
        question: str,
        geometry: Geometry = "on",
        return_geometry: bool = False,
        options: GenerationOptions | None = None,
        stream: Stream | None = None,
        width: int | None = None,
        max_views: int | None = None,
    ) -> Answer:
        """The answer to one question.

        Args:
            images: as in `reconstruct`; a scene, whose photographs are not read again; or None to ask about nothing.
            question: text; `<image>` once for each image says where it stands, by default before the text.
            geometry: whether the geometric expert sees the images as well.
            return_geometry: `Answer.scene` holds points and cameras from the same pass; the answer is the same.
            options: how to answer.
            stream: called with 0 and the next piece of the answer.
            width: of the views in pixels; by default the scene's, or the processor's `view_width`.
            max_views: use at most this many images, evenly chosen.

        Raises:
            InputError: unreadable images, an empty question, a wrong number of `<image>`, or more than the context
                holds (with the number of images that fit).
            CheckpointError: the model has no tokenizer.
        """
        items = [(images, question)]
        (answer,) = self.ask_many(items, 1, geometry, return_geometry, options, stream, width, max_views)
        return answer

    def ask_many(
        self,
        items: Iterable[tuple[Images | Scene | None, str]],
        batch_size: int = 8,
        geometry: Geometry = "on",
        return_geometry: bool = False,
        options: GenerationOptions | None = None,
        stream: Stream | None = None,
        width: int | None = None,
        max_views: int | None = None,
    ) -> Iterator[Answer]:
        """The answers to many questions, in order, as they come.

        Neighbours about the same images share one pass over them and are answered together; no question knows of
        another, so neither their order nor `batch_size` changes an answer.

        Args:
            items: images and question, as in `ask`.
            batch_size: at most this many questions are answered together.
            geometry, return_geometry, options, width, max_views: as in `ask`, for all.
            stream: called with the index of an item and the next piece of its answer.

        Raises:
            InputError, CheckpointError: as in `ask`; the whole batch of that item stays unanswered.
        """
        options = replace(options or GenerationOptions(), batch_size=batch_size)
        first = 0
        kept = ((_kept(images), question) for images, question in items)
        for _, neighbours in groupby(kept, key=lambda item: _identity(item[0])):
            item = next(neighbours)
            context = self.context(item[0], geometry, return_geometry, width, max_views)
            neighbours = chain([item], neighbours)
            while batch := [question for _, question in islice(neighbours, batch_size)]:
                yield from context.ask_all(batch, options, _shifted(stream, first))
                first += len(batch)

    def context(
        self,
        images: Images | Scene | None,
        geometry: Geometry = "on",
        return_geometry: bool = False,
        width: int | None = None,
        max_views: int | None = None,
    ) -> Context:
        """What the model sees of some images, to be asked any number of times; arguments and errors as in `ask`."""
        if isinstance(images, Scene):
            width = images.resized_to[1] if width is None else width
            sources = evenly_chosen(photographs(images), max_views)
        else:
            sources = [] if images is None else read_sources(images, max_views)
        return self.context_of_sources(sources, geometry, return_geometry, width)

    def context_of_sources(
        self,
        sources: list[SourceImage],
        geometry: Geometry = "on",
        return_geometry: bool = False,
        width: int | None = None,
    ) -> Context:
        """Like `context`, from images already read."""
        if geometry not in get_args(Geometry):
            raise InputError(f"geometry is {geometry!r}", "", f"allowed are {', '.join(get_args(Geometry))}")
        if return_geometry and (geometry == "off" or not sources):
            why = "geometry is off" if sources else "there are no images"
            raise InputError("there is no geometry to return", why, "ask for the answer alone")
        return look(self.chat, sources, sources if geometry == "on" else [], width, return_geometry)


def photographs(scene: Scene) -> list[SourceImage]:
    """The images that a scene was reconstructed from, as they were read; those of a loaded scene are read again.

    Raises:
        InputError: they came from memory and the scene was loaded from a folder, or a file is unreadable.
    """
    if scene.sources is not None:
        return list(scene.sources)
    paths = [path for path in scene.image_paths if path is not None]
    if len(paths) < scene.num_views:
        why = f"{scene.num_views - len(paths)} of its {scene.num_views} images were given in memory and are not saved"
        raise InputError("the photographs of the scene are unknown", why, "ask about the images themselves")
    return read_images(paths)[0]


def _kept(images: Images | Scene | None) -> Images | Scene | None:
    """The same images, for more than one look at them."""
    lasting = isinstance(images, str | Path | Image.Image | np.ndarray | Scene)
    return images if lasting or images is None else tuple(images)


def _identity(images: Images | Scene | None) -> object:
    """Equal for equal images: names of files, a scene itself, the present content of what is in memory."""
    if images is None or isinstance(images, Scene):
        return images
    if isinstance(images, str | Path):
        return str(images)
    if isinstance(images, Image.Image | np.ndarray):
        pixels = np.ascontiguousarray(images)
        return pixels.shape, pixels.dtype.str, hashlib.blake2b(pixels.tobytes()).digest()
    return tuple(_identity(image) for image in images)


def _shifted(stream: Stream | None, first: int) -> Stream | None:
    """A stream for questions that begin at another index."""
    return None if stream is None else lambda index, piece: stream(first + index, piece)


def read_sources(images: Images, max_views: int | None = None, skip_bad: bool = False) -> list[SourceImage]:
    """Read the views of a scene from files or memory, in order.

    Raises:
        InputError: nothing to read, or an unreadable file.
    """
    items = [images] if isinstance(images, str | Path | Image.Image | np.ndarray) else list(images)
    if not items:
        raise InputError("no images given", "the list is empty", "name a folder, files or a glob pattern")
    if all(isinstance(item, str | Path) for item in items):
        paths = evenly_chosen(list_images(items), max_views)  # pyright: ignore[reportArgumentType]
        return read_images(paths, skip_bad)[0]
    if any(isinstance(item, str | Path) for item in items):
        raise InputError("paths and in-memory images are mixed", "", "give only one kind")
    return [from_memory(item) for item in evenly_chosen(items, max_views)]  # pyright: ignore[reportArgumentType]


def evenly_chosen(items: list, count: int | None) -> list:
    """At most `count` items, evenly spread, first and last included."""
    if count is None or len(items) <= count:
        return items
    log.info("using %d of %d views, evenly chosen", count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
