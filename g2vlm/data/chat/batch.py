"""Samples of questions and answers packed into one sequence: what a step of joint training takes.

Shapes: S views of H x W pixels, U semantic tokens of the pack, n patches of its semantic images, N images, L tokens
with a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2vlm.data.batch import SceneBatch, collate
from g2vlm.data.chat.layout import ChatLayout
from g2vlm.data.chat.types import ChatSample
from g2vlm.data.types import SceneSample
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.semantic_images import semantic_pixels
from g2vlm.sequence import IGNORED, GeometryAttention, PackedSequence, Segment, SemanticImage, Text
from g2vlm.supervision.targets import TeacherTargets


@dataclass(frozen=True)
class Filling:
    """What a pack must hold at least, so that all processes of a step call the same encoders equally often.

    Args:
        scenes: segments of views.
        images: whether there is a semantic image.
        view_size: (H, W) of a view that is filled in.
    """

    scenes: int = 0
    images: bool = False
    view_size: tuple[int, int] = (14, 14)


@dataclass(frozen=True, eq=False)
class ChatBatch:
    """One process's pack.

    Args:
        sequence: of all samples.
        scenes: one scene for each segment of views, in order, with its truth where it is known.
        pixel_values: (n, 1176) patches of all semantic images in the order of the sequence; None without any.
        image_grid_thw: (N, 3) their grids; None without any.
        supervised: (L,) the semantic tokens that have a label.
        names, tasks: of the samples, those filled in left out.
        clips: what the images of every sample show, in the order of the sequence, where it is known; the sample that is
            filled in has None.
        targets: what every clip is compared with; None of a sample without any.
        tokens: the geometry tokens (M, C) that every image reads, None of one that reads none; None where they are not
            given.
    """

    sequence: PackedSequence
    scenes: tuple[SceneBatch, ...]
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    supervised: Tensor
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    clips: tuple[SceneSample | None, ...] = ()
    targets: tuple[TeacherTargets | None, ...] = ()
    tokens: tuple[Tensor | None, ...] | None = None

    def to(self, device: torch.device | str) -> "ChatBatch":
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        scenes = tuple(scene.to(device) for scene in self.scenes)
        targets = tuple(own and own.to(device) for own in self.targets)
        tokens = self.tokens and tuple(None if own is None else own.to(device) for own in self.tokens)
        sequence = self.sequence.to(device)
        return replace(self, **moved, sequence=sequence, scenes=scenes, targets=targets, tokens=tokens)

    @property
    def label_ids(self) -> Tensor:
        """(L,) what the logits should predict, in their order."""
        return self.sequence.labels[self.supervised]

    @property
    def label_weights(self) -> Tensor:
        """(L,) of them."""
        return self.sequence.label_weights[self.supervised]

    def groups(self) -> list[tuple[list[int], SceneBatch]]:
        """The scenes of equal shape together: their numbers, and one batch of them."""
        shapes = [tuple(scene.images.shape) for scene in self.scenes]
        members = [[i for i, own in enumerate(shapes) if own == shape] for shape in dict.fromkeys(shapes)]
        return [(group, _joined([self.scenes[i] for i in group])) for group in members]


def collate_chats(
    samples: Sequence[ChatSample],
    layout: ChatLayout,
    filling: Filling | None = None,
    geometry_attention: GeometryAttention | None = None,
) -> ChatBatch:
    """Pack samples.

    Args:
        samples: none leaves a pack without any loss.
        layout: of the model.
        filling: what the pack must hold at least; what is missing is filled in by a sample without loss.
        geometry_attention: as in `sequence_builder`.

    Raises:
        InputError: an image of a size that the semantic encoder does not take.
    """
    packed: list[Sequence[Segment]] = [layout.segments(sample.shape) for sample in samples]
    scenes = [sample.scene for sample in samples if sample.scene is not None]
    images = [sample.images[i] for sample in samples for i in sample.shape.image_order]
    filling = filling or Filling()
    missing, imageless = max(filling.scenes - len(scenes), 0), filling.images and not images
    filled = missing or imageless or not samples
    if filled:
        packed.append(_filler(layout, missing, imageless, filling.view_size))
        scenes += [_empty_scene(filling.view_size)] * missing
    pixels, grids = _pixels(images, layout, imageless)
    sequence = sequence_builder(layout.config, geometry_attention).build(packed)
    return ChatBatch(
        sequence=sequence,
        scenes=tuple(collate([scene]) for scene in scenes),
        pixel_values=pixels,
        image_grid_thw=grids,
        supervised=(sequence.labels != IGNORED).nonzero().flatten(),
        names=tuple(sample.name for sample in samples),
        tasks=tuple(sample.task for sample in samples),
        clips=(*(shown_clip(sample) for sample in samples), *[None] * bool(filled)),
    )


def shown_clip(sample: ChatSample) -> SceneSample | None:
    """The clip of a sample in the order in which the conversation shows its images."""
    order = sample.shape.image_order
    if sample.clip is None or order == tuple(range(sample.clip.num_views)):
        return sample.clip
    return sample.clip.views(torch.tensor(order)) if order else None


def chat_inputs(batch: ChatBatch, predict_geometry: bool, predict_global_points: bool = False) -> dict[str, Any]:
    """Keyword arguments of the model's forward: logits where there are labels, and geometry when it is asked for."""
    return {
        "sequence": batch.sequence,
        "views": [normalise_views(scene.views[0]) for scene in batch.scenes],
        "pixel_values": batch.pixel_values,
        "image_grid_thw": batch.image_grid_thw,
        "logits_at": batch.supervised,
        "predict_geometry": predict_geometry,
        "predict_global_points": predict_geometry and predict_global_points,
    }


def _pixels(images: list[np.ndarray], layout: ChatLayout, filled: bool) -> tuple[Tensor | None, Tensor | None]:
    if filled:
        merge = layout.config.semantic_encoder.merge_size
        return torch.zeros(merge**2, _patch_values(layout)), torch.tensor([[1, merge, merge]])
    if not images:
        return None, None
    pixels, grids = semantic_pixels(images, layout.rule)
    return torch.from_numpy(pixels), torch.from_numpy(grids)


def _patch_values(layout: ChatLayout) -> int:
    encoder = layout.config.semantic_encoder
    return 3 * encoder.temporal_patch_size * encoder.patch_size**2


def _filler(layout: ChatLayout, scenes: int, image: bool, view_size: tuple[int, int]) -> list[Segment]:
    """A sample without loss: a word, scenes of one view, the smallest image."""
    merge = layout.config.semantic_encoder.merge_size
    shown = [SemanticImage((merge, merge), merge)] if image else []
    return layout.probed([Text((layout.config.tokens.bos,)), *[layout.views(1, view_size)] * scenes, *shown])


def _empty_scene(size: tuple[int, int]) -> SceneSample:
    return SceneSample(torch.zeros(1, 3, *size, dtype=torch.uint8))


def _joined(scenes: Sequence[SceneBatch]) -> SceneBatch:
    """Batches of equal shape as one; exact normals only if all have them."""
    if len(scenes) == 1:
        return scenes[0]
    parts = {
        name: torch.cat([getattr(scene, name) for scene in scenes])
        for name, value in vars(scenes[0]).items()
        if isinstance(value, Tensor) and name != "normals"
    }
    normals = [scene.normals for scene in scenes if scene.normals is not None]
    joined = torch.cat(normals) if len(normals) == len(scenes) else None
    return SceneBatch(**parts, normals=joined, names=sum((scene.names for scene in scenes), ()))
