import pytest
import torch

from geometry import GeometryPrediction, GeometryTargets, Similarity, Views, apply_rigid, unproject
from tests.geometry.scenes import BATCHES, intrinsics, random_poses


def random_similarity(*batch: int) -> Similarity:
    pose = random_poses(*batch)
    return Similarity(0.5 + torch.rand(batch, dtype=torch.float64), pose[..., :3, :3], pose[..., :3, 3])


@pytest.mark.parametrize("batch", BATCHES)
def test_similarity_is_its_matrix(batch: tuple[int, ...]) -> None:
    a, b = random_similarity(*batch), random_similarity(*batch)
    points = torch.randn(*batch, 5, 3, dtype=torch.float64)
    expected = a.scale[..., None, None] * points @ a.rotation.mT + a.translation[..., None, :]
    torch.testing.assert_close(a.apply(points), expected)
    torch.testing.assert_close(apply_rigid(a.matrix, points), expected)
    torch.testing.assert_close(a.inverse().apply(a.apply(points)), points)
    torch.testing.assert_close(a.compose(b).apply(points), a.apply(b.apply(points)))
    torch.testing.assert_close(a.compose(b).matrix, a.matrix @ b.matrix)


@pytest.mark.parametrize("batch", BATCHES)
def test_prediction_derives_depth_world_points_and_intrinsics(batch: tuple[int, ...]) -> None:
    K = intrinsics(4, 5)
    depth = 1 + torch.rand(*batch, 3, 4, 5, dtype=torch.float64)
    local, poses = unproject(depth, K), random_poses(*batch, 3)
    prediction = GeometryPrediction(local, poses, torch.zeros_like(local))
    torch.testing.assert_close(prediction.depth, depth)
    torch.testing.assert_close(prediction.world_points, apply_rigid(poses, local))
    torch.testing.assert_close(prediction.intrinsics, K.expand(*batch, 3, 3, 3))


VIEWS = {
    "images": torch.zeros(2, 3, 4, 5),
    "intrinsics": torch.zeros(2, 3, 3),
    "cam_to_world": torch.zeros(2, 4, 4),
    "depth": torch.zeros(2, 4, 5),
    "valid": torch.zeros(2, 4, 5, dtype=torch.bool),
}
PREDICTION = {
    "local_points": torch.zeros(2, 4, 5, 3),
    "cam_to_world": torch.zeros(2, 4, 4),
    "normals": torch.zeros(2, 4, 5, 3),
    "global_points": torch.zeros(2, 4, 5, 3),
    "confidence": torch.zeros(2, 4, 5),
}
TARGETS = {
    "world_points": torch.zeros(6, 2, 4, 5, 3),
    "cam_to_world": torch.zeros(6, 2, 4, 4),
    "valid": torch.zeros(6, 2, 4, 5, dtype=torch.bool),
    "normal_enabled": torch.zeros(6, dtype=torch.bool),
    "sky": torch.zeros(6, 2, 4, 5, dtype=torch.bool),
}
SIMILARITY = {"scale": torch.ones(2), "rotation": torch.zeros(2, 3, 3), "translation": torch.zeros(2, 3)}
CLASSES = [(Views, VIEWS), (GeometryPrediction, PREDICTION), (GeometryTargets, TARGETS), (Similarity, SIMILARITY)]
FIELDS = [(kind, good, name) for kind, good in CLASSES for name in good]


@pytest.mark.parametrize(("kind", "good", "name"), FIELDS, ids=[f"{k.__name__}.{n}" for k, _, n in FIELDS])
def test_wrong_shapes_are_refused(kind: type, good: dict, name: str) -> None:
    kind(**good)
    with pytest.raises(ValueError, match="given shape"):
        kind(**good | {name: good[name][..., :1, :] if good[name].dim() > 1 else good[name][:1]})


@pytest.mark.parametrize(("kind", "good", "name"), [(Views, VIEWS, "valid"), (GeometryTargets, TARGETS, "sky")])
def test_masks_are_boolean(kind: type, good: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: given dtype"):
        kind(**good | {name: good[name].float()})


def test_too_few_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., \*, 3, \*, \*\)"):
        Views(torch.zeros(3, 4, 5))


def test_to_changes_floats_and_keeps_masks() -> None:
    views = Views(**VIEWS, is_metric=True).to(torch.float64)
    assert views.images.dtype == torch.float64
    assert views.valid is not None
    assert views.valid.dtype == torch.bool
    assert views.is_metric
    assert views.to("meta").valid.device.type == "meta"
    assert GeometryPrediction(**PREDICTION | {"confidence": None}).to(torch.float64).confidence is None


def test_stack_and_split_undo_each_other() -> None:
    parts = [GeometryPrediction(torch.rand(2, 3, 4, 3), torch.rand(2, 4, 4), torch.rand(2, 3, 4, 3)) for _ in range(3)]
    stacked = GeometryPrediction.stack(parts)
    assert stacked.local_points.shape == (3, 2, 3, 4, 3)
    assert stacked.confidence is None
    joined = GeometryPrediction(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("local_points", "cam_to_world", "normals"))
    )
    for part, piece in zip(parts, joined.split([2, 2, 2]), strict=True):
        assert torch.equal(piece.cam_to_world, part.cam_to_world)
        assert torch.equal(piece.normals, part.normals)
        assert piece.global_points is None
