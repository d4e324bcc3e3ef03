"""Conversations as a padded batch of a stock Qwen-VL: what a step takes.

Shapes: B rows, S tokens of the longest, n patches of all images, N images, L tokens with a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from g2vlm.data.chat.batch import shown_clip
from g2vlm.data.chat.types import ChatSample
from g2vlm.data.types import SceneSample
from g2vlm.semantic_images import FRAMES, MERGE, semantic_pixels
from g2vlm.sequence import IGNORED
from g2vlm.stock.layout import Row, StockLayout
from g2vlm.supervision.base import ClipShape
from g2vlm.supervision.targets import TeacherTargets


@dataclass(frozen=True, eq=False)
class StockBatch:
    """One process's share of a step. Rows are padded on the right; every frame is an image.

    Args:
        input_ids, attention_mask, mm_token_type_ids: (B, S) as the processor makes them.
        labels: (B, S) each token's own id where it is learned, else `IGNORED`; not shifted.
        weights: (B, S) 1 / sqrt(number of labels of the answer), 0 where nothing is learned.
        pixel_values: (n, 6 p^2) patches of all images, row by row.
        image_grid_thw: (N, 3) their grids.
        names, tasks: of the samples, what is filled in left out.
        clips: what the images of every row show, in the order of the row, where it is known; the row that is filled in
            has None.
        targets: what every clip is compared with; None of a row without any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    labels: Tensor
    weights: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    clips: tuple[SceneSample | None, ...] = ()
    targets: tuple[TeacherTargets | None, ...] = ()

    def to(self, device: torch.device | str) -> "StockBatch":
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, targets=tuple(own and own.to(device) for own in self.targets))

    @property
    def label_ids(self) -> Tensor:
        """(L,) what the logits should predict, in their order."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORED]

    @property
    def label_weights(self) -> Tensor:
        """(L,) of them."""
        return self.weights[:, 1:][self.labels[:, 1:] != IGNORED]


def padded(lengths: Sequence[int]) -> int:
    """Tokens of a batch of rows, padding included."""
    return len(lengths) * max(lengths)


def collate_stock(samples: Sequence[ChatSample], layout: StockLayout) -> StockBatch:
    """Pad samples to the longest; a batch without images has a row of one, without loss, behind them.

    So every process runs the vision encoder and the heads in every step.

    Raises:
        InputError: an image that is too narrow, or text that holds placeholders of images.
    """
    rows = [layout.row(sample.shape) for sample in samples]
    images = [sample.images[place] for sample in samples for place in sample.shape.image_order]
    pixels, grids = semantic_pixels(images, layout.rule)
    if not images:
        rows.append(layout.filler)
        pixels, grids = _smallest_image(layout)
    ids = _stacked(rows, "ids", layout.padding)
    lengths = torch.tensor([len(row.ids) for row in rows])
    return StockBatch(
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        mm_token_type_ids=(ids == layout.processor.image_token_id).int(),
        labels=_stacked(rows, "labels", IGNORED),
        weights=_stacked(rows, "weights", 0.0),
        pixel_values=torch.as_tensor(pixels),
        image_grid_thw=torch.as_tensor(grids),
        names=tuple(sample.name for sample in samples),
        tasks=tuple(sample.task for sample in samples),
        clips=(*map(shown_clip, samples), *[None] * (not images)),
    )


def stock_inputs(batch: StockBatch) -> dict[str, Any]:
    """Keyword arguments of a supervised model's forward: logits of the answers, predictions where there are targets."""
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "pixel_values", "image_grid_thw")
    targets = batch.targets or (None,) * len(batch.input_ids)
    shapes = [None if own is None else ClipShape.of(own) for own in targets]
    return {**{name: getattr(batch, name) for name in names}, "logits_at_labels": True, "shapes": shapes}


def _stacked(rows: Sequence[Row], name: str, padding: float) -> Tensor:
    """(B, S)."""
    values = [torch.tensor(getattr(row, name)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)


def _smallest_image(layout: StockLayout) -> tuple[Tensor, Tensor]:
    """Patches and grid of a grey image of one token."""
    values = 3 * FRAMES * layout.rule.patch_size**2
    return torch.zeros(MERGE**2, values), torch.tensor([[1, MERGE, MERGE]])
