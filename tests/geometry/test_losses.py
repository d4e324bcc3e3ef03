import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from geometry import (
    GeometryLosses,
    GeometryLossWeights,
    GeometryPrediction,
    GeometryTargets,
    apply_rigid,
    geometry_losses,
    losses,
)
from geometry.losses import (
    TERM_COUNTS,
    counted_samples,
)
from tests.geometry.scenes import (
    BATCHES,
    leaves,
    noisy_prediction,
    perfect_prediction,
    random_poses,
    random_targets,
    with_gradients,
)

EVERYTHING = GeometryLossWeights(normal_head=0.5)
F64 = torch.float64


def run(prediction: GeometryPrediction, targets: GeometryTargets, weights: GeometryLossWeights = EVERYTHING):
    """Losses and the gradient of the total with respect to every field."""
    result = geometry_losses(prediction, targets, weights)
    names, tensors = zip(*leaves(prediction).items(), strict=True)
    gradients = torch.autograd.grad(result.total, tensors)
    return result, dict(zip(names, gradients, strict=True))


def assert_same(a: GeometryLosses, b: GeometryLosses) -> None:
    assert a.terms.keys() == b.terms.keys()
    for name in a.terms:
        torch.testing.assert_close(a.terms[name], b.terms[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(a.total, b.total)


def map_batch(targets, prediction, change):
    """Both with `change` applied to every tensor."""
    new = [
        replace(x, **{n: change(t) for n, t in vars(x).items() if isinstance(t, Tensor)}) for x in (targets, prediction)
    ]
    return new[0], with_gradients(new[1])


def empty_sample(targets: GeometryTargets, index: int) -> GeometryTargets:
    valid = targets.valid.clone()
    valid[index] = False
    return replace(targets, valid=valid)


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    targets = random_targets(*batch)
    prediction = noisy_prediction(targets)
    result, gradients = run(prediction, targets)
    flat_targets, flat_prediction = map_batch(targets, prediction, lambda t: t.reshape(-1, *t.shape[len(batch) :]))
    flat, flat_gradients = run(flat_prediction, flat_targets)
    assert result.total.shape == ()
    assert result.scale.shape == batch
    assert_same(result, flat)
    torch.testing.assert_close(result.scale.reshape(-1), flat.scale)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.reshape(flat_gradients[name].shape), flat_gradients[name])


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    targets = random_targets(2)
    prediction = noisy_prediction(targets)
    result = geometry_losses(prediction, targets, EVERYTHING)
    t = {name: term.item() for name, term in result.terms.items()}
    expected = t["points"] + t["normal"] + t["global_points"] + 0.2 * (200 * t["translation"] + t["rotation"])
    assert result.total.item() == pytest.approx(expected + 0.05 * t["confidence"] + 0.5 * t["normal_head"])
    assert all(value > 0 for value in t.values())
    released = geometry_losses(prediction, targets, replace(EVERYTHING, translation=100.0)).total
    assert (result.total - released).item() == pytest.approx(20 * t["translation"])


def test_absent_outputs_have_no_term() -> None:
    targets = random_targets(2)
    prediction = replace(noisy_prediction(targets), global_points=None, confidence=None)
    assert set(geometry_losses(prediction, targets, GeometryLossWeights()).terms) == {
        "points",
        "normal",
        "translation",
        "rotation",
    }


def test_counts() -> None:
    targets = empty_sample(random_targets(4, views=3, size=(5, 6)), 1)
    targets = replace(targets, normal_enabled=torch.tensor([True, True, True, False]))
    result = geometry_losses(noisy_prediction(targets), targets, EVERYTHING)
    counts = {name: int(count) for name, count in result.counts.items()}
    assert 0 < counts.pop("normal_pixels") <= counts["pixels"]
    expected = {"samples": 3, "pixels": int(targets.valid.sum()), "normal_blocks": 2 * 3 * 20, "camera_pairs": 3 * 6}
    assert counts == expected
    assert {TERM_COUNTS[term] for term in result.terms} <= result.counts.keys()
    assert counted_samples(targets.valid).tolist() == [True, False, True, True]


def test_perfect_prediction_costs_nothing() -> None:
    targets = random_targets(2, invalid=0)
    terms = geometry_losses(perfect_prediction(targets), targets, EVERYTHING).terms
    for name in ("points", "global_points", "translation", "normal_head"):
        assert terms[name].item() == pytest.approx(0, abs=1e-9), name
    assert terms["rotation"].item() == pytest.approx(math.acos(1 - 1e-6))  # the clamp's floor
    assert terms["normal"].item() == pytest.approx(math.radians(1) ** 2 / (2 * math.radians(3)) / 6)


def test_scale_and_world_frames_do_not_matter() -> None:
    targets = random_targets(2)
    prediction = noisy_prediction(targets)
    reference = geometry_losses(prediction, targets, EVERYTHING)

    world, factor = random_poses(2, 1), torch.tensor([0.3, 4.0], dtype=F64)
    five = factor[:, None, None, None, None]
    moved = replace(
        targets,
        world_points=apply_rigid(world[:, 0], targets.world_points) * five,
        cam_to_world=losses.scale_translations(world @ targets.cam_to_world, factor),
    )
    assert_same(geometry_losses(prediction, moved, EVERYTHING), reference)

    assert prediction.global_points is not None
    other = replace(
        prediction,
        local_points=prediction.local_points * five,
        global_points=prediction.global_points * five,
        cam_to_world=losses.scale_translations(random_poses(2, 1) @ prediction.cam_to_world, factor),
    )
    assert_same(geometry_losses(other, targets, EVERYTHING), reference)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_empty_sample_has_zero_weight(index: int) -> None:
    targets = random_targets(3)
    targets = replace(empty_sample(targets, index), sky=targets.valid)
    prediction = noisy_prediction(targets)
    targets.cam_to_world[index] = torch.nan
    targets.world_points[index] = torch.nan
    result, gradients = run(prediction, targets)

    kept = [i for i in range(3) if i != index]
    kept_targets, kept_prediction = map_batch(targets, prediction, lambda t: t[kept])
    alone, alone_gradients = run(kept_prediction, replace(kept_targets, sky=None), EVERYTHING)
    without_sky = replace(targets, sky=None)
    assert_same(geometry_losses(prediction, without_sky, EVERYTHING), alone)
    assert result.scale[index] == 1
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if name != "confidence":  # the sky is known without valid pixels
            assert (gradient[index] == 0).all(), name
            torch.testing.assert_close(gradient[kept], alone_gradients[name])


def test_a_batch_of_empty_samples_is_zero() -> None:
    targets = empty_sample(empty_sample(random_targets(2), 0), 1)
    result, gradients = run(noisy_prediction(targets), targets)
    assert result.total == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_an_empty_view_among_others_is_harmless() -> None:
    targets = random_targets(2)
    targets.valid[0, 1] = False
    result, gradients = run(noisy_prediction(targets), targets)
    assert result.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (gradients["local_points"][0, 1] == 0).all()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_junk_at_invalid_pixels_does_not_leak(junk: float) -> None:
    targets = random_targets(2)
    prediction = noisy_prediction(targets)

    def filled(value: float) -> GeometryTargets:
        return replace(targets, world_points=torch.where(targets.valid[..., None], targets.world_points, value))

    expected, expected_gradients = run(prediction, filled(0.0))
    result, gradients = run(prediction, filled(junk))
    assert_same(result, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


def test_large_junk_changes_only_edge_pixels() -> None:
    targets = random_targets(2)
    prediction = noisy_prediction(targets)
    dirty = replace(targets, world_points=torch.where(targets.valid[..., None], targets.world_points, 1e300))
    clean, result = geometry_losses(prediction, targets, EVERYTHING), run(prediction, dirty)[0]
    for name in ("points", "global_points", "translation", "rotation", "confidence"):
        torch.testing.assert_close(result.terms[name], clean.terms[name])
    assert result.total.isfinite()


def test_non_finite_valid_points_are_not_hidden() -> None:
    targets = random_targets(2)
    targets.world_points[targets.valid] = torch.nan
    assert not geometry_losses(noisy_prediction(targets), targets, EVERYTHING).total.isfinite()


def test_a_single_view_has_no_camera_terms() -> None:
    targets = random_targets(2, views=1)
    result, gradients = run(noisy_prediction(targets), targets)
    assert result.terms["translation"] == result.terms["rotation"] == 0
    assert (gradients["cam_to_world"] == 0).all()
    assert result.counts["camera_pairs"] == 0
    assert result.total.isfinite()


def test_normals_disabled_everywhere() -> None:
    targets = random_targets(2)
    targets = replace(targets, normal_enabled=torch.tensor([False, False]))
    result, gradients = run(noisy_prediction(targets), targets)
    assert result.terms["normal"] == result.terms["normal_head"] == 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_disabled_samples_leave_the_normal_mean() -> None:
    targets = random_targets(2)
    prediction = noisy_prediction(targets)
    first = geometry_losses(*reversed(map_batch(targets, prediction, lambda t: t[:1])), EVERYTHING)
    targets = replace(targets, normal_enabled=torch.tensor([True, False]))
    both = geometry_losses(prediction, targets, EVERYTHING)
    torch.testing.assert_close(both.terms["normal"], first.terms["normal"])
    torch.testing.assert_close(both.terms["normal_head"], first.terms["normal_head"])


def test_coincident_predicted_points_have_finite_gradients() -> None:
    targets = random_targets(2, dtype=torch.float32)
    prediction = noisy_prediction(targets)
    flat = replace(prediction, local_points=torch.ones_like(prediction.local_points).requires_grad_())
    zero = replace(prediction, local_points=torch.zeros_like(prediction.local_points).requires_grad_())
    for degenerate in (flat, zero):
        result, gradients = run(degenerate, targets)
        assert result.total.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_one_pixel_images() -> None:
    targets = random_targets(2, size=(1, 1), invalid=0)
    result, gradients = run(noisy_prediction(targets), targets)
    assert result.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_different_sizes_are_refused() -> None:
    prediction = noisy_prediction(random_targets(2, size=(5, 6)))
    with pytest.raises(ValueError, match=r"targets\.world_points: given shape"):
        geometry_losses(prediction, random_targets(2, size=(5, 7)), EVERYTHING)


# ---- precision and devices ------------------------------------------------------------------------------------------


def test_autocast_and_half_precision_predictions_change_nothing() -> None:
    targets = random_targets(2, dtype=torch.float32)
    prediction = noisy_prediction(targets).to(torch.bfloat16)
    expected = geometry_losses(prediction.to(torch.float32), targets, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = geometry_losses(prediction, targets, EVERYTHING)
    assert result.total.dtype == torch.float32
    assert_same(result, expected)


def test_no_value_is_read_on_the_host() -> None:
    """Fake tensors have no values: any data-dependent shape or branch raises."""
    targets = replace(random_targets(2, dtype=torch.float32), sky=torch.zeros(2, 3, 5, 6, dtype=torch.bool))
    prediction = noisy_prediction(targets)
    mode = FakeTensorMode()
    targets, prediction = map_batch(targets, prediction, lambda t: mode.from_tensor(t.detach()))
    with mode:
        result, gradients = run(prediction, targets)
    assert result.total.shape == ()
    assert {name: tuple(gradient.shape) for name, gradient in gradients.items()} == {
        name: tuple(tensor.shape) for name, tensor in leaves(prediction).items()
    }


@pytest.mark.gpu
def test_no_synchronisation_on_the_device() -> None:
    targets = random_targets(2, dtype=torch.float32)
    prediction = noisy_prediction(targets)
    expected, _ = run(prediction, targets)
    on_device = targets.to("cuda"), with_gradients(prediction.to("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, _ = run(on_device[1], on_device[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.total.cpu(), expected.total, rtol=1e-4, atol=0)
