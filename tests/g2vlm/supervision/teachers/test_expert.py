"""The geometric expert as a teacher: the same tokens and the same reconstruction as everywhere else, frozen."""

from pathlib import Path

import pytest
import torch

from g2vlm.checkpoint import load_model, random_model, save_model
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import expert_tokens
from g2vlm.pipeline import Pipeline
from g2vlm.processing import normalise_views
from g2vlm.supervision.teachers.base import targets_of
from g2vlm.supervision.teachers.expert import ExpertTeacher
from g2vlm.supervision.teachers.ground_truth import GroundTruth
from tests.g2vlm.supervision.teachers.fakes import AnalyticScene
from tests.train.runs import mini_config

SIZE = (28, 56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "mini"
    save_model(random_model(mini_config(), seed=3), path)
    return str(path)


def test_it_says_what_the_model_reconstructs(folder: str) -> None:
    clip = AnalyticScene(SIZE, corner=False).clip()
    teacher = ExpertTeacher(folder, blocks=(0, 1))
    found = teacher.complete(clip, None)
    model = load_model(folder)
    prediction = Pipeline(model, "mini").predict(clip.images)
    first = torch.linalg.inv(prediction.cam_to_world[0])
    torch.testing.assert_close(found.depth, prediction.depth)
    torch.testing.assert_close(found.cam_to_world, first @ prediction.cam_to_world, rtol=1e-4, atol=1e-4)
    local = torch.einsum("sij,shwj->shwi", found.world_to_cam[:, :3, :3], found.points)
    local = local + found.world_to_cam[:, None, None, :3, 3]
    torch.testing.assert_close(local, prediction.local_points, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.valid, prediction.depth > 0)
    assert found.confidence_kind == "sigmoid"
    (tokens,) = expert_tokens(model, [normalise_views(clip.images)], layer=1)
    assert torch.equal(found.features[0], tokens.patches.unflatten(1, (2, 4)).bfloat16())
    assert set(found.features) == {0, 1}
    assert not found.features_normed


def test_it_is_frozen_and_its_features_are_announced(folder: str) -> None:
    teacher = ExpertTeacher(folder)
    assert teacher.online
    assert teacher.features.blocks == (1,)
    assert (teacher.features.depth, teacher.features.dim) == (2, mini_config().hidden_size)
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    clip = AnalyticScene(SIZE, corner=False).clip()
    clip.images.requires_grad_(True)
    found = teacher.complete(clip, None)
    assert not any(tensor.requires_grad for tensor in (found.depth, found.cam_to_world, found.features[1]))
    assert ExpertTeacher(folder, blocks=()).complete(clip, None).features is None
    with pytest.raises(InputError, match="has 2 blocks"):
        ExpertTeacher(folder, blocks=(2,))


def test_known_geometry_gets_its_features_alone(folder: str) -> None:
    """The same as with the geometry, whose heads do not run."""
    clip, teacher = AnalyticScene(SIZE, corner=False).clip(), ExpertTeacher(folder)
    expected = teacher.complete(clip, None).features
    for head in teacher.network.heads.modules():
        head.forward = lambda *_, **__: pytest.fail("a head ran")
    found = targets_of([GroundTruth(), teacher], clip)
    assert torch.equal(found.depth, clip.scene.depth)
    assert found.points is None
    assert set(found.features) == {1}
    assert torch.equal(found.features[1], expected[1])


def test_clips_of_any_size_are_brought_to_its_patches(folder: str) -> None:
    clip = AnalyticScene((30, 50), corner=False).clip()
    found = ExpertTeacher(folder).complete(clip, None)
    assert found.size == (28, 56)
    pooled = ExpertTeacher(folder, pool=2, long_side=84).complete(clip, None)
    assert pooled.size == (56, 84)
    assert pooled.features[1].shape[1:3] == (2, 3)
    assert found.info.preprocessing != pooled.info.preprocessing


def test_other_weights_are_another_revision(folder: str, tmp_path: Path) -> None:
    save_model(random_model(mini_config(), seed=4), tmp_path / "other")
    assert ExpertTeacher(folder).revision != ExpertTeacher(str(tmp_path / "other")).revision
    assert ExpertTeacher(folder).revision == ExpertTeacher(folder).revision
