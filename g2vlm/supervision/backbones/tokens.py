"""Where the visual tokens of a batch of token ids are, and the insertion of probe tokens behind them.

Shapes: B samples, S tokens of a padded row, T frames of a sample, n visual patch tokens of a sample.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from g2vlm.sequence import IGNORED, Grid
from g2vlm.supervision.backbones.base import Probes

PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED, "position_ids": 0}
"""Inputs with one entry per token on their last axis, and what padding has there."""


class Medium(NamedTuple):
    """One image or video: its frames' (h, w) in tokens, and placeholders after them that are no patch of any frame."""

    frames: tuple[Grid, ...]
    trailing: int = 0


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual patch tokens of a batch.

    Args:
        frames: per sample, its frames' grids in the order of the sequence.
        index: per sample, the places (n,) of its patches in the row, frame after frame, row by row.
        probes: per sample, the places of its probe tokens in the row, in order; empty without probes.
    """

    frames: tuple[tuple[Grid, ...], ...]
    index: tuple[Tensor, ...]
    probes: tuple[Tensor, ...] = ()

    def last_patches(self, sample: int) -> Tensor:
        """(T,) place of the last patch of every frame."""
        sizes = torch.tensor([math.prod(grid) for grid in self.frames[sample]], dtype=torch.long)
        return self.index[sample][(sizes.cumsum(0) - 1).to(self.index[sample].device)]


def locate(input_ids: Tensor, media: Mapping[int, Iterable[Medium]]) -> VisualTokens:
    """Assign placeholders to frames.

    Args:
        input_ids: (B, S).
        media: per placeholder id, the images or videos of the whole batch in order.

    Raises:
        ValueError: the placeholders are not those of the media, one frame's not next to each other.
    """
    queues: dict[int, Iterator[Medium]] = {token: iter(own) for token, own in media.items()}
    frames, index = [], []
    for row in input_ids.tolist():
        places = [place for place, token in enumerate(row) if token in queues]
        own_frames: list[Grid] = []
        own_index: list[int] = []
        start = 0
        while start < len(places):
            medium = next(queues[row[places[start]]], None)
            if medium is None:
                raise ValueError(f"{len(places) - start} placeholders of sample {len(frames)} have no image or video")
            for grid in medium.frames:
                taken = places[start : start + math.prod(grid)]
                if len(taken) < math.prod(grid) or taken[-1] - taken[0] != len(taken) - 1:
                    raise ValueError(
                        f"sample {len(frames)}, frame {len(own_frames)}: {grid[0]} x {grid[1]} tokens do not lie next "
                        f"to each other, {len(places) - start} placeholders are left"
                    )
                own_frames.append(grid)
                own_index += taken
                start += len(taken)
            start += medium.trailing
        frames.append(tuple(own_frames))
        index.append(torch.tensor(own_index, dtype=torch.long, device=input_ids.device))
    left = sum(len(list(queue)) for queue in queues.values())
    if left:
        raise ValueError(f"{left} images or videos have no placeholders")
    return VisualTokens(tuple(frames), tuple(index))


def find_probes(inputs: Mapping[str, Any], visual: VisualTokens, probes: Probes, probe_id: int) -> VisualTokens | None:
    """Where the probe tokens are in inputs that hold them already; None if there are none of them.

    Raises:
        ValueError: some of the probe tokens are there and some are not.
    """
    ids: Tensor = inputs["input_ids"]
    counts = _probe_counts(visual, probes, ids)
    attended = inputs.get("attention_mask")
    is_probe = ids == probe_id if attended is None else (ids == probe_id) & attended.bool()
    is_probe = torch.nn.functional.pad(is_probe, (0, 2))  # room for the probes behind a row's last token
    places = tuple(_places_after(row) for row in counts)
    found = sum(int(is_probe[sample, own].sum()) for sample, own in enumerate(places))
    expected = sum(len(own) for own in places)
    if found not in (0, expected):
        raise ValueError(f"the sequence has {found} of {expected} probe tokens; give it with all of them or with none")
    return VisualTokens(visual.frames, visual.index, places) if found else None


def insert_probes(
    inputs: Mapping[str, Any], visual: VisualTokens, probes: Probes, probe_id: int
) -> tuple[dict[str, Any], VisualTokens]:
    """Expand every per-token input by probe tokens.

    A probe has `probe_id`, attention 1, modality 0 (text, so that no feature is put there), label -100 and the position
    ids of the last patch before it. All other tokens keep theirs. Rows are padded again on the side of their padding.

    Args:
        inputs: with `position_ids` (..., B, S) for the sequence without probes.
        visual: where the patches are.
        probes: which tokens to insert.
        probe_id: an id that never follows a patch otherwise.
    """
    ids: Tensor = inputs["input_ids"]
    attended = inputs.get("attention_mask")
    attended = torch.ones_like(ids) if attended is None else attended
    repeats = 1 + _probe_counts(visual, probes, ids)  # (B, S)
    lengths = repeats.sum(1)
    longest = int(lengths.max())
    left_padded = bool((attended[:, 0] == 0).any())
    rows, is_probe, places, index = [], [], [], []
    for sample, length in enumerate(lengths.tolist()):
        offset = longest - length if left_padded else 0
        source = torch.arange(ids.shape[1], device=ids.device).repeat_interleave(repeats[sample])
        moved = repeats[sample].cumsum(0) - repeats[sample] + offset  # (S,) new place of every token
        padding = (offset, longest - length - offset)
        rows.append(torch.nn.functional.pad(source, padding, value=-1))
        is_probe.append(torch.nn.functional.pad(source.diff(prepend=source.new_tensor([-1])) == 0, padding))
        places.append(is_probe[-1].nonzero().flatten())
        index.append(moved[visual.index[sample]])
    source, probe = torch.stack(rows), torch.stack(is_probe)
    at_probe = {"input_ids": probe_id, "attention_mask": 1, "mm_token_type_ids": 0, "labels": IGNORED}
    expanded = dict(inputs) | {"attention_mask": attended}
    for name in PER_TOKEN.keys() & {name for name, value in expanded.items() if value is not None}:
        expanded[name] = _expand(expanded[name], source, probe, PER_TOKEN[name], at_probe.get(name))
    return expanded, VisualTokens(visual.frames, tuple(index), tuple(places))


def _probe_counts(visual: VisualTokens, probes: Probes, ids: Tensor) -> Tensor:
    """(B, S) number of probe tokens that belong behind every token."""
    counts = torch.zeros_like(ids)
    for sample, grids in enumerate(visual.frames):
        after = torch.tensor(probes.after_frames(len(grids)), dtype=counts.dtype, device=ids.device)
        counts[sample, visual.last_patches(sample)] = after
    return counts


def _places_after(counts: Tensor) -> Tensor:
    """Number of probes behind every token (S,) -> their places, in a row that has them."""
    patches = counts.nonzero().flatten()
    own = counts[patches]
    first = own.cumsum(0) - own  # number of the first probe behind each of these patches
    within = torch.arange(int(own.sum()), device=counts.device) - first.repeat_interleave(own)
    return patches.repeat_interleave(own) + 1 + within


def _expand(values: Tensor, source: Tensor, probe: Tensor, padding: int, at_probe: int | None) -> Tensor:
    """(..., B, S) -> (..., B, S'): the source token's value, another at probes unless None, and padding at -1."""
    leading = values.shape[:-2]
    expanded = values.gather(-1, source.clamp(min=0).expand(*leading, -1, -1))
    if at_probe is not None:
        expanded = expanded.masked_fill(probe, at_probe)
    return expanded.masked_fill(source < 0, padding)
