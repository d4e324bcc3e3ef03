"""Alignment solvers: exact weighted-L1 scale and affine fits, resampling of valid pixels, Umeyama's similarity.

Shape legend: ... any batch, n entries of a list, N points.
"""

# roma has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from typing import cast

import roma
import torch
from torch import Tensor

from geometry.types import Similarity

_SMALLEST_SOURCE = 1e-7  # the released solver's clamp of |src|
_ANCHORS_AT_ONCE = 128


def weighted_l1_scale(src: Tensor, tgt: Tensor, weight: Tensor) -> Tensor:
    """The scale s that minimises sum w |s src - tgt| exactly (released code, `align`).

    The sum is convex and piecewise linear in s, with kinks of height 2 w|src| at the ratios tgt/src, so s is the
    weighted median of the ratios: the first one in ascending order where 2 cumsum(w|src|) - sum(w|src|) >= 0. The
    cumulative sums are float64.

    Args:
        src, tgt: (..., n).
        weight: (..., n), >= 0. Whatever stands in src and tgt where it is 0 is ignored.

    Returns:
        (...) scales, of either sign. A row whose weights (or sources) are all zero has no optimum and gets 1.
    """
    ratio, mass = _ratios(src, tgt, weight)
    ratio, order = ratio.sort(dim=-1)
    mass = mass.gather(-1, order)
    slope = 2 * mass.cumsum(-1) - mass.sum(-1, keepdim=True)  # of the objective, right of each ratio
    first = torch.searchsorted(slope, torch.zeros_like(slope[..., :1])).clamp_max(slope.shape[-1] - 1)
    scale = ratio.gather(-1, first)[..., 0]
    return torch.where(mass.sum(-1) > 0, scale, 1)


def weighted_l1_scale_truncated(src: Tensor, tgt: Tensor, weight: Tensor, limit: float) -> Tensor:
    """The scale s that minimises sum min(w |s src - tgt|, limit) exactly.

    Each term is flat, falls from `limit` to 0 at the ratio tgt/src, rises again and is flat. The total is piecewise
    linear and all its minima lie at ratios; the sorted breakpoints give the slope between them, a cumulative sum of
    slope times distance the value at each.

    Args:
        src, tgt: (..., n).
        weight: (..., n), >= 0. Whatever stands in src and tgt where it is 0 is ignored.
        limit: largest cost of one entry, > 0.

    Returns:
        (...) scales, of either sign. A row whose weights (or sources) are all zero gets 1.
    """
    ratio, mass = _ratios(src, tgt, weight)
    used = mass > 0
    reach = torch.where(used, limit / torch.where(used, mass, 1), 0)
    ratio = ratio.double()
    breaks, order = torch.cat([ratio - reach, ratio, ratio + reach], dim=-1).sort(dim=-1)  # (..., 3n)
    slope = torch.cat([-mass, 2 * mass, -mass], dim=-1).gather(-1, order).cumsum(-1)
    rise = slope[..., :-1] * breaks.diff(dim=-1)
    cost = torch.cat([torch.zeros_like(breaks[..., :1]), rise.cumsum(-1)], dim=-1)  # above the all-flat level

    is_candidate = torch.cat([torch.zeros_like(used), used, torch.zeros_like(used)], dim=-1).gather(-1, order)
    best = torch.where(is_candidate, cost, torch.inf).argmin(dim=-1, keepdim=True)
    scale = breaks.gather(-1, best)[..., 0].to(src.dtype)
    return torch.where(used.any(-1), scale, 1)


def _ratios(src: Tensor, tgt: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ratios tgt/src and the float64 kink masses w|src|; entries without weight are 0 in both."""
    used = weight > 0
    src = torch.where(used, src, 0)
    tgt = torch.where(used, tgt, 0)
    ratio = tgt * src.sign() / src.abs().clamp_min(_SMALLEST_SOURCE)
    mass = torch.where(used, weight, 0).double() * src.abs().double()
    return ratio, mass


def align_points_scale(src: Tensor, tgt: Tensor, weight: Tensor, limit: float | None = None) -> Tensor:
    """`weighted_l1_scale` over all coordinates of points, or the truncated form when a limit is given.

    Args:
        src, tgt: points (..., N, 3).
        weight: (..., N), the same for the three coordinates of a point.
        limit: largest cost of one coordinate.

    Returns:
        (...) scales from src to tgt.
    """
    lists = src.flatten(-2), tgt.flatten(-2), weight[..., None].expand_as(src).flatten(-2)
    return weighted_l1_scale(*lists) if limit is None else weighted_l1_scale_truncated(*lists, limit)


def align_depth_scale(src: Tensor, tgt: Tensor, weight: Tensor) -> Tensor:
    """The scale (...) that minimises sum w |scale src - tgt| over depth lists (..., n)."""
    return weighted_l1_scale(src, tgt, weight)


@torch.no_grad()
def align_depth_affine(src: Tensor, tgt: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that minimise sum w |scale src + shift - tgt| exactly, without gradient.

    Some optimal line passes through one of the entries. For each entry as anchor the best slope through it is a
    weighted-L1 scale; the cheapest of these lines is the answer. O(n^2 log n) time, O(n) memory: thin out long lists.

    Args:
        src, tgt: (..., n).
        weight: (..., n), >= 0. Whatever stands in src and tgt where it is 0 is ignored.

    Returns:
        scale (...) and shift (...).
    """
    used = weight > 0
    x, y, w = (torch.where(used, t, 0).double() for t in (src, tgt, weight))
    costs: list[Tensor] = []
    scales: list[Tensor] = []
    for start in range(0, x.shape[-1], _ANCHORS_AT_ONCE):
        anchors = slice(start, start + _ANCHORS_AT_ONCE)
        dx = x[..., None, :] - x[..., anchors, None]  # (..., a, n)
        dy = y[..., None, :] - y[..., anchors, None]
        scale = weighted_l1_scale(dx, dy, w[..., None, :].expand_as(dx))  # (..., a)
        costs.append((w[..., None, :] * (scale[..., None] * dx - dy).abs()).sum(-1))
        scales.append(scale)
    best = torch.cat(costs, dim=-1).argmin(dim=-1, keepdim=True)
    scale = torch.cat(scales, dim=-1).gather(-1, best)
    shift = y.gather(-1, best) - scale * x.gather(-1, best)
    return scale[..., 0].to(src.dtype), shift[..., 0].to(src.dtype)


def sample_valid(valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of `count` valid entries, evenly spread in order: sample j is valid entry floor(j total / count).

    Exactly the entries that `torch.nn.functional.interpolate(mode="nearest")` takes from the list of valid entries:
    like it, the position is rounded to float32, so in long lists one just below an integer becomes that integer. The
    released loss samples so, and the gradient at the entry that decides its scale depends on it.

    Args:
        valid: (..., n) bool.
        count: length of the sample; entries repeat when fewer are valid.

    Returns:
        index (..., count) into the n entries and any_valid (...). Where nothing is valid the index means nothing.
    """
    rank = valid.cumsum(-1)  # (..., n): how many valid entries up to and including each
    total = rank[..., -1:]
    position = torch.arange(count, dtype=torch.float32, device=valid.device) * (total.float() / count)
    wanted = torch.minimum(position.long(), total - 1) + 1  # (..., count)
    index = torch.searchsorted(rank, wanted).clamp_max(valid.shape[-1] - 1)
    return index, total[..., 0] > 0


def umeyama(src: Tensor, tgt: Tensor, weight: Tensor | None = None) -> Similarity:
    """The similarity that minimises sum w |s R src + t - tgt|^2 (Umeyama 1991), never a reflection.

    Args:
        src, tgt: points (..., N, 3). Use float64 for protocol numbers.
        weight: (..., N), >= 0, some positive; default equal. Whatever stands in src and tgt where it is 0 is ignored.

    Returns:
        Similarity from src to tgt. Its scale is NaN when all weighted source points coincide.
    """
    if weight is not None:
        used = (weight > 0)[..., None]
        src, tgt = torch.where(used, src, 0), torch.where(used, tgt, 0)
    rotation, translation, scale = cast(
        tuple[Tensor, Tensor, Tensor], roma.rigid_points_registration(src, tgt, weight, compute_scaling=True)
    )
    return Similarity(scale, rotation, translation)
