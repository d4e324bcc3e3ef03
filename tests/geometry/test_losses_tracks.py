"""Losses of whole tracks against those of their matches one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from geometry.losses.matching import Matches, MatchLosses, all_frames, match_losses, matches_of_tracks, target_frame
from geometry.losses.tracks import (
    Denominator,
    PatchTracks,
    against_clip,
    against_clip_and_track,
    against_frame,
    track_losses,
)

F64 = torch.float64
TAU = 0.2
FRAMES, PATCHES, TRACKS, WIDTH, ANCHOR = 4, 6, 9, 5, 1
DENOMINATORS = [against_clip, against_clip_and_track, against_frame]


class Clip:
    """Random embeddings, tracks and depths; some points hidden, some patches without depth, one frame without any."""

    def __init__(self, patches: int = PATCHES) -> None:
        self.embeddings = torch.randn(FRAMES, patches, WIDTH, dtype=F64, requires_grad=True)
        self.tracks = PatchTracks(
            cells=torch.randint(patches, (TRACKS, FRAMES)),
            visible=torch.rand(TRACKS, FRAMES) < 0.7,
            depth=1 + torch.rand(TRACKS, FRAMES, dtype=F64),
            anchor=ANCHOR,
        )
        self.depth = 1 + torch.rand(FRAMES, patches, dtype=F64)
        self.known = torch.rand(FRAMES, patches) < 0.8
        self.known[2] = False

    @property
    def matches(self) -> Matches:
        tracks = self.tracks
        return matches_of_tracks(tracks.cells, tracks.visible, tracks.depth, ANCHOR, self.depth.shape[1])

    def one_by_one(self, denominator: Denominator) -> MatchLosses:
        negatives = target_frame if denominator is against_frame else all_frames
        matches = self.matches
        if denominator is against_clip_and_track:
            matches = replace(matches, same_track=matches.same_track[:, :0])
        return match_losses(self.embeddings, matches, self.depth, self.known, TAU, negatives)

    def losses(self, denominator: Denominator = against_clip, chunk: int = 4) -> MatchLosses:
        return track_losses(self.embeddings, self.tracks, self.depth, self.known, TAU, denominator, chunk=chunk)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.embeddings, retain_graph=True)[0]


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_tracks_against_their_matches_one_by_one(denominator: Denominator, chunk: int) -> None:
    clip = Clip()
    ours, theirs = clip.losses(denominator, chunk), clip.one_by_one(denominator)
    for name in ("contrast", "depth"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        torch.testing.assert_close(clip.gradient(getattr(ours, name)), clip.gradient(getattr(theirs, name)))
    assert ours.contrast_count == theirs.contrast_count > ours.depth_count == theirs.depth_count > 0


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_invisible_points_contribute_nothing(denominator: Denominator) -> None:
    clip = Clip()
    before, visible = clip.losses(denominator), clip.tracks.visible
    clip.tracks = replace(
        clip.tracks,
        cells=torch.where(visible, clip.tracks.cells, torch.randint(-999, 999, visible.shape)),
        depth=torch.where(visible, clip.tracks.depth, torch.nan),
    )
    clip.depth = torch.where(clip.known, clip.depth, torch.nan)
    after = clip.losses(denominator)
    assert after.contrast.item() == before.contrast.item()
    assert after.depth.item() == before.depth.item()
    assert clip.gradient(after.contrast + after.depth).isfinite().all()


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_visible_match_is_zero_with_a_gradient(denominator: Denominator) -> None:
    clip = Clip()
    nowhere = clip.tracks.visible.clone()
    nowhere[:, ANCHOR] = False
    clip.tracks = replace(clip.tracks, visible=nowhere)
    losses = clip.losses(denominator)
    for value in (losses.contrast, losses.depth):
        assert value.item() == 0
        assert torch.equal(clip.gradient(value), torch.zeros_like(clip.embeddings))
    assert losses.contrast_count == losses.depth_count == 0


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_match_without_negatives_costs_nothing(denominator: Denominator) -> None:
    """One patch per frame: within the frame, and in a clip of which every patch shows the point, nothing is left."""
    clip = Clip(patches=1)
    clip.tracks = replace(clip.tracks, visible=torch.ones_like(clip.tracks.visible))
    losses = clip.losses(denominator)
    if denominator is against_clip_and_track:
        assert losses.contrast > 0.1
    else:
        assert losses.contrast.item() == pytest.approx(0, abs=1e-12)
    assert clip.gradient(losses.contrast + losses.depth).isfinite().all()


def test_only_embeddings_have_a_gradient() -> None:
    clip = Clip()
    clip.depth.requires_grad_()
    clip.tracks.depth.requires_grad_()
    inputs = (clip.embeddings, clip.depth, clip.tracks.depth)
    gradients = torch.autograd.grad(clip.losses().depth, inputs, allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert gradients[1] is gradients[2] is None


def test_similarities_are_forgotten_after_the_forward() -> None:
    """Per track a number and a row of cells is kept, never a row of the clip's patches."""
    sizes: list[int] = []
    clip = Clip(patches=50)
    tracks = clip.tracks
    cells, visible, depth = (torch.cat([rows] * 8) for rows in (tracks.cells, tracks.visible, tracks.depth))
    clip.tracks = PatchTracks(cells, visible, depth, ANCHOR)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        clip.losses(chunk=16)
    assert max(sizes) <= clip.embeddings.numel() < 16 * FRAMES * 50


def test_shapes_are_checked() -> None:
    tracks = Clip().tracks
    with pytest.raises(ValueError, match="depth"):
        replace(tracks, depth=tracks.depth[1:])
    with pytest.raises(ValueError, match="visible"):
        replace(tracks, visible=tracks.visible.long())
