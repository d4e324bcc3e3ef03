import pytest
import roma
import torch
import torch.nn.functional as F
from torch import Tensor

from geometry import (
    align_depth_affine,
    align_depth_scale,
    align_points_scale,
    sample_valid,
    umeyama,
    weighted_l1_scale,
    weighted_l1_scale_truncated,
)
from tests.geometry.scenes import BATCHES


def random_lists(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Sources of both signs, noisy targets, weights; some sources and some weights are zero."""
    src = torch.randn(*shape, dtype=dtype)
    tgt = 1.7 * src + 0.5 * torch.randn(*shape, dtype=dtype)
    weight = torch.rand(*shape, dtype=dtype)
    return torch.where(torch.rand(shape) < 0.1, 0, src), tgt, torch.where(torch.rand(shape) < 0.2, 0, weight)


def l1_cost(scale: Tensor, src: Tensor, tgt: Tensor, weight: Tensor, limit: float = torch.inf) -> Tensor:
    """Objective of one list at many scales: (m,) -> (m,)."""
    return (weight * (scale[:, None] * src - tgt).abs()).clamp_max(limit).sum(-1)


def brute_force_scale(src: Tensor, tgt: Tensor, weight: Tensor, limit: float = torch.inf) -> Tensor:
    """The smallest ratio tgt/src with the least cost, by trying them all."""
    candidates = (tgt / src)[(src != 0) & (weight > 0)].sort().values
    return candidates[l1_cost(candidates, src, tgt, weight, limit).argmin()]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("limit", [torch.inf, 2.0, 0.3, 0.02])
def test_scale_equals_brute_force(batch: tuple[int, ...], limit: float) -> None:
    src, tgt, weight = random_lists(*batch, 40)
    if limit == torch.inf:
        scale = weighted_l1_scale(src, tgt, weight)
    else:
        scale = weighted_l1_scale_truncated(src, tgt, weight, limit)
    assert scale.shape == batch
    rows = zip(scale.reshape(-1), *(t.reshape(-1, 40) for t in (src, tgt, weight)), strict=True)
    for got, s, t, w in rows:
        torch.testing.assert_close(got, brute_force_scale(s, t, w, limit))


def test_a_large_limit_changes_nothing() -> None:
    lists = random_lists(5, 60)
    torch.testing.assert_close(weighted_l1_scale_truncated(*lists, 1e6), weighted_l1_scale(*lists))


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_entries_without_weight_are_ignored(junk: float) -> None:
    src, tgt, weight = random_lists(3, 30, dtype=torch.float32)
    kept = weight > 0
    dirty = torch.where(kept, src, junk), torch.where(kept, tgt, -junk), weight
    clean = torch.where(kept, src, 0), torch.where(kept, tgt, 0), weight
    assert torch.equal(weighted_l1_scale(*dirty), weighted_l1_scale(*clean))
    assert torch.equal(weighted_l1_scale_truncated(*dirty, 0.5), weighted_l1_scale_truncated(*clean, 0.5))
    assert torch.equal(torch.stack(align_depth_affine(*dirty)), torch.stack(align_depth_affine(*clean)))


def test_rows_without_information_get_one() -> None:
    src, tgt = torch.randn(2, 5), torch.randn(2, 5)
    src[1] = 0
    weight = torch.tensor([[0.0], [1.0]]).expand(2, 5)
    assert weighted_l1_scale(src, tgt, weight).tolist() == [1, 1]
    assert weighted_l1_scale_truncated(src, tgt, weight, 1.0).tolist() == [1, 1]


def test_one_entry_and_negative_scale() -> None:
    src, tgt, weight = torch.tensor([2.0]), torch.tensor([-6.0]), torch.tensor([0.1])
    assert weighted_l1_scale(src, tgt, weight) == -3
    assert weighted_l1_scale_truncated(src, tgt, weight, 0.1) == -3


def test_tie_takes_the_first_ratio() -> None:
    src, tgt = torch.ones(2), torch.tensor([3.0, 1.0])
    assert weighted_l1_scale(src, tgt, torch.ones(2)) == 1


def test_float32_masses_are_summed_in_float64() -> None:
    weight = torch.tensor([2.0**24, 2.0**24 + 2])  # their sum is no float32
    assert weighted_l1_scale(torch.ones(2), torch.tensor([0.0, 1.0]), weight) == 1


@pytest.mark.parametrize("batch", BATCHES)
def test_points_share_one_scale(batch: tuple[int, ...]) -> None:
    src = torch.randn(*batch, 20, 3, dtype=torch.float64)
    tgt = 2 * src + 0.1 * torch.randn_like(src)
    weight = torch.rand(*batch, 20, dtype=torch.float64)
    tripled = weight.repeat_interleave(3, dim=-1)
    scale = align_points_scale(src, tgt, weight)
    torch.testing.assert_close(scale, weighted_l1_scale(src.flatten(-2), tgt.flatten(-2), tripled))
    truncated = align_points_scale(src, tgt, weight, limit=0.05)
    torch.testing.assert_close(truncated, weighted_l1_scale_truncated(src.flatten(-2), tgt.flatten(-2), tripled, 0.05))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", [20, 150])
def test_affine_fit_equals_brute_force_over_all_pairs(batch: tuple[int, ...], n: int) -> None:
    src, tgt, weight = random_lists(*batch, n)
    tgt = tgt + 3
    scale, shift = align_depth_affine(src, tgt, weight)
    assert scale.shape == shift.shape == batch
    lists = (t.reshape(-1, n) for t in (src, tgt, weight))
    for s, t, x, y, w in zip(scale.reshape(-1), shift.reshape(-1), *lists, strict=True):
        i, j = torch.combinations(torch.arange(n)[w > 0]).unbind(1)
        slope = (y[i] - y[j]) / (x[i] - x[j])
        cost = (w * (slope[:, None] * (x - x[i, None]) + y[i, None] - y).abs()).sum(-1)
        best = cost[cost.isfinite()].min()
        torch.testing.assert_close((w * (s * x + t - y).abs()).sum(), best)


def test_affine_fit_recovers_a_line_under_outliers() -> None:
    src, _, weight = random_lists(300)
    tgt = 1.3 * src + 0.4
    tgt[:100] += 10 * torch.rand(100, dtype=torch.float64)
    scale, shift = align_depth_affine(src, tgt, weight)
    torch.testing.assert_close(torch.stack([scale, shift]), torch.tensor([1.3, 0.4], dtype=torch.float64))
    assert align_depth_scale(src, 1.3 * src, weight) == pytest.approx(1.3)


def test_affine_fit_of_one_entry_passes_through_it() -> None:
    scale, shift = align_depth_affine(*(torch.tensor([v]) for v in (2.0, 5.0, 1.0)))
    assert scale * 2 + shift == 5


def slow_sample(values: Tensor, valid: Tensor, count: int) -> Tensor:
    """Oracle: boolean indexing and torch's nearest interpolation, one sample at a time."""
    return torch.stack([F.interpolate(v[m][None, None], count)[0, 0] for v, m in zip(values, valid, strict=True)])


@pytest.mark.parametrize("count", [1, 7, 4096])
@pytest.mark.parametrize("n", [5, 300, 4097, 11_151, 60_001])
def test_sampling_equals_nearest_interpolation(n: int, count: int) -> None:
    valid = torch.rand(5, n) < torch.tensor([0.1, 0.5, 0.9, 1.1, 0.0])[:, None]
    valid[:, n // 2] = True
    index, any_valid = sample_valid(valid, count)
    assert any_valid.all()
    values = torch.arange(n, dtype=torch.float64).expand(5, n)
    assert torch.equal(values.gather(-1, index), slow_sample(values, valid, count))


def test_sampling_spreads_over_the_valid_entries() -> None:
    valid = torch.rand(20, 5000) < 0.7
    index, _ = sample_valid(valid, 512)
    exact = torch.arange(512) * valid.sum(-1, keepdim=True) // 512
    rank = valid.cumsum(-1).gather(-1, index) - 1
    assert valid.gather(-1, index).all()
    assert ((rank - exact == 0) | (rank - exact == 1)).all()
    assert (rank == exact).float().mean() > 0.99


@pytest.mark.parametrize("batch", BATCHES)
def test_sampling_batches(batch: tuple[int, ...]) -> None:
    valid = torch.rand(*batch, 50) < 0.5
    index, any_valid = sample_valid(valid, 8)
    assert index.shape == (*batch, 8)
    assert any_valid.shape == batch
    flat, _ = sample_valid(valid.reshape(-1, 50), 8)
    assert torch.equal(index.reshape(-1, 8), flat)


def test_sampling_nothing_gives_an_index_in_range() -> None:
    index, any_valid = sample_valid(torch.zeros(2, 6, dtype=torch.bool), 4)
    assert not any_valid.any()
    assert ((index >= 0) & (index < 6)).all()


def random_similar_points(*batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    src = torch.randn(*batch, 30, 3, dtype=torch.float64)
    rotation = roma.random_rotmat((*batch, 1), dtype=torch.float64)[..., 0, :, :]
    scale, translation = 0.5 + torch.rand(batch, dtype=torch.float64), torch.randn(*batch, 3, dtype=torch.float64)
    tgt = scale[..., None, None] * src @ rotation.mT + translation[..., None, :]
    return src, tgt, scale, rotation, translation


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("junk", [5.0, torch.nan])
def test_umeyama_recovers_a_similarity(batch: tuple[int, ...], junk: float) -> None:
    src, tgt, scale, rotation, translation = random_similar_points(*batch)
    weight = torch.rand(*batch, 30, dtype=torch.float64)
    weight[..., :10] = 0
    tgt_dirty = torch.where(weight[..., None] > 0, tgt, junk)
    for found in (umeyama(src, tgt), umeyama(src, tgt_dirty, weight)):
        torch.testing.assert_close(found.scale, scale)
        torch.testing.assert_close(found.rotation, rotation)
        torch.testing.assert_close(found.translation, translation)


def test_umeyama_never_reflects() -> None:
    src = torch.randn(50, 3, dtype=torch.float64)
    found = umeyama(src, src * torch.tensor([1, 1, -1]))
    torch.testing.assert_close(torch.linalg.det(found.rotation), torch.ones((), dtype=torch.float64))


def test_umeyama_is_the_least_squares_optimum() -> None:
    src, tgt = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    weight = torch.rand(40, dtype=torch.float64)
    found = umeyama(src, tgt, weight)

    def cost(scale: Tensor, rotvec: Tensor, translation: Tensor) -> Tensor:
        moved = scale * src @ (roma.rotvec_to_rotmat(rotvec) @ found.rotation).mT + translation
        return (weight * (moved - tgt).square().sum(-1)).sum()

    parameters = (found.scale, torch.zeros(3, dtype=torch.float64), found.translation)
    gradients = torch.func.grad(cost, argnums=(0, 1, 2))(*parameters)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-9


def test_umeyama_of_coincident_points_has_no_scale() -> None:
    assert umeyama(torch.ones(5, 3), torch.randn(5, 3)).scale.isnan()
