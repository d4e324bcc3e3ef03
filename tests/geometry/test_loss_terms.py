import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from geometry import (
    GeometryLossWeights,
    GeometryTargets,
    align_points_scale,
    apply_rigid,
    geometry_losses,
    ray_directions,
)
from geometry.losses import (
    camera_losses,
    confidence_loss,
    depth_weights,
    masked_mean,
    normal_head_loss,
    normal_head_target,
    normal_loss,
    normal_mask,
    normalize_prediction,
    normalize_targets,
    optimal_scale,
    reconstruction,
    scale_translations,
    weighted_point_error,
)
from tests.geometry.scenes import (
    BATCHES,
    intrinsics,
    leaves,
    noisy_prediction,
    perfect_prediction,
    random_targets,
)
from tests.geometry.test_alignment import brute_force_scale, slow_sample

EVERYTHING = GeometryLossWeights(normal_head=0.5)
F64 = torch.float64


# ---- normalisation, weights, scale ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_targets_are_in_the_first_view_with_mean_distance_one(batch: tuple[int, ...]) -> None:
    targets = random_targets(*batch)
    normalized = normalize_targets(targets)
    eye = torch.eye(4, dtype=F64).expand(*batch, 4, 4)
    torch.testing.assert_close(normalized.cam_to_world[..., 0, :, :], eye)
    distance = torch.where(targets.valid, normalized.global_points.norm(dim=-1), 0).sum((-3, -2, -1))
    torch.testing.assert_close(distance / targets.valid.sum((-3, -2, -1)), torch.ones(batch, dtype=F64))
    moved = apply_rigid(normalized.cam_to_world, normalized.local_points)
    torch.testing.assert_close(moved, normalized.global_points)
    local = perfect_prediction(targets).local_points
    restored = normalized.local_points * normalized.divisor[..., None, None, None, None]
    torch.testing.assert_close(restored, local)


def test_mean_distance_by_hand() -> None:
    points = torch.tensor([[[[0.0, 0, 2], [0, 0, 4], [0, 0, 900]]]])  # S 1, H 1, W 3
    valid = torch.tensor([[[True, True, False]]])
    targets = GeometryTargets(points, torch.eye(4)[None], valid, torch.tensor(True))
    assert normalize_targets(targets).divisor == 3
    assert normalize_targets(targets).local_points[0, 0, :, 2].tolist() == pytest.approx([2 / 3, 4 / 3, 300])


@pytest.mark.parametrize("batch", BATCHES)
def test_normalized_prediction_has_no_scale(batch: tuple[int, ...]) -> None:
    targets = random_targets(*batch)
    prediction = noisy_prediction(targets)
    a = normalize_prediction(prediction, targets.valid)
    bigger = replace(
        prediction,
        local_points=7 * prediction.local_points,
        cam_to_world=scale_translations(prediction.cam_to_world, torch.full(batch, 7, dtype=F64)),
        global_points=None if prediction.global_points is None else 7 * prediction.global_points,
    )
    b = normalize_prediction(bigger, targets.valid)
    for name, tensor in leaves(a).items():
        torch.testing.assert_close(tensor, leaves(b)[name])
    mean = torch.where(targets.valid, a.local_points.norm(dim=-1), 0).sum((-3, -2, -1)) / targets.valid.sum(
        (-3, -2, -1)
    )
    torch.testing.assert_close(mean, torch.ones(batch, dtype=F64))


def test_depth_weights_by_hand() -> None:
    depth = torch.tensor([[[1.0, 3.0], [0.1, -9.0]], [[50.0, 50.0], [50.0, 2.0]]], dtype=F64)  # two views
    valid = torch.tensor([[[True, True], [True, False]], [[True, True], [True, True]]])
    floors = 0.1 * 4.1 / 3, 0.1 * 152 / 4
    far = 1 / (50 + 1e-6)
    expected = [
        [[1 / (1 + 1e-6), 1 / (3 + 1e-6)], [1 / (floors[0] + 1e-6), 0]],
        [[far, far], [far, 1 / (floors[1] + 1e-6)]],
    ]
    torch.testing.assert_close(depth_weights(depth, valid, 0.1), torch.tensor(expected, dtype=F64))
    assert (depth_weights(depth, torch.zeros_like(valid), 0.1) == 0).all()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("samples", [16, 4096])
def test_optimal_scale_equals_the_slow_twin(batch: tuple[int, ...], samples: int) -> None:
    shape = (*batch, 2, 4, 5)
    points = torch.randn(*shape, 3, dtype=F64)
    target = -1.5 * points + 0.3 * torch.randn_like(points)  # a negative scale loses its sign
    weight, valid = torch.rand(shape, dtype=F64), torch.rand(shape) < 0.7
    scale = optimal_scale(points.requires_grad_(), target, weight, valid, samples)
    assert scale.shape == batch
    assert not scale.requires_grad
    flat = (
        points.detach().reshape(-1, 40, 3),
        target.reshape(-1, 40, 3),
        weight.reshape(-1, 40),
        valid.reshape(-1, 40),
    )
    for got, p, t, w, v in zip(scale.reshape(-1), *flat, strict=True):
        picked = [torch.stack([slow_sample(c[None], v[None], samples)[0] for c in x.unbind(-1)], -1) for x in (p, t)]
        expanded = slow_sample(w[None], v[None], samples)[0][:, None].expand(samples, 3)
        if samples == 16:
            expected = brute_force_scale(picked[0].flatten(), picked[1].flatten(), expanded.flatten())
        else:
            expected = align_points_scale(picked[0], picked[1], expanded[:, 0])
        torch.testing.assert_close(got, expected.abs())


# ---- terms by hand --------------------------------------------------------------------------------------------------


def test_point_error_by_hand() -> None:
    points = torch.tensor([[[[1.0, 2, 3], [9, 9, 9]]]])
    target = torch.tensor([[[[1.0, 4, 7], [torch.nan] * 3]]])
    valid, weight = torch.tensor([[[True, False]]]), torch.tensor([[[0.5, 0.0]]])
    error = weighted_point_error(points, target, weight, valid, torch.tensor(2.0))
    torch.testing.assert_close(error, torch.tensor([[[0.5 * (1 + 0 + 1) / 3, 0]]]))
    assert masked_mean(error, valid) == pytest.approx(1 / 3)


def tilted_plane(degrees: float, size: tuple[int, int] = (5, 6)) -> Tensor:
    """Local points (1, H, W, 3) of a plane turned by an angle about the camera's x axis."""
    angle = math.radians(degrees)
    normal = torch.tensor([0, math.sin(angle), -math.cos(angle)], dtype=F64)
    rays = ray_directions(intrinsics(*size), *size)
    return ((-3 / (rays @ normal))[..., None] * rays)[None]


@pytest.mark.parametrize(("degrees", "clamped"), [(0.0, 1.0), (0.5, 1.0), (2.0, 2.0), (10.0, 10.0), (45.0, 45.0)])
def test_normal_loss_of_tilted_planes(degrees: float, clamped: float) -> None:
    valid, counted = torch.ones(1, 5, 6, dtype=torch.bool), torch.tensor(True)
    angle, beta = math.radians(clamped), math.radians(3)
    smooth = angle**2 / (2 * beta) if angle < beta else angle - beta / 2
    loss = normal_loss(5 * tilted_plane(degrees), tilted_plane(0), valid, counted)
    assert loss.item() == pytest.approx(smooth / 6, rel=1e-6)  # four corners / (4 max(H, W))


def test_normal_loss_clamps_at_ninety_degrees() -> None:
    valid, counted = torch.ones(1, 5, 6, dtype=torch.bool), torch.tensor(True)
    mirrored = tilted_plane(0) * torch.tensor([1, -1, 1])  # its corners turn the other way
    expected = (math.pi / 2 - math.radians(1.5)) / 6
    assert normal_loss(mirrored, tilted_plane(0), valid, counted).item() == pytest.approx(expected)


def test_masked_corners_count_as_zero_in_the_mean_over_all_blocks() -> None:
    mask, counted = torch.ones(1, 5, 6, dtype=torch.bool), torch.tensor(True)
    whole = normal_loss(tilted_plane(10), tilted_plane(0), mask, counted)
    mask[0, 0, 0] = False  # three of its block's four corners need this pixel
    part = normal_loss(tilted_plane(10), tilted_plane(0), mask, counted)
    assert (part / whole).item() == pytest.approx(1 - 3 / (4 * 20))


def test_normal_mask_removes_edges_and_disabled_samples() -> None:
    target = tilted_plane(0).repeat(2, 1, 1, 1, 1)
    target[:, :, :, 3:] *= 2
    valid = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    valid[0, 0, 4] = False
    mask = normal_mask(target, valid, torch.tensor([True, False]))
    assert not mask[1].any()
    assert mask[0, 0, 0].tolist() == [True, True, False, False, True, True]
    assert not mask[0, 0, 4].any()


def test_camera_losses_by_hand() -> None:
    angle = 0.3
    turned = torch.eye(4, dtype=F64).repeat(2, 1, 1)
    turned[1, :2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned[1, :3, 3] = torch.tensor([0.0, 0, 0.5])
    truth = torch.eye(4, dtype=F64).repeat(2, 1, 1)
    truth[1, 2, 3] = 0.95
    translation, rotation = camera_losses(turned, truth, torch.tensor(2.0, dtype=F64), torch.tensor(True))
    torch.testing.assert_close(rotation, torch.tensor(angle, dtype=F64))
    torch.testing.assert_close(translation, torch.tensor(0.05**2 / 2 / 3, dtype=F64))
    translation, _ = camera_losses(turned, truth, torch.tensor(4.0, dtype=F64), torch.tensor(True))
    torch.testing.assert_close(translation, torch.tensor(0.1 * (1.05 - 0.05) / 3, dtype=F64))


def test_normal_head_loss_by_hand() -> None:
    truth, mask = tilted_plane(0), torch.ones(1, 5, 6, dtype=torch.bool)
    mask[0, :, 0] = False
    normals = torch.tensor([0, math.sin(0.2), -math.cos(0.2)], dtype=F64).repeat(1, 5, 6, 1)
    normals[:, :, 0] = torch.nan
    assert normal_head_loss(normals, *normal_head_target(truth, mask, None)).item() == pytest.approx(0.2)
    exact = torch.tensor([0, 0, -1], dtype=F64).expand_as(normals)
    assert normal_head_loss(normals, *normal_head_target(truth, mask, exact)).item() == pytest.approx(0.2)


def test_confidence_loss_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5, 3.0]]])
    error = torch.tensor([[[0.01, 0.03, 0.0, 0.0]]])
    valid = torch.tensor([[[True, True, False, False]]])
    sky = torch.tensor([[[True, False, True, False]]])  # valid pixels are no sky
    softplus = [math.log1p(math.exp(x)) for x in (-2.0, -1.0, 0.5)]
    alone = (softplus[0] + softplus[1]) / 2
    assert confidence_loss(logits, error, valid).item() == pytest.approx(alone)
    assert confidence_loss(logits, error, valid, sky).item() == pytest.approx(alone + softplus[2])


# ---- gradients by finite differences --------------------------------------------------------------------------------


def scene_for_gradients():
    targets = random_targets(2, views=2, size=(3, 4))
    prediction = noisy_prediction(targets)
    target = normalize_targets(targets)
    weight = depth_weights(target.local_points[..., 2], targets.valid, 0.1)
    return targets, prediction, target, weight


def test_point_gradient() -> None:
    targets, prediction, target, weight = scene_for_gradients()
    scale = torch.tensor([0.9, 1.1], dtype=F64)

    def term(points: Tensor) -> Tensor:
        return masked_mean(
            weighted_point_error(points, target.local_points, weight, targets.valid, scale), targets.valid
        )

    assert torch.autograd.gradcheck(term, prediction.local_points)


def test_normal_gradient() -> None:
    targets, prediction, target, _ = scene_for_gradients()
    counted = torch.tensor([True, True])
    mask = torch.ones_like(targets.valid)
    mask[0, 0, 0, 0] = False
    assert normal_loss(prediction.local_points, target.local_points, mask, counted) > 0
    assert torch.autograd.gradcheck(
        lambda p: normal_loss(p, target.local_points, mask, counted), prediction.local_points
    )


def test_camera_gradient() -> None:
    _, prediction, target, _ = scene_for_gradients()
    scale, counted = torch.tensor([0.9, 1.1], dtype=F64), torch.tensor([True, True])
    assert torch.autograd.gradcheck(
        lambda poses: camera_losses(poses, target.cam_to_world, scale, counted), prediction.cam_to_world
    )


def test_normal_head_gradient() -> None:
    targets, prediction, target, _ = scene_for_gradients()
    truth = normal_head_target(target.local_points, targets.valid, None)
    assert torch.autograd.gradcheck(lambda normals: normal_head_loss(normals, *truth), prediction.normals)


def test_confidence_gradient() -> None:
    targets, prediction, _, _ = scene_for_gradients()
    error, sky = 0.04 * torch.rand_like(targets.valid, dtype=F64), torch.rand(targets.valid.shape) < 0.5
    assert torch.autograd.gradcheck(lambda c: confidence_loss(c, error, targets.valid, sky), prediction.confidence)


def test_gradient_of_the_total_through_the_divisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale carries no gradient, so it is held fixed for the finite differences."""
    targets, prediction, _, _ = scene_for_gradients()
    scale = geometry_losses(prediction, targets, EVERYTHING).scale
    monkeypatch.setattr(reconstruction, "optimal_scale", lambda *_: scale)
    names, tensors = zip(*leaves(prediction).items(), strict=True)

    def total(*values: Tensor) -> Tensor:
        changed = replace(prediction, **dict(zip(names, values, strict=True)))
        return geometry_losses(changed, targets, EVERYTHING).total

    assert torch.autograd.gradcheck(total, tensors, fast_mode=True)
