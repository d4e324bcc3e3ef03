"""GASP's losses on true matches between the patches of a clip: contrast of embeddings, consistency of depth.

Shape legend: F frames of P patches each, K tracks, N matches, n matches of a chunk, E excluded patches, D embedding.
A patch of the clip has the index `frame * P + patch`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from geometry.losses.contrastive import CHUNK, by_chunks, contrast
from geometry.losses.features import cosines, unit_vectors
from geometry.losses.masked import masked_mean
from geometry.rotations import at_least_float32
from geometry.types import TensorFields, expect_bool, expect_shape

DEPTH_EPSILON = 1e-6  # added to the sum of the depths


@dataclass(frozen=True, eq=False)
class Matches(TensorFields):
    """Pairs of patches of one clip that show the same point.

    Attributes:
        anchor: (N,) index in the clip.
        positive: (N,) index in the clip, in another frame.
        same_track: (N, E) further patches of the clip that show the point, -1 = none; they are never negatives.
        depth: (N,) depth of the point in the positive's frame; unknown where it is not positive.
        visible: (N,) bool, matches that count; whatever else stands at the others is ignored.
    """

    anchor: Tensor
    positive: Tensor
    same_track: Tensor
    depth: Tensor
    visible: Tensor

    def __post_init__(self) -> None:
        count = len(self.anchor)
        expect_shape("positive", self.positive, count)
        expect_shape("same_track", self.same_track, count, self.same_track.shape[-1])
        expect_shape("depth", self.depth, count)
        expect_shape("visible", self.visible, count)
        expect_bool("visible", self.visible)


@dataclass(frozen=True, eq=False)
class MatchLosses:
    """Unweighted scalars and the counts of the matches that they are means over."""

    contrast: Tensor
    depth: Tensor
    contrast_count: Tensor
    depth_count: Tensor


Negatives: TypeAlias = Callable[[Tensor, int, int], Tensor]
"""Positives (n,), F and P -> which patches of the clip may be negatives (n, F * P)."""


def all_frames(positive: Tensor, frames: int, patches: int) -> Tensor:
    """Every patch of the clip (GASP's implementation note)."""
    return torch.ones(len(positive), frames * patches, dtype=torch.bool, device=positive.device)


def target_frame(positive: Tensor, frames: int, patches: int) -> Tensor:
    """The patches of the positive's frame (GASP eq. 5)."""
    frame = torch.arange(frames * patches, device=positive.device) // patches
    return frame == (positive // patches)[:, None]


def matches_of_tracks(cells: Tensor, visible: Tensor, depth: Tensor, anchor_frame: int, patches: int) -> Matches:
    """Matches of each track between the anchor frame and every other frame.

    Args:
        cells: (K, F) patch of its frame that each track's point falls into; anything where not visible.
        visible: (K, F) bool.
        depth: (K, F) depth of the point in each frame.
        anchor_frame: in [0, F).
        patches: P.

    Returns:
        K (F - 1) matches, visible where the point is visible in both frames; E = F.
    """
    frames = cells.shape[-1]
    others = [frame for frame in range(frames) if frame != anchor_frame]
    index = cells + patches * torch.arange(frames, device=cells.device)  # (K, F)
    track = torch.where(visible, index, -1)
    return Matches(
        anchor=index[:, anchor_frame, None].expand(-1, frames - 1).flatten(),
        positive=index[:, others].flatten(),
        same_track=track[:, None].expand(-1, frames - 1, -1).flatten(0, 1),
        depth=depth[:, others].flatten(),
        visible=(visible[:, anchor_frame, None] & visible[:, others]).flatten(),
    )


def match_losses(
    embeddings: Tensor,
    matches: Matches,
    patch_depth: Tensor,
    patch_valid: Tensor,
    temperature: float,
    negatives: Negatives = all_frames,
    epsilon: float = DEPTH_EPSILON,
    chunk: int = CHUNK,
) -> MatchLosses:
    """InfoNCE of the matches, and the error of the depth that attention over the positive's frame expects.

    The negatives of a match are those of `negatives` without the anchor and the patches of the same track. The
    similarities of one chunk of matches serve both losses.

    Args:
        embeddings: (F, P, D), normalised here.
        matches: of the same clip.
        patch_depth: (F, P) mean depth of each patch.
        patch_valid: (F, P) bool, patches that have a depth; a frame without any gives no depth term.
        temperature: divides the cosines.
        negatives: `all_frames` or `target_frame`.
        epsilon: of `relative_depth_error`.
        chunk: number of matches at a time.

    Returns:
        Both losses, means over the visible matches, for depth over those with a known one.
    """
    frames, patches = patch_depth.shape
    patch_depth, point_depth = patch_depth.detach(), matches.depth.detach()
    candidates = unit_vectors(embeddings).flatten(0, 1)  # (F * P, D)

    def both(anchor: Tensor, positive: Tensor, same_track: Tensor) -> Tensor:
        logits = cosines(candidates[anchor], candidates) / temperature  # (n, F * P)
        allowed = negatives(positive, frames, patches) & ~_members(anchor, positive, same_track, len(candidates))
        true_logit = logits.gather(1, positive[:, None])[:, 0]
        frame = positive // patches
        in_frame = logits.reshape(-1, frames, patches)[torch.arange(len(frame), device=frame.device), frame]
        weights = attention(in_frame, patch_valid[frame])  # (n, P)
        return torch.stack([contrast(true_logit, logits, allowed), expected_depth(weights, patch_depth[frame])], dim=-1)

    visible = matches.visible
    anchor, positive = (torch.where(visible, index, 0) for index in (matches.anchor, matches.positive))
    values = by_chunks(both, chunk, anchor, positive, matches.same_track)  # (N, 2)
    with_depth = visible & (point_depth > 0) & patch_valid.any(-1)[positive // patches]
    error = relative_depth_error(values[:, 1], torch.where(with_depth, point_depth, 0), epsilon)
    return MatchLosses(
        contrast=masked_mean(values[:, 0], visible),
        depth=masked_mean(error, with_depth),
        contrast_count=visible.sum(),
        depth_count=with_depth.sum(),
    )


def attention(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed entries: (..., P), zero elsewhere, and everywhere when nothing is allowed."""
    anything = allowed.any(-1, keepdim=True)
    weights = torch.where(allowed | ~anything, logits, -torch.inf).softmax(-1)
    return torch.where(allowed, weights, 0)


def expected_depth(weights: Tensor, depth: Tensor) -> Tensor:
    """Depth (..., P) averaged with attention weights (..., P); depths of weight zero are ignored. Returns (...)."""
    return (weights * torch.where(weights > 0, at_least_float32(depth), 0)).sum(-1)


def relative_depth_error(expected: Tensor, depth: Tensor, epsilon: float) -> Tensor:
    """|d - d_expected| / (d + d_expected + epsilon), in [0, 1) for positive depths; (...)."""
    return (depth - expected).abs() / (depth + expected + epsilon)


def _members(anchor: Tensor, positive: Tensor, same_track: Tensor, count: int) -> Tensor:
    """Which of the clip's patches each match (n,) itself is made of, its whole track included: (n, count) bool."""
    index = torch.cat([anchor[:, None], positive[:, None], same_track], dim=-1)
    members = torch.zeros(len(anchor), count + 1, dtype=torch.bool, device=anchor.device)
    return members.scatter(1, index % (count + 1), True)[:, :count]  # -1 falls into the extra column
