"""Tiny random models of every backbone family, and batches for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from g2vlm.processing import sequence_builder
from g2vlm.sequence import GeometryViews, Grid, SemanticImage, SemanticVideo, Text
from g2vlm.supervision.segments import with_probes
from tests.g2vlm.chats import chat_model, deepstack_model
from tests.g2vlm.stock import IMAGE, TEXT, VIDEO, randomise, vision_model

START, END, PADDING = 2, 3, 1
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OURS = ("ours", "ours-causal", "ours-deepstack")
LLAVA = {"llava_next_video": "LlavaNextVideo", "llava_onevision": "LlavaOnevision"}
STOCK = (*QWEN, *LLAVA, "internvl")


@dataclass(frozen=True)
class Sample:
    """Text, frames (as images, or as one video), text. The grids are in tokens."""

    grids: tuple[Grid, ...]
    video: bool = False
    before: tuple[int, ...] = (20, 21, 22)
    after: tuple[int, ...] = (30, 31, 32, 33)


@dataclass(frozen=True)
class Family:
    """What the tests need to know of a backbone.

    Args:
        name: of the family.
        grids: the sizes that frames can have.
        kinds: whether frames can be images (False) and steps of a video (True).
        one_length: all videos of a batch have equally many frames.
    """

    name: str
    grids: tuple[Grid, ...]
    kinds: tuple[bool, ...]
    one_length: bool = False

    @property
    def samples(self) -> list[Sample]:
        """One frame, and several, of several sizes where that is possible, for every kind."""
        found = []
        for video in self.kinds:
            several = self.grids[:1] * 3 if video else (self.grids * 3)[:3]
            few = several if self.one_length else self.grids[-1:]
            found += [Sample(several, video), Sample(few, video, before=(25,), after=(40, 41))]
        return found

    def model(self) -> Any:
        """A fresh model in evaluation mode."""
        return MODELS[self.name](self.name)

    def inputs(self, samples: Sequence[Sample], left: bool = False, probes: tuple[bool, bool] | None = None) -> Any:
        """Keyword arguments of the model's forward; rows are padded on the right or `left`.

        Args:
            samples: of the batch.
            left: the side of the padding.
            probes: the camera and scale tokens that a sequence of our own needs from the start.
        """
        return INPUTS[self.name](samples, left, probes)


def random_pixels(*shape: int) -> Tensor:
    """The same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _patches(grids: Sequence[Grid], video: bool) -> Tensor:
    """Patches (n, 1176) of frames with grids in tokens; a video's frames are given twice."""
    found = []
    for k, (rows, columns) in enumerate(grids):
        patches = random_pixels(4 * rows * columns, 3, 2, 196 + k)[..., :196]
        found.append(patches[:, :, :1].expand(-1, -1, 2, -1) if video else patches)
    return torch.cat(found).reshape(-1, 1176)


def _padded(rows: Sequence[Sequence[int]], left: bool) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = longest - len(row)
        ids.append([*[PADDING] * (fill * left), *row, *[PADDING] * (fill * (not left))])
        mask.append([*[0] * (fill * left), *[1] * len(row), *[0] * (fill * (not left))])
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((ids < 10) | (mask == 0), -100)}
    return inputs if (mask == 0).any() else inputs | {"attention_mask": None}


def _qwen_inputs(family: str):
    def build(samples: Sequence[Sample], left: bool, _: Any) -> dict[str, Tensor]:
        rows, images, videos, image_grids, video_grids = [], [], [], [], []
        for sample in samples:
            row = [*sample.before]
            sizes = [math.prod(grid) for grid in sample.grids]
            if not sample.grids:
                pass
            elif not sample.video:
                for size in sizes:
                    row += [START, *[IMAGE] * size, END, 50]
                images.append(_patches(sample.grids, False))
                image_grids += [[1, 2 * rows, 2 * columns] for rows, columns in sample.grids]
            else:
                steps = sizes if family == "qwen3_vl" else [sum(sizes)]
                for size in steps:
                    row += [START, *[VIDEO] * size, END]
                videos.append(_patches(sample.grids, True))
                video_grids.append([len(sizes), 2 * sample.grids[0][0], 2 * sample.grids[0][1]])
            rows.append([*row, *sample.after])
        inputs = _padded(rows, left)
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if images:
            inputs |= {"pixel_values": torch.cat(images), "image_grid_thw": torch.tensor(image_grids)}
        if videos:
            inputs |= {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(video_grids)}
        return inputs

    return build


def _square_inputs(family: str):
    """Frames of 4 x 4 patches of 7 pixels, which become 2 x 2 tokens."""

    def build(samples: Sequence[Sample], left: bool, _: Any) -> dict[str, Tensor]:
        rows = []
        for sample in samples:
            shown = [START, *[VIDEO] * (4 * len(sample.grids)), *[VIDEO] * (family == "llava_onevision"), END]
            if family == "internvl":
                shown = [token for _ in sample.grids for token in (START, *[IMAGE] * 4, END, 51)]
            rows.append([*sample.before, *shown, *sample.after])
        frames = [random_pixels(len(sample.grids), 3, 28, 28 + len(sample.after))[..., :28] for sample in samples]
        if family == "internvl":
            return _padded(rows, left) | {"pixel_values": torch.cat(frames)}
        return _padded(rows, left) | {"pixel_values_videos": torch.stack(frames)}

    return build


def _our_inputs(family: str):
    def build(samples: Sequence[Sample], _: bool, probes: tuple[bool, bool] | None) -> dict[str, Any]:
        packed, views, patches, grids = [], [], [], []
        for sample in samples:
            pixels = [(2 * rows, 2 * columns) for rows, columns in sample.grids]
            if sample.video:
                shown: list[Any] = [SemanticVideo(pixels[0], tuple(range(len(pixels))))]
                grids.append([len(pixels), *pixels[0]])
            else:
                shown = [part for grid in pixels for part in (SemanticImage(grid), Text((15,)))]
                grids += [[1, *grid] for grid in pixels]
            patches.append(_patches(sample.grids, sample.video).double())
            after = tuple(token % 20 + 10 for token in sample.after)
            segments = [Text((11, 12)), GeometryViews(((1, 2),) * 2), *shown, Text((13,)), Text(after, supervised=True)]
            packed.append(segments if probes is None else with_probes(segments, *probes))
            views.append(random_pixels(2, 3, 14, 28).double())
        inputs: dict[str, Any] = {"sequence": sequence_builder(MODELS[family](family).config).build(packed)}
        if patches:
            inputs |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
        return inputs | {"views": views}

    return build


def _square_model(family: str) -> nn.Module:
    """LLaVA or InternVL with the text model of its usual checkpoints."""
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    if family == "internvl":
        vision |= {"image_size": [28, 28], "patch_size": [7, 7]}
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=text | {"model_type": "qwen2"}, image_token_id=IMAGE, image_seq_length=4
        )
        return randomise(transformers.InternVLForConditionalGeneration(config))
    kinds = {"llava_next_video": ("clip_vision_model", "llama"), "llava_onevision": ("siglip_vision_model", "qwen2")}
    tower, decoder = kinds[family]
    config = getattr(transformers, f"{LLAVA[family]}Config")(
        vision_config=vision | {"model_type": tower, "vision_use_head": False},
        text_config=text | {"model_type": decoder},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[28, 28]],
    )
    return randomise(getattr(transformers, f"{LLAVA[family]}ForConditionalGeneration")(config))


@cache
def _ours(family: str) -> nn.Module:
    return {
        "ours": chat_model,
        "ours-causal": lambda: chat_model(images="causal"),
        "ours-deepstack": deepstack_model,
    }[family]()


SIZES = ((2, 3), (1, 2), (2, 2))
MODELS: dict[str, Any] = dict.fromkeys(QWEN, vision_model) | dict.fromkeys(OURS, _ours)
INPUTS: dict[str, Any] = {family: _qwen_inputs(family) for family in QWEN}
INPUTS |= {family: _our_inputs(family) for family in OURS}
MODELS |= dict.fromkeys((*LLAVA, "internvl"), _square_model)
INPUTS |= {family: _square_inputs(family) for family in (*LLAVA, "internvl")}
FAMILIES = [Family(name, SIZES, (False, True)) for name in (*QWEN, "ours", "ours-causal")]
FAMILIES += [Family("ours-deepstack", SIZES, (False,))]
FAMILIES += [Family(name, SIZES[2:], (True,), one_length=True) for name in LLAVA]
FAMILIES += [Family("internvl", SIZES[2:], (False,))]
