"""Where a model's layers place the points of one view in the others, and how often that is right.

Shapes: T views, P query points, h x w cells of a view, N query heads, M key heads, K width of a head, d of a state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.correspondence_clips import Points
from eval.student import Seen
from g2vlm.sequence import Grid
from geometry.arrays import BoolArray, FloatArray
from geometry.correspondence import cell_coordinates, cell_index
from geometry.losses.features import pool_to_grid
from geometry.matching import attention_scores, best_cells, cosine_scores
from geometry.metrics.matching import confidence_correlation, match_metrics

AFTER, BEFORE, ATTENTION, HIDDEN, EXPERT = "after_rotary", "before_rotary", "attention", "hidden", "expert"
SERIES = {
    AFTER: "cosine of query and key, heads joined, after the rotary embedding",
    BEFORE: "the same before the rotary embedding",
    ATTENTION: "mean over heads of softmax(q k' / sqrt(K)) over the cells of one view, after the rotary embedding",
    HIDDEN: "cosine of the block's output (layer 0: its input; the last after the final norm)",
    EXPERT: "cosine of the geometric expert's block output, pooled to the same cells",
}
IDENTITY, RANDOM, COLOUR = "same cell", "random cell", "colour patch"
COLOUR_SIDE = 4
BASELINES = {
    IDENTITY: "every point stays in its cell",
    RANDOM: "any cell, as the expectation",
    COLOUR: f"the cell of the nearest colours, cells of {COLOUR_SIDE} x {COLOUR_SIDE} averaged pixels",
}
DISTANCES = (2, 1)
"""Cells that a match may be off; the first is GASP's."""


class Key(NamedTuple):
    """What made a match: a series or baseline, and its layer (None of a baseline)."""

    series: str
    layer: int | None = None


@dataclass(frozen=True, eq=False)
class Matches:
    """Cells that were chosen for P points in T - 1 views.

    Args:
        cells: (T - 1, P, 2) x, y.
        confidence: (T - 1, P) the largest attention; None without attention.
    """

    cells: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scored:
    """Matches of one clip beside the truth.

    Args:
        clip: its name.
        grid: cells of a view.
        visible: (T - 1, P), the points that count.
        matches: by what made them.
        correct: by what made them, for each of DISTANCES (T - 1, P); of RANDOM the probability.
    """

    clip: str
    grid: Grid
    visible: BoolArray
    matches: Mapping[Key, Matches]
    correct: Mapping[Key, Mapping[int, BoolArray | FloatArray]]


def score(clip: str, seen: Seen, points: Points, images: Tensor) -> Scored:
    """Matches of every layer and of the baselines, judged.

    Args:
        clip: its name.
        seen: of the views.
        points: the truth; its size may be another resampling of the views.
        images: (T, 3, H, W) uint8, as the model was shown them.
    """
    rows, columns = next(iter(seen.hidden.values())).shape[1:3]
    grid = (rows, columns)
    truth = cell_coordinates(points.places, points.size, grid).double().numpy()  # (T - 1, P, 2)
    visible = points.visible.numpy()
    matches = matches_of(seen, points) | baseline_matches(images, points, grid)
    correct = {
        key: {distance: match_metrics(own.cells.numpy(), truth, visible, distance).correct for distance in DISTANCES}
        for key, own in matches.items()
    }
    chance = {Key(RANDOM): {distance: by_chance(truth, grid, distance) for distance in DISTANCES}}
    return Scored(clip, grid, visible, matches, correct | chance)


# ---------------------------------------------------------------------------------------------- matches


def matches_of(seen: Seen, points: Points) -> dict[Key, Matches]:
    """What every layer of every series chooses."""
    rows, columns = next(iter(seen.hidden.values())).shape[1:3]
    found = {}
    for block, queries in seen.queries.items():
        for series in (AFTER, BEFORE):
            own, others = queries_and_keys(getattr(queries, series), getattr(seen.keys[block], series), points)
            attention = attention_scores(own, others)
            confidence = attention.amax(-1)
            found[Key(series, block)] = Matches(best_cells(cosine_scores(own, others), columns), confidence)
            if series == AFTER:
                found[Key(ATTENTION, block)] = Matches(best_cells(attention, columns), confidence)
    for layer, states in seen.hidden.items():
        found[Key(HIDDEN, layer)] = match_states(states, points)
    for block, states in seen.expert.items():
        found[Key(EXPERT, block)] = match_states(pool_to_grid(states, (rows, columns)), points)
    return found


def match_states(states: Tensor, points: Points) -> Matches:
    """The cells of other views whose state (T, h, w, d) has the largest cosine with that of the point's cell."""
    own, others = queries_and_keys(states[..., None, :], states[..., None, :], points)
    return Matches(best_cells(cosine_scores(own, others), states.shape[2]))


def queries_and_keys(queries: Tensor, keys: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """Queries (T, h, w, N, K) of the points' cells, (P, N, K), and keys (T, h, w, M, K) of the other views.

    Keys come as (T - 1, h w, N, K), repeated where query heads share them.
    """
    own = queries[0].flatten(0, 1)[cell_index(points.queries, points.size, (queries.shape[1], queries.shape[2]))]
    return own, keys[1:].flatten(1, 2).repeat_interleave(queries.shape[-2] // keys.shape[-2], dim=-2)


# ---------------------------------------------------------------------------------------------- baselines


def baseline_matches(images: Tensor, points: Points, grid: Grid) -> dict[Key, Matches]:
    """Matches that need no model."""
    own = cell_index(points.queries, points.size, grid)  # (P,)
    cells = torch.stack([own % grid[1], own // grid[1]], dim=-1)
    colours = colour_patches(images, grid)
    nearest = torch.cdist(colours[0][own], colours[1:])  # (T - 1, P, h w)
    return {
        Key(IDENTITY): Matches(cells.expand(len(images) - 1, -1, -1)),
        Key(COLOUR): Matches(best_cells(-nearest, grid[1])),
    }


def colour_patches(images: Tensor, grid: Grid) -> Tensor:
    """Images (T, 3, H, W) -> the colours of their cells, (T, h w, 3 * COLOUR_SIDE^2)."""
    rows, columns = grid
    small = F.adaptive_avg_pool2d(images.float() / 255, (rows * COLOUR_SIDE, columns * COLOUR_SIDE))
    cells = small.unflatten(-1, (columns, COLOUR_SIDE)).unflatten(2, (rows, COLOUR_SIDE))  # (T, 3, h, s, w, s)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def by_chance(truth: FloatArray, grid: Grid, distance: float) -> FloatArray:
    """Share (T - 1, P) of a view's cells that are within a distance of true places (T - 1, P, 2)."""
    y, x = np.indices(grid)
    cells = np.stack([x, y], axis=-1).reshape(-1, 2)
    return (np.linalg.norm(truth[..., None, :] - cells, axis=-1) <= distance).mean(-1)


# ---------------------------------------------------------------------------------------------- over clips


def share_correct(clips: Sequence[Scored], key: Key, distance: int = DISTANCES[0]) -> float:
    """Percentage of the visible points of all clips whose match is within the distance: PCK."""
    hits = sum(float(clip.correct[key][distance][clip.visible].sum()) for clip in clips)
    return 100 * hits / sum(int(clip.visible.sum()) for clip in clips)


def share_by_view(clips: Sequence[Scored], key: Key, distance: int = DISTANCES[0]) -> FloatArray:
    """The same for each view after the first, (T - 1,); NaN where no point is visible, T of the longest clip."""
    hits, counts = np.zeros((2, max(len(clip.visible) for clip in clips)))
    for clip in clips:
        own = slice(len(clip.visible))
        hits[own] += np.where(clip.visible, clip.correct[key][distance], 0).sum(-1)
        counts[own] += clip.visible.sum(-1)
    return np.divide(100 * hits, counts, out=np.full(len(hits), np.nan), where=counts > 0)


def calibration(clips: Sequence[Scored], key: Key) -> float:
    """Pearson correlation of the confidence with being correct over the visible points of all clips; may be NaN."""
    parts = [(clip.matches[key].confidence, clip.correct[key][DISTANCES[0]], clip.visible) for clip in clips]
    confidence = np.concatenate([own.numpy()[visible] for own, _, visible in parts if own is not None])
    correct = np.concatenate([own[visible] for _, own, visible in parts])
    return confidence_correlation(confidence, correct, np.ones(len(correct), bool))
