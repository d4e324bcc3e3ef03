"""GASP: patches that show the same point are alike after every decoder block, and what is alike is equally far away.

Shapes: N layers, T frames of h x w tokens, H x W pixels of the targets, K points, r of an embedding.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from g2vlm.supervision.backbones.base import Backbone
from g2vlm.supervision.base import Fit, TeacherFeatures
from g2vlm.supervision.gasp import GASP, GASPHeads
from g2vlm.supervision.targets import TeacherTargets
from geometry.correspondence import Size, TrackRule, Tracks, cell_depth, cell_index, grid_tracks
from geometry.losses.tracks import (
    Denominator,
    PatchTracks,
    against_clip,
    against_clip_and_track,
    against_frame,
    track_losses,
)
from train.objectives.base import Needs, SupervisionObjective

ANCHOR = 0
"""The frame whose points are looked for in all others: a clip's first, where sources of clips put the one they drew."""


@dataclass(frozen=True)
class GASPConfig:
    """Correspondence and depth consistency after every block (GASP eq. 5 to 9).

    Args:
        heads: where heads are, and how they start.
        correspondence: weight of the InfoNCE loss of matches, a mean over matches and layers.
        depth: weight of the relative error of the depth that a point's similarities expect in the other frame.
        temperature: tau of both.
        negatives: `all_frames`: every patch of the clip but the anchor (the paper's implementation); `target_frame`:
            those of the match's frame (its eq. 5).
        mask_same_track: patches of other frames that are known to show the point are no negatives of `all_frames`.
        epsilon: added to the sum of the depths.
        max_anchors: most points of a clip; of more, as many are taken at equal distances in the order of the grids.
        tracks: which points are matched, and when a frame shows them.
        min_confidence: least confidence of a pixel's depth, in the teacher's own kind; 0: every valid pixel counts.
        lr: learning rate of the heads, as a multiple of optim.lr.
    """

    heads: GASPHeads = field(default_factory=GASPHeads)
    correspondence: float = 1.0
    depth: float = 1.0
    temperature: float = 0.07
    negatives: Literal["all_frames", "target_frame"] = "all_frames"
    mask_same_track: bool = True
    epsilon: float = 1e-6
    max_anchors: int = 512
    tracks: TrackRule = field(default_factory=TrackRule)
    min_confidence: float = 0.0
    lr: float = 4.0


class GASPObjective(SupervisionObjective):
    """Terms `gasp.correspondence` and `gasp.depth`; both are means over layers of means over a clip's matches."""

    name = "gasp"

    def __init__(self, module: GASP, config: GASPConfig):
        super().__init__(module, {"correspondence": config.correspondence, "depth": config.depth})
        self.config = config

    @classmethod
    def build(cls, config: GASPConfig, backbone: Backbone, features: TeacherFeatures | None = None) -> Self:
        """For a backbone, whose query projections its heads start from; no teacher's features are wanted."""
        module = GASP(config.heads, Fit.of(backbone, features))
        module.initialise(backbone)
        return cls(module, config)

    @property
    def needs(self) -> Needs:
        """Depth and cameras."""
        return Needs(frozenset({"depth", "valid", "cam_to_world", "intrinsics"}))

    def clip_terms(self, prediction: Tensor, targets: TeacherTargets) -> dict[str, tuple[Tensor, Tensor]]:
        """As in the base class, of embeddings (N, T, h, w, r).

        Raises:
            ValueError: the targets have other frames than the embeddings.
        """
        frames, rows, columns = prediction.shape[1:4]
        if frames != targets.num_views:
            raise ValueError(f"targets of {targets.num_views} frames for embeddings of {frames}")
        depth, valid = known_depth(targets, self.config.min_confidence)
        tracks = patch_tracks(targets, depth, (rows, columns), self.config)
        patches = cell_depth(depth, valid, (rows, columns))
        config, against = self.config, denominator(self.config)
        losses = [
            track_losses(layer.flatten(1, 2), tracks, *patches, config.temperature, against, config.epsilon)
            for layer in prediction
        ]
        contrast = torch.stack([layer.contrast for layer in losses]).mean()
        error = torch.stack([layer.depth for layer in losses]).mean()
        return {
            "correspondence": (contrast, (losses[0].contrast_count > 0).to(contrast)),
            "depth": (error, (losses[0].depth_count > 0).to(error)),
        }


def denominator(config: GASPConfig) -> Denominator:
    """What a match is contrasted with."""
    if config.negatives == "target_frame":
        return against_frame
    return against_clip if config.mask_same_track else against_clip_and_track


def known_depth(targets: TeacherTargets, min_confidence: float) -> tuple[Tensor, Tensor]:
    """Depth (T, H, W), 0 where it is not known well enough, and where it is, (T, H, W) bool."""
    assert targets.depth is not None
    assert targets.valid is not None
    valid = targets.valid & targets.depth.isfinite() & (targets.depth > 0)
    if targets.confidence is not None:
        valid = valid & (targets.confidence >= min_confidence)
    return torch.where(valid, targets.depth, 0), valid


def patch_tracks(targets: TeacherTargets, depth: Tensor, grid: Size, config: GASPConfig) -> PatchTracks:
    """The anchor frame's points, and the patches of a grid that show them in every frame.

    Args:
        targets: with cameras.
        depth: (T, H, W) of `known_depth`.
        grid: (h, w) of the patches.
        config: of the objective.
    """
    assert targets.intrinsics is not None
    tracks = grid_tracks(depth, targets.intrinsics, targets.world_to_cam, config.tracks, anchor=ANCHOR)
    tracks = capped(tracks, config.max_anchors)
    cells = cell_index(tracks.points, targets.size, grid)  # (T, K)
    return PatchTracks(cells.T, tracks.visible.T, tracks.depth.T, ANCHOR)


def capped(tracks: Tracks, most: int) -> Tracks:
    """At most so many tracks: of those that can be matched, at equal distances in their order; no host waits for it."""
    count = tracks.visible.shape[1]
    if count <= most:
        return tracks
    useful = tracks.useful(ANCHOR)
    order = torch.argsort(~useful, stable=True)  # the useful ones first
    stretch = useful.sum().clamp_min(most)
    kept = order[torch.arange(most, device=order.device) * stretch // most]
    fields = {name: value[:, kept] for name, value in vars(tracks).items()}
    return replace(tracks, **fields)
