"""A model as diagnostics see it: the views of a scene go in, what its layers make of them comes out, view by view.

Shapes: S views, H W pixels, h x w tokens of a view, d width, N query heads, M key heads, K width of a head.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from eval.baselines import UNTRAINED, UNTRAINED_SEED
from eval.runs import load_named, provenance_of
from g2vlm.asking import look
from g2vlm.chat_model import ChatModel
from g2vlm.checkpoint import random_model
from g2vlm.data.chat.types import ChatShape, ImageAt, Turn
from g2vlm.data.qa.showing import blank_views
from g2vlm.errors import InputError, ResourceError
from g2vlm.images import from_memory
from g2vlm.model.recorder import Recorder
from g2vlm.pipeline import Pipeline
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.processor import G2VLMProcessor
from g2vlm.semantic_images import SemanticRule, semantic_pixels
from g2vlm.sequence import IGNORED, Grid
from g2vlm.stock.layout import StockLayout
from g2vlm.stock.model import image_rule, is_stock, load_processor, load_stock
from g2vlm.supervision.backbones import Backbone, HeadStates, Taps, backbone_of, clip
from g2vlm.supervision.backbones.base import PerSample

log = logging.getLogger(__name__)
Geometry = Literal["on", "off"]
SMALLEST = 28
"""Side in pixels of a semantic token of our own model."""


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """Queries or keys of a block, (S, h, w, heads, K) each."""

    before_rotary: Tensor
    after_rotary: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What a forward over the views of one scene leaves; float32 on the CPU.

    Args:
        hidden: per tapped layer, (S, h, w, d); layers are numbered as in `Taps`.
        queries, keys: per tapped block, N and M heads.
        expert: per block of a geometric expert, its output (S, rows, columns, d) on its own grid.
    """

    hidden: Mapping[int, Tensor]
    queries: Mapping[int, HeadMaps] = field(default_factory=dict)
    keys: Mapping[int, HeadMaps] = field(default_factory=dict)
    expert: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Student:
    """A frozen model with everything between the views of a scene and its forward.

    Args:
        name: for people.
        backbone: the model.
        inputs: views (S, 3, H, W) uint8 -> keyword arguments of the model's forward.
        provenance: of its weights.
        trained_size: width in pixels of the views that it was trained on; None where nobody says.
        expert: blocks of a geometric expert that saw the same views, and its grid in given inputs.
    """

    name: str
    backbone: Backbone
    inputs: Callable[[Tensor], Mapping[str, Any]]
    provenance: Mapping[str, Any]
    trained_size: int | None = None
    expert: tuple[Sequence[nn.Module], Callable[[Mapping[str, Any]], Grid]] | None = None

    @torch.inference_mode()
    def see(self, images: Tensor, taps: Taps, with_expert: bool = False) -> Seen:
        """Run the model on the views of one scene.

        Args:
            images: (S, 3, H, W) uint8.
            taps: what to keep.
            with_expert: also the blocks of the geometric expert, if there is one.

        Raises:
            InputError: more views than fit into the context.
            ResourceError: not enough memory.
        """
        blocks, grid_of = self.expert if with_expert and self.expert else ((), None)
        try:
            inputs = self.inputs(images)
            with Recorder() if blocks else nullcontext() as recorder:
                for block in blocks:
                    cast(Recorder, recorder).keep_output(block)
                tapped = self.backbone(inputs, taps)
        except (torch.OutOfMemoryError, MemoryError) as error:
            why = str(error).partition("\n")[0]
            raise ResourceError("not enough memory for a clip", why, "use fewer --views or a smaller --size") from error
        (grids,) = tapped.frames
        seen = Seen(
            {layer: _maps(states, grids) for layer, states in tapped.hidden.items()},
            {block: _head_maps(states, grids) for block, states in tapped.queries.items()},
            {block: _head_maps(states, grids) for block, states in tapped.keys.items()},
        )
        if grid_of is None:
            return seen
        expert_grids = (grid_of(inputs),) * len(images)
        outputs = [cast(Recorder, recorder).output(block)[0] for block in blocks]
        return replace(seen, expert={i + 1: _maps((output,), expert_grids) for i, output in enumerate(outputs)})


def _maps(states: PerSample, grids: Sequence[Grid]) -> Tensor:
    """States (n, ...) of the only sample -> (S, h, w, ...)."""
    (own,) = states
    return clip(own.float().cpu(), grids)


def _head_maps(states: HeadStates, grids: Sequence[Grid]) -> HeadMaps:
    return HeadMaps(_maps(states.before_rotary, grids), _maps(states.after_rotary, grids))


class StudentModel(Protocol):
    """A loaded model, from which students for views of any width are made."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def student(self, size: int, geometry: Geometry = "on", blank: bool = False) -> Student:
        """The model for views of a width.

        Args:
            size: width in pixels of the views.
            geometry: `off`: no views for a geometry encoder, of a model that has one.
            blank: it sees grey instead.

        Raises:
            CheckpointError: the model has no tokenizer.
        """
        ...

    def untrained(self) -> "StudentModel":
        """The same architecture with random weights."""
        ...


def open_model(model: str | None, device: str, dtype: str | None) -> StudentModel:
    """Load a model: folder (ours, or a stock Qwen-VL's), hub id or preset; by default the demo weights.

    Raises:
        CheckpointError: as `g2vlm.pipeline.load`, or as `load_stock` of a stock Qwen-VL's folder.
        InputError: there is no such model.
    """
    if model is not None and is_stock(model):
        return StockModel.load(Path(model), device, dtype)
    return OwnModel(load_named(model, device, dtype))


# ---------------------------------------------------------------------------------------------- our own model


@dataclass(frozen=True, eq=False)
class OwnModel:
    """A G2VLM. It is shown views as it is before it is asked about them; no question follows.

    The limits of its rule for semantic images are widened to the views.
    """

    pipeline: Pipeline

    @property
    def name(self) -> str:
        """As in `StudentModel`."""
        return self.pipeline.name

    def student(self, size: int, geometry: Geometry = "on", blank: bool = False) -> Student:
        """As in `StudentModel`."""
        chat, model = at_size(self.pipeline.chat, size), self.pipeline.model

        def inputs(images: Tensor) -> Mapping[str, Any]:
            shown = blank_views(images) if blank else images
            sources = [from_memory(image) for image in shown.permute(0, 2, 3, 1).cpu().numpy()]
            context = look(chat, sources, sources if geometry == "on" else [], size)
            assert context.images is not None
            sequence = sequence_builder(model.config).build([(*context.opening, *context.images.segments)])
            views = [] if context.views is None else [normalise_views(context.views.pixels.to(model.device))]
            return {
                "sequence": sequence.to(model.device),
                "views": views,
                "pixel_values": context.images.pixel_values,
                "image_grid_thw": context.images.grid_thw,
                "logits_at": torch.zeros(0, dtype=torch.int64, device=model.device),
            }

        expert = ([*model.decoder.layers], _view_grid) if geometry == "on" else None
        trained_size = self.pipeline.chat.processor.view_width
        return Student(self.name, backbone_of(model), inputs, self.provenance, trained_size, expert)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Of the weights, whose files are read for it once."""
        return provenance_of(self.pipeline)

    def untrained(self) -> "OwnModel":
        """As in `StudentModel`."""
        trained = self.pipeline.model
        model = random_model(trained.config, trained.dtype, UNTRAINED_SEED)
        model.config.name_or_path = trained.config.name_or_path  # where its tokenizer is
        model.to(trained.device)  # pyright: ignore[reportArgumentType]
        return OwnModel(Pipeline(model, f"{self.name}, {UNTRAINED}"))


def at_size(chat: ChatModel, size: int) -> ChatModel:
    """The same model with a processor that keeps images of size x size as they are, unless its rule squashes all."""
    processor = chat.processor
    rule = widened(processor.rule, size)
    own = G2VLMProcessor.from_config(chat.model.config, processor.tokenizer, rule)
    own.views_prompt, own.view_width = processor.views_prompt, size
    return replace(chat, processor=own)


def widened(rule: SemanticRule, size: int) -> SemanticRule:
    """A rule whose limits of the area let size x size pixels through."""
    area = size**2
    return replace(rule, min_pixels=min(rule.min_pixels, area), max_pixels=max(rule.max_pixels, area))


def _view_grid(inputs: Mapping[str, Any]) -> Grid:
    return inputs["sequence"].view_grids[0][0]


# ---------------------------------------------------------------------------------------------- stock models


@dataclass(frozen=True, eq=False)
class StockModel:
    """A stock Qwen-VL: views are the images that its chat template opens a user's turn with; no question follows.

    Every view is an image, never a step of a video, so that a grid of tokens is one view. The processor's limits of
    the area are widened to the views.

    Args:
        name: of its folder.
        model: of transformers.
        processor: of the same folder.
    """

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path, device: str, dtype: str | None) -> "StockModel":
        """From a folder; errors as of `load_stock` and `load_processor`."""
        precision = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        model = load_stock(folder, getattr(torch, precision)).eval().to(device)
        log.info("model %s, a stock %s", folder, model.config.model_type)
        return cls(str(folder), model, load_processor(folder, model.config))

    def student(self, size: int, geometry: Geometry = "on", blank: bool = False) -> Student:
        """As in `StudentModel`; there is no geometry encoder that `geometry` could switch.

        Raises:
            CheckpointError: a processor without a chat template, or whose patches are no Qwen-VL's.
        """
        layout = StockLayout(self.processor, widened(image_rule(self.processor, None), size))

        def inputs(images: Tensor) -> Mapping[str, Any]:
            shown = (blank_views(images) if blank else images).permute(0, 2, 3, 1).cpu().numpy()
            places = tuple(map(ImageAt, range(len(shown))))
            ids = torch.tensor([layout.row(ChatShape((Turn(places, None),), (shown.shape[1:3],) * len(shown))).ids])
            require_fit(ids.shape[1], self.model.config.get_text_config().max_position_embeddings)
            pixels, grids = semantic_pixels([*shown], layout.rule)
            given = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == self.processor.image_token_id).int(),
                "pixel_values": torch.from_numpy(pixels),
                "image_grid_thw": torch.from_numpy(grids),
                "labels": torch.full_like(ids, IGNORED),
            }
            return {name: value.to(self.model.device) for name, value in given.items()} | {"logits_at_labels": True}

        return Student(self.name, backbone_of(self.model), inputs, self.provenance)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Of the weights, whose files are read for it once."""
        return provenance_of(self)

    def untrained(self) -> "StockModel":
        """As in `StudentModel`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            model = type(self.model)(deepcopy(self.model.config))
        model.config.name_or_path = ""  # its weights are no file's
        model.to(self.model.device, self.model.dtype).eval()
        return StockModel(f"{self.name}, {UNTRAINED}", model, self.processor)


def require_fit(num_tokens: int, context: int) -> None:
    """Raise InputError if views have more tokens than a context."""
    if num_tokens > context:
        why = f"{num_tokens:,} tokens; the context has {context:,}"
        raise InputError("the views do not fit into the context", why, "use fewer --views or a smaller --size")


def require_size(name: str, size: int | None) -> None:
    """Raise InputError unless an optional width is a multiple of 28, the pixels of a semantic token."""
    if size is not None and (size < SMALLEST or size % SMALLEST):
        raise InputError(f"cannot use {name} {size}", f"a semantic token covers {SMALLEST} pixels", "give a multiple")
