"""GASP's losses on tracks: those of `geometry.losses.matching` for all frames of a track at once.

A track's anchor is compared with the patches of the clip once, not once for every frame that shows the point; the
losses are the same. Shape legend: F frames of P patches each, K tracks, k tracks of a chunk, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from geometry.losses.contrastive import CHUNK, by_chunks
from geometry.losses.features import cosines, unit_vectors
from geometry.losses.masked import masked_mean
from geometry.losses.matching import DEPTH_EPSILON, MatchLosses, attention, expected_depth, relative_depth_error
from geometry.types import TensorFields, expect_bool, expect_shape

NEVER = -1e30  # logit of what is no candidate: finite, so that a patch without any candidate has a gradient


@dataclass(frozen=True, eq=False)
class PatchTracks(TensorFields):
    """Points of one frame, and the patches that show them in every frame.

    Attributes:
        cells: (K, F) patch of its frame that each point falls into; anything where not visible.
        visible: (K, F) bool.
        depth: (K, F) depth of the point in each frame; unknown where it is not positive.
        anchor: the frame that the points are of.
    """

    cells: Tensor
    visible: Tensor
    depth: Tensor
    anchor: int

    def __post_init__(self) -> None:
        shape = self.cells.shape[0], self.cells.shape[1]
        expect_shape("visible", self.visible, *shape)
        expect_bool("visible", self.visible)
        expect_shape("depth", self.depth, *shape)


@dataclass(frozen=True, eq=False)
class Similar:
    """What contrast is made of, for some tracks.

    Attributes:
        logits: (k, F, P) of all patches.
        other: (k, F, P) bool, the patches that do not show the point, as far as is known.
        match: (k, F) logits of the patches that show it.
        matched: (k, F) bool, the frames whose match counts.
    """

    logits: Tensor
    other: Tensor
    match: Tensor
    matched: Tensor


Denominator: TypeAlias = Callable[[Similar], Tensor]
"""Log of the sum that a match's exponential is divided by, (k, F); without meaning where no match counts."""


def against_clip(similar: Similar) -> Tensor:
    """The match and every patch of the clip that does not show the point (GASP's implementation note)."""
    return torch.logaddexp(similar.match, _log_sum(similar.logits.flatten(1), similar.other.flatten(1))[:, None])


def against_clip_and_track(similar: Similar) -> Tensor:
    """The same, and the matches in other frames: for a track, its own false negatives."""
    others = _log_sum(similar.logits.flatten(1), similar.other.flatten(1))
    matches = _log_sum(similar.match, similar.matched)
    return torch.logaddexp(matches, others)[:, None].expand_as(similar.match)


def against_frame(similar: Similar) -> Tensor:
    """The patches of the match's frame (GASP eq. 5)."""
    return torch.logaddexp(similar.match, _log_sum(similar.logits, similar.other))


def track_losses(
    embeddings: Tensor,
    tracks: PatchTracks,
    patch_depth: Tensor,
    patch_valid: Tensor,
    temperature: float,
    denominator: Denominator = against_clip,
    epsilon: float = DEPTH_EPSILON,
    chunk: int = CHUNK,
) -> MatchLosses:
    """InfoNCE of each track's anchor with its match in every other frame, and the error of the depth expected there.

    Args:
        embeddings: (F, P, D), normalised here.
        tracks: of the same clip.
        patch_depth: (F, P) mean depth of each patch.
        patch_valid: (F, P) bool, patches that have a depth; a frame without any gives no depth term.
        temperature: divides the cosines.
        denominator: `against_clip`, `against_clip_and_track` or `against_frame`.
        epsilon: of `relative_depth_error`.
        chunk: number of tracks at a time; similarities are computed again in the backward pass.

    Returns:
        Both losses, means over all matches of the clip that are visible at both ends, for depth over those with a
        known one.
    """
    frames, patches = patch_depth.shape
    patch_depth, point_depth = patch_depth.detach(), tracks.depth.detach()
    candidates = unit_vectors(embeddings)  # (F, P, D)
    matched = tracks.visible & tracks.visible[:, [tracks.anchor]]
    shown = torch.where(matched, tracks.cells, 0)
    elsewhere = torch.arange(frames, device=matched.device) != tracks.anchor

    def both(shown: Tensor, matched: Tensor) -> Tensor:
        anchor = candidates[tracks.anchor, shown[:, tracks.anchor]]  # (k, D)
        logits = (cosines(anchor, candidates.flatten(0, 1)) / temperature).reshape(-1, frames, patches)
        shows = torch.zeros_like(logits, dtype=torch.bool).scatter(2, shown[..., None], matched[..., None])
        match = logits.gather(2, shown[..., None])[..., 0]
        similar = Similar(logits, ~shows, match, matched & elsewhere)
        weights = attention(logits, patch_valid.expand_as(logits))
        return torch.stack([denominator(similar) - match, expected_depth(weights, patch_depth)], dim=-1)

    values = by_chunks(both, chunk, shown, matched)  # (K, F, 2)
    counts = matched & elsewhere
    with_depth = counts & (point_depth > 0) & patch_valid.any(-1)
    error = relative_depth_error(values[..., 1], torch.where(with_depth, point_depth, 0), epsilon)
    return MatchLosses(
        contrast=masked_mean(values[..., 0], counts),
        depth=masked_mean(error, with_depth),
        contrast_count=counts.sum(),
        depth_count=with_depth.sum(),
    )


def _log_sum(logits: Tensor, counted: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of the counted entries of the last axis; very low where there is none."""
    return torch.where(counted, logits, NEVER).logsumexp(-1)
