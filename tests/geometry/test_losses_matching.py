from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geometry.losses import contrastive, matching
from geometry.losses.matching import Matches, MatchLosses, all_frames, match_losses, target_frame

F64 = torch.float64
TAU = 0.2
FRAMES, PATCHES, TRACKS, WIDTH = 4, 6, 9, 5

Nce = Callable[..., Tensor]


# ---- InfoNCE --------------------------------------------------------------------------------------------------------


def dense_nce(query: Tensor, positive: Tensor, negatives: Tensor, tau: float, allowed: Tensor) -> Tensor:
    """One query at a time, over the list of its logits."""
    losses = []
    for i in range(len(query)):
        others = negatives[i] if negatives.dim() == 3 else negatives
        candidates = torch.cat([positive[i : i + 1], others[allowed[i]]])
        logits = F.cosine_similarity(query[i : i + 1], candidates) / tau
        losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
    return torch.stack(losses)


def nce_inputs(name: str) -> tuple[Nce, tuple[Tensor, ...], Tensor]:
    """The loss, its tensors, and a mask of allowed negatives."""
    query, positive = torch.randn(2, 7, 4, dtype=F64)
    if name == "in_batch":
        return contrastive.info_nce_in_batch, (query, positive), torch.rand(7, 7) < 0.7
    if name == "shared":
        return contrastive.info_nce_shared, (query, positive, torch.randn(11, 4, dtype=F64)), torch.rand(7, 11) < 0.7
    return contrastive.info_nce_paired, (query, positive, torch.randn(7, 11, 4, dtype=F64)), torch.rand(7, 11) < 0.7


NAMES = ["in_batch", "shared", "paired"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [3, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_against_one_query_at_a_time(name: str, chunk: int, masked: bool) -> None:
    loss, tensors, allowed = nce_inputs(name)
    if not masked:
        allowed = torch.ones_like(allowed)
    ours = loss(*tensors, TAU, allowed if masked else None, chunk)
    negatives = tensors[1] if name == "in_batch" else tensors[2]
    others = allowed & ~torch.eye(7, dtype=torch.bool) if name == "in_batch" else allowed
    torch.testing.assert_close(ours, dense_nce(*tensors[:2], negatives, TAU, others))


@pytest.mark.parametrize("name", NAMES)
def test_info_nce_gradient(name: str) -> None:
    loss, tensors, allowed = nce_inputs(name)
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, TAU, allowed, 3), tensors)


@pytest.mark.parametrize("name", ["shared", "paired"])
def test_order_of_negatives_does_not_matter(name: str) -> None:
    loss, (query, positive, negatives), allowed = nce_inputs(name)
    order = torch.randperm(11)
    permuted = loss(query, positive, negatives[..., order, :], TAU, allowed[:, order])
    torch.testing.assert_close(permuted, loss(query, positive, negatives, TAU, allowed))


@pytest.mark.parametrize("name", NAMES)
def test_without_negatives_the_loss_is_zero(name: str) -> None:
    loss, tensors, allowed = nce_inputs(name)
    tensors = tuple(tensor.requires_grad_() for tensor in tensors)
    value = loss(*tensors, TAU, torch.zeros_like(allowed)).sum()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(value, tensors[0])[0].abs().max() < 1e-12


def test_without_queries_the_loss_keeps_its_graph() -> None:
    query = torch.zeros(0, 4, requires_grad=True)
    value = contrastive.info_nce_shared(query, query, torch.randn(3, 4), TAU).sum()
    assert torch.autograd.grad(value, query)[0].shape == (0, 4)


def test_a_chunk_is_forgotten_after_its_forward() -> None:
    """Only inputs are saved, never a matrix of queries by negatives."""
    sizes: list[int] = []
    query, positive = torch.randn(2, 64, 4, requires_grad=True)
    negatives = torch.randn(50, 4)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        contrastive.info_nce_shared(query, positive, negatives, TAU, chunk=16)
    assert max(sizes) <= query.numel()


# ---- attention and depth --------------------------------------------------------------------------------------------


def test_temperature_towards_zero_gives_the_best_cell() -> None:
    cosine, depth = torch.rand(8, 20, dtype=F64), 1 + torch.rand(8, 20, dtype=F64)
    allowed = torch.rand(8, 20) < 0.8
    expected = matching.expected_depth(matching.attention(cosine / 1e-6, allowed), depth)
    best = torch.where(allowed, cosine, -1).argmax(-1, keepdim=True)
    torch.testing.assert_close(expected, depth.gather(1, best)[:, 0])


def test_attention_is_a_softmax_over_the_allowed() -> None:
    logits, allowed = torch.randn(5, 12, dtype=F64), torch.rand(5, 12) < 0.5
    allowed[0] = False
    weights = matching.attention(logits, allowed)
    assert not weights[0].any()
    for row in range(1, 5):
        torch.testing.assert_close(weights[row][allowed[row]], logits[row][allowed[row]].softmax(0))
        assert not weights[row][~allowed[row]].any()
    depth = torch.where(allowed, 2.0, torch.nan)
    assert matching.expected_depth(weights, depth).tolist() == pytest.approx([0, 2, 2, 2, 2])


def test_attention_gradient() -> None:
    logits, allowed = torch.randn(4, 6, dtype=F64, requires_grad=True), torch.rand(4, 6) < 0.6
    allowed[0] = False
    depth, true = 1 + torch.rand(4, 6, dtype=F64), 1 + torch.rand(4, dtype=F64)

    def loss(logits: Tensor) -> Tensor:
        return matching.relative_depth_error(
            matching.expected_depth(matching.attention(logits, allowed), depth), true, 1e-6
        )

    assert torch.autograd.gradcheck(loss, logits)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        loss(logits).sum().backward()


def test_relative_depth_error_has_no_scale() -> None:
    depth, expected = 1 + torch.rand(2, 10, dtype=F64)
    error = matching.relative_depth_error(expected, depth, 0.0)
    torch.testing.assert_close(matching.relative_depth_error(9 * expected, 9 * depth, 0.0), error)
    assert ((error >= 0) & (error < 1)).all()


# ---- a clip ---------------------------------------------------------------------------------------------------------


class Clip:
    """Random embeddings, tracks and depths; some points hidden, some patches without depth."""

    def __init__(self) -> None:
        self.embeddings = torch.randn(FRAMES, PATCHES, WIDTH, dtype=F64, requires_grad=True)
        self.cells = torch.randint(PATCHES, (TRACKS, FRAMES))
        self.visible = torch.rand(TRACKS, FRAMES) < 0.7
        self.point_depth = 1 + torch.rand(TRACKS, FRAMES, dtype=F64)
        self.depth = 1 + torch.rand(FRAMES, PATCHES, dtype=F64)
        self.known = torch.rand(FRAMES, PATCHES) < 0.8
        self.anchor_frame = 1

    @property
    def matches(self) -> Matches:
        return matching.matches_of_tracks(self.cells, self.visible, self.point_depth, self.anchor_frame, PATCHES)

    def losses(self, matches: Matches, negatives: matching.Negatives = all_frames, chunk: int = 4) -> MatchLosses:
        return match_losses(self.embeddings, matches, self.depth, self.known, TAU, negatives, 1e-6, chunk)


def dense_losses(clip: Clip, only_target_frame: bool) -> tuple[Tensor, Tensor]:
    """Both losses, track by track, from sets of (frame, patch)."""
    unit = F.normalize(clip.embeddings, dim=-1)
    contrast, errors = [], []
    for track in range(TRACKS):
        seen = [(f, int(clip.cells[track, f])) for f in range(FRAMES) if clip.visible[track, f]]
        anchor = (clip.anchor_frame, int(clip.cells[track, clip.anchor_frame]))
        for positive in seen:
            if anchor not in seen or positive[0] == anchor[0]:
                continue
            candidates = {
                (f, p)
                for f in ([positive[0]] if only_target_frame else range(FRAMES))
                for p in range(PATCHES)
                if (f, p) not in seen
            }
            order = [positive, *sorted(candidates)]
            logits = torch.stack([unit[anchor] @ unit[cell] for cell in order]) / TAU
            contrast.append(-logits.log_softmax(0)[0])
            frame, known = positive[0], clip.known[positive[0]]
            if known.any():
                weights = (unit[frame][known] @ unit[anchor] / TAU).softmax(0)
                expected, true = (weights * clip.depth[frame][known]).sum(), clip.point_depth[track, frame]
                errors.append((true - expected).abs() / (true + expected + 1e-6))
    return torch.stack(contrast).mean(), torch.stack(errors).mean()


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("negatives", [all_frames, target_frame])
def test_match_losses_against_sets(negatives: matching.Negatives, chunk: int) -> None:
    clip = Clip()
    ours = clip.losses(clip.matches, negatives, chunk)
    contrast, depth = dense_losses(clip, negatives is target_frame)
    torch.testing.assert_close(ours.contrast, contrast)
    torch.testing.assert_close(ours.depth, depth)
    seen = clip.visible[:, [1]] & clip.visible[:, [0, 2, 3]]
    assert ours.contrast_count == ours.depth_count == seen.sum()


@pytest.mark.parametrize("negatives", [all_frames, target_frame])
def test_match_losses_gradient(negatives: matching.Negatives) -> None:
    clip = Clip()

    def both(embeddings: Tensor) -> tuple[Tensor, Tensor]:
        clip.embeddings = embeddings
        losses = clip.losses(clip.matches, negatives)
        return losses.contrast, losses.depth

    assert torch.autograd.gradcheck(both, clip.embeddings)


def test_invisible_points_contribute_nothing() -> None:
    clip = Clip()
    matches, before = clip.matches, clip.losses(clip.matches)
    clip.cells = torch.where(clip.visible, clip.cells, torch.randint(-999, 999, clip.cells.shape))
    clip.point_depth = torch.where(clip.visible, clip.point_depth, torch.nan)
    after = clip.losses(clip.matches)
    assert after.contrast.item() == before.contrast.item()
    assert after.depth.item() == before.depth.item()
    kept = matches.visible
    alone = Matches(*(getattr(matches, f)[kept] for f in ("anchor", "positive", "same_track", "depth", "visible")))
    torch.testing.assert_close(clip.losses(alone).contrast, before.contrast)
    torch.testing.assert_close(clip.losses(alone).depth, before.depth)


def test_unknown_depths_contribute_nothing() -> None:
    clip = Clip()
    clip.depth = torch.where(clip.known, clip.depth, torch.nan)
    assert clip.losses(clip.matches).depth.isfinite()
    clip.known[2] = False
    losses = clip.losses(clip.matches)
    torch.testing.assert_close(losses.depth, dense_losses(clip, only_target_frame=False)[1])
    assert losses.depth_count < losses.contrast_count
    unknown = replace(clip.matches, depth=torch.full_like(clip.matches.depth, torch.nan))
    losses = clip.losses(unknown)
    assert (losses.depth.item(), losses.depth_count.item()) == (0, 0)
    assert losses.contrast.item() == clip.losses(clip.matches).contrast.item()
    gradient = torch.autograd.grad(losses.depth, clip.embeddings)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_visible_match_is_zero_with_a_gradient() -> None:
    clip = Clip()
    clip.visible = torch.zeros_like(clip.visible)
    losses = clip.losses(clip.matches)
    for value in (losses.contrast, losses.depth):
        assert value.item() == 0
        gradient = torch.autograd.grad(value, clip.embeddings, retain_graph=True)[0]
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_known_false_negatives_are_left_out() -> None:
    clip = Clip()
    clip.visible = torch.ones_like(clip.visible)
    matches = clip.matches
    literal = replace(matches, same_track=matches.same_track[:, :0])
    assert clip.losses(literal).contrast > clip.losses(matches).contrast  # more negatives
    same = clip.losses(literal, target_frame).contrast  # the other frames' patches were no candidates anyway
    torch.testing.assert_close(same, clip.losses(matches, target_frame).contrast)


def test_a_patch_is_no_negative_of_itself() -> None:
    """One match, whose track is not told: every patch of the clip but the anchor and its match is a negative."""
    clip = Clip()
    untold = torch.zeros(1, 0, dtype=torch.long)
    matches = Matches(torch.tensor([2]), torch.tensor([9]), untold, torch.tensor([1.5]), torch.tensor([True]))
    unit = F.normalize(clip.embeddings, dim=-1).flatten(0, 1)
    logits = torch.cat([unit[9:10], unit[[i for i in range(len(unit)) if i not in (2, 9)]]]) @ unit[2] / TAU
    torch.testing.assert_close(clip.losses(matches).contrast, -logits.log_softmax(0)[0])


def test_only_embeddings_have_a_gradient() -> None:
    clip = Clip()
    clip.depth.requires_grad_()
    clip.point_depth.requires_grad_()
    inputs = (clip.embeddings, clip.depth, clip.point_depth)
    gradients = torch.autograd.grad(clip.losses(clip.matches).depth, inputs, allow_unused=True)
    assert gradients[0].abs().max() > 0
    assert gradients[1] is None
    assert gradients[2] is None


def test_shapes_are_checked() -> None:
    matches = Clip().matches
    with pytest.raises(ValueError, match="depth"):
        replace(matches, depth=matches.depth[1:])
    with pytest.raises(ValueError, match="visible"):
        replace(matches, visible=matches.visible.long())
