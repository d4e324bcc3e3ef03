from dataclasses import replace

import pytest
import torch

from g2vlm.data.batch import collate
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError
from geometry import GeometryLossWeights, GeometryPrediction, geometry_losses
from tests.train.scenes import BoxRooms
from train.loader import StepDataset, batches
from train.sampler import Sampler

REQUEST = ViewRequest(3, (28, 42), seed=5)


def sampler(**changes) -> Sampler:
    return Sampler((BoxRooms(),), **{"seed": 3, "width": 42, "aspect": (0.5, 1.0), **changes})


def test_batch_holds_the_truth() -> None:
    samples = [BoxRooms().load(scene, replace(REQUEST, seed=scene)) for scene in range(2)]
    batch = collate(samples)
    assert batch.views.shape == (2, 3, 3, 28, 42)
    assert 0.5 < batch.views.max() <= 1
    targets = batch.targets
    torch.testing.assert_close(targets.world_points[1], samples[1].world_points)
    assert batch.names == ("box_rooms/0", "box_rooms/1")
    perfect = GeometryPrediction(
        torch.stack([sample.local_points for sample in samples]), targets.cam_to_world, batch.normals
    )
    terms = geometry_losses(perfect, targets, GeometryLossWeights(normal_head=1)).terms
    assert max(terms[name].item() for name in ("points", "translation", "normal_head")) < 1e-4


def test_batch_survives_bad_numbers() -> None:
    sample = BoxRooms().load(0, REQUEST)
    nan, zero = sample.depth.clone(), sample.cam_to_world.clone()
    nan[0, :5], nan[1, 3], zero[1, 0, 0] = torch.nan, -1, torch.inf
    lost = replace(sample, depth=None)
    batch = collate([sample, replace(sample, depth=nan), replace(sample, cam_to_world=zero), lost])
    assert batch.valid.flatten(1).sum(1).tolist() == [3 * 28 * 42, 3 * 28 * 42 - 6 * 42, 0, 0]
    targets = batch.targets
    assert all(getattr(targets, name).isfinite().all() for name in ("world_points", "cam_to_world"))


def test_low_quality_has_no_normal_terms() -> None:
    sample = BoxRooms().load(0, REQUEST)
    assert collate([sample, replace(sample, quality="low")]).normal_enabled.tolist() == [True, False]


def test_different_sizes_are_refused() -> None:
    samples = [BoxRooms().load(0, request) for request in (REQUEST, replace(REQUEST, size=(28, 28)))]
    with pytest.raises(ValueError, match="one view count and size"):
        collate(samples)


def test_shapes_cover_the_ranges() -> None:
    shapes = [sampler().shape(step) for step in range(200)]
    assert {shape.num_views for shape in shapes} == {2, 3, 4}
    assert {shape.size for shape in shapes} == {(14, 42), (28, 42), (42, 42)}
    assert {(shape.num_views, shape.num_scenes) for shape in shapes} == {(2, 6), (3, 4), (4, 3)}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_world_size_cuts_the_same_step(world: int) -> None:
    one = sampler(scenes_multiple_of=4)
    for step in (0, 7, 123456):
        joined = [pick for rank in range(world) for pick in one.picks(step, rank, world)]
        assert joined == one.picks(step)
        assert len({pick.request.seed for pick in joined}) == len(joined)


def test_steps_and_seeds_differ() -> None:
    assert sampler().picks(0) == sampler().picks(0)
    assert sampler().picks(0) != sampler().picks(1)
    assert sampler().picks(0) != sampler(seed=4).picks(0)


def test_world_size_must_divide() -> None:
    with pytest.raises(InputError, match="scenes_multiple_of"):
        sampler(scenes_multiple_of=2).picks(0, 0, 3)


def test_scenes_with_too_few_views_are_passed_over() -> None:
    mixed = Sampler((BoxRooms(views=1), BoxRooms(views=6)), views=(2, 4))
    assert {pick.source for step in range(20) for pick in mixed.picks(step)} == {1}
    with pytest.raises(InputError, match="no scene with"):
        Sampler((BoxRooms(views=1),), views=(2, 4)).picks(0)


def test_weights_choose_the_source() -> None:
    mixed = Sampler((BoxRooms(), BoxRooms(num_scenes=100)), weights=(3, 1))
    picks = [pick.source for step in range(100) for pick in mixed.picks(step)]
    assert 0.18 < sum(picks) / len(picks) < 0.32


def test_coin_is_fair_and_fixed() -> None:
    throws = [sampler().coin(step) for step in range(400)]
    assert 160 < sum(throws) < 240
    assert throws == [sampler().coin(step) for step in range(400)]


def test_workers_change_nothing() -> None:
    dataset = StepDataset(sampler())
    alone, helped = (list(batches(dataset, range(3, 7), workers)) for workers in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert a.batch.names == b.batch.names
        for field in ("images", "depth", "valid", "intrinsics", "cam_to_world", "normals"):
            assert torch.equal(getattr(a.batch, field), getattr(b.batch, field)), field


def test_ranks_join_to_the_single_batch() -> None:
    drawn = sampler(scenes_multiple_of=2)
    whole = StepDataset(drawn)[5].batch
    parts = [StepDataset(drawn, rank, 2)[5].batch for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_views_are_shuffled() -> None:
    images = StepDataset(sampler(views=(6, 6), aspect=(1, 1)))[0].batch
    xs = images.cam_to_world[:, :, 0, 3]  # the source orders views along x
    assert any(x.tolist() != sorted(x.tolist()) for x in xs)


def test_unreadable_scenes_are_replaced_and_named() -> None:
    drawn = Sampler((BoxRooms(broken=frozenset({0, 1, 2})),), seed=1)
    loaded = [StepDataset(drawn)[step] for step in range(5)]
    bad = [entry for one in loaded for entry in one.bad]
    assert {entry.scene for entry in bad} <= {"box_rooms/0", "box_rooms/1", "box_rooms/2"}
    assert bad
    assert "it is broken" in bad[0].reason
    assert all(len(one.batch.names) == drawn.shape(step).num_scenes for step, one in enumerate(loaded))
    with pytest.raises(InputError, match="in a row"):
        StepDataset(Sampler((BoxRooms(num_scenes=1, broken=frozenset({0})),)))[0]
