"""Every adapter, on a network that says of an analytic scene what the published one is documented to say: reprojection,
units, features, and what is told to a user who has not installed it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2vlm.errors import CheckpointError, G2VLMError, InputError, MissingExtra
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.base import targets_of
from g2vlm.supervision.teachers.ground_truth import GroundTruth
from g2vlm.supervision.teachers.registry import TEACHERS, build_teacher
from tests.g2vlm.supervision.teachers.fakes import PACKAGES, VIEWS, AnalyticScene, install

SIZES = {"vggt": (56, 84), "vggt_omega": (64, 96), "pi3": (56, 84), "cut3r": (48, 64), "depth_anything3": (56, 84)}
CORNER = {"vggt": True, "vggt_omega": True, "pi3": False, "cut3r": False, "depth_anything3": True}
CASES = [*((name, {}) for name in SIZES), ("depth_anything3", {"cameras": "rays"})]
BLOCK = {"vggt": 11, "vggt_omega": 11, "pi3": 17, "depth_anything3": 32}


def scene_of(name: str, unit: float = 1.0) -> AnalyticScene:
    return AnalyticScene(SIZES[name], CORNER[name], unit)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The targets of an adapter for the analytic scene in some unit."""

    def said(name: str, unit: float = 1.0, **options) -> TeacherTargets:
        scene = scene_of(name, unit)
        teacher = build_teacher(name, weights=install(monkeypatch, tmp_path / name, name, scene), **options)
        assert teacher.online
        found = teacher.complete(replace(scene.clip(), images=scene_of(name).clip().images), None)
        assert found is not None
        return found

    return said


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_said_lies_on_the_scene(say, name: str, options: dict) -> None:
    scene, found = scene_of(name), say(name, **options)
    torch.testing.assert_close(found.depth, scene.depth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.world_points, scene.points, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(found.intrinsics, scene.intrinsics, rtol=1e-3, atol=2e-2)
    assert torch.equal(found.cam_to_world[0], torch.eye(4))
    assert found.valid.all()
    if found.points is not None:
        torch.testing.assert_close(found.points, scene.points, rtol=1e-4, atol=1e-4)
    assert found.info.teacher == name
    assert found.info.view_ids == ("0", "1", "2")


@pytest.mark.parametrize(("name", "options"), CASES)
def test_another_unit_changes_depth_translations_and_points_alone(say, name: str, options: dict) -> None:
    one, other = say(name, **options), say(name, unit=7.0, **options)
    torch.testing.assert_close(other.depth, 7 * one.depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.cam_to_world[:, :3, 3], 7 * one.cam_to_world[:, :3, 3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.cam_to_world[:, :3, :3], one.cam_to_world[:, :3, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.intrinsics, one.intrinsics, rtol=1e-3, atol=1e-3)
    if one.points is not None:
        torch.testing.assert_close(other.points, 7 * one.points, rtol=1e-4, atol=1e-3)
    for block, features in (one.features or {}).items():
        assert torch.equal(other.features[block], features)


@pytest.mark.parametrize("name", BLOCK)
@pytest.mark.parametrize("pool", [1, 2])
def test_features_fill_the_input_and_hold_no_special_token(say, name: str, pool: int) -> None:
    found = say(name, pool=pool)
    features = found.features[BLOCK[name]].float()
    cell = (16 if name == "vggt_omega" else 14) * pool
    height, width = SIZES[name]
    assert features.shape[:3] == (VIEWS, height // cell, width // cell)
    assert features.dtype == torch.float32
    middle = (pool - 1) / 2
    expected = 100 * BLOCK[name] + 10 * (pool + middle) + (pool + middle)  # the cell in row 1, column 1
    torch.testing.assert_close(features[0, 1, 1, 0], torch.tensor(expected).bfloat16().float(), rtol=0, atol=0)
    assert features.abs().max() < 9000
    assert found.features_normed is (name == "depth_anything3")


@pytest.mark.parametrize("name", ["vggt", "vggt_omega"])
def test_halves_are_the_frame_attention_s_and_the_global_attention_s(say, name: str) -> None:
    frame, other, both = (say(name, half=half).features[4] for half in ("frame", "global", "both"))
    assert frame.shape[-1] == other.shape[-1] == 1024
    assert (frame > 0).all()
    assert torch.equal(other, -frame)
    assert torch.equal(both, torch.cat([frame, other], dim=-1))


def test_announced_features_are_those_given(say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in BLOCK:
        weights = install(monkeypatch, tmp_path / name, name, scene_of(name))
        announced = build_teacher(name, weights=weights).features
        given = say(name).features
        assert tuple(given) == announced.blocks
        assert {features.shape[-1] for features in given.values()} == {announced.dim}
        assert build_teacher(name, weights=weights, blocks=[]).features is None
    with pytest.raises(InputError, match="width 1536, expected width 7"):
        say("depth_anything3", width=7)


def test_clips_are_brought_to_the_size_that_is_asked_for(say) -> None:
    found = say("vggt", long_side=112)
    assert found.size == found.info.input_size == (84, 112)  # 56 x 84 with the long side 112, to multiples of 28
    other = say("vggt")
    assert found.info.preprocessing != other.info.preprocessing
    assert found.info.revision == other.info.revision


def test_known_geometry_gets_features_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene = scene_of("vggt")
    weights = install(monkeypatch, tmp_path / "w", "vggt", replace(scene, unit=3.0))
    vggt = build_teacher("vggt", weights=weights)
    found = targets_of([GroundTruth(), vggt], scene.clip())
    torch.testing.assert_close(found.depth, scene.depth)
    assert found.confidence is None
    assert set(found.features) == {4, 11, 17, 23}
    assert found.info.teacher == "ground truth of analytic + vggt"
    assert found.info.cell_size == 28
    assert float(found.metric_scale) == 1.0
    assert vggt.complete(scene.clip(), found) is found
    assert not any(parameter.requires_grad for parameter in vggt.network.parameters())


# The metric scale.


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    weights = install(monkeypatch, tmp_path / "m", "depth_anything3_metric", scene_of("vggt"))
    return build_teacher("depth_anything3_metric", weights=weights)


@pytest.mark.parametrize("size", [None, 168])
def test_metric_scale_is_metres_per_unit(say, metric, size: int | None) -> None:
    metric.prepare = replace(metric.prepare, long_side=size)
    targets = say("vggt", unit=0.4)
    scale = metric.complete(scene_of("vggt").clip(), targets).metric_scale
    torch.testing.assert_close(scale, torch.tensor(2.5), rtol=1e-4 if size is None else 2e-2, atol=0)


def test_metric_scale_is_left_alone_where_it_is_known_or_cannot_be_found(say, metric) -> None:
    clip = scene_of("vggt").clip()
    targets = say("vggt", unit=0.4)
    assert metric.complete(clip, None) is None
    known = replace(targets, metric_scale=torch.tensor(9.0))
    assert metric.complete(clip, known) is known
    bare = replace(targets, depth=None)
    assert metric.complete(clip, bare) is bare
    sky = replace(targets, valid=torch.zeros_like(targets.valid))
    assert metric.complete(clip, sky).metric_scale.isnan()
    unknown = replace(targets, metric_scale=torch.tensor(torch.nan), confidence=None)
    torch.testing.assert_close(metric.complete(clip, unknown).metric_scale, torch.tensor(2.5), rtol=1e-4, atol=0)


def test_sky_does_not_count_for_the_scale(say, metric) -> None:
    targets = say("vggt", unit=0.4)
    far = torch.zeros_like(targets.valid)
    far[:, :20] = True
    wrong = replace(targets, depth=torch.where(far, 50, targets.depth), valid=~far)
    scale = metric.complete(scene_of("vggt").clip(), wrong).metric_scale
    torch.testing.assert_close(scale, torch.tensor(2.5), rtol=1e-4, atol=0)


# Absent packages and weights.


@pytest.mark.parametrize("name", PACKAGES)
def test_absent_packages_are_named_with_where_to_get_them(name: str) -> None:
    with pytest.raises(MissingExtra) as raised:
        build_teacher(name, weights="somewhere")
    assert "https://github.com/" in raised.value.fix
    assert "option weights" in raised.value.fix
    assert "\n" not in raised.value.what + raised.value.why + raised.value.fix


@pytest.mark.parametrize("name", PACKAGES)
def test_absent_weights_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    install(monkeypatch, tmp_path / "w", name, AnalyticScene((28, 28), True))
    with pytest.raises(InputError, match="nothing is downloaded"):
        build_teacher(name)
    with pytest.raises(G2VLMError):
        build_teacher(name, weights=str(tmp_path / "nowhere"))


def test_weights_that_can_run_code_are_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path / "w", "vggt", scene_of("vggt"))
    install(monkeypatch, tmp_path / "w", "cut3r", scene_of("vggt"))
    file = tmp_path / "model.pth"
    file.write_bytes(b"\x80\x04")
    for name in ("vggt", "cut3r"):
        with pytest.raises((CheckpointError, InputError)):
            build_teacher(name, weights=str(file))


def test_other_networks_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = install(monkeypatch, tmp_path / "w", "pi3", scene_of("pi3"))
    save_file({"other": torch.ones(3)}, tmp_path / "w" / "model.safetensors")
    with pytest.raises(InputError, match="do not fit"):
        build_teacher("pi3", weights=weights)


def test_blocks_that_omega_does_not_keep_are_refused() -> None:
    with pytest.raises(InputError, match="keeps"):
        build_teacher("vggt_omega", blocks=[5])


# The registry.


def test_unknown_names_and_options_are_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean vggt"):
        build_teacher("vgtt")
    with pytest.raises(InputError, match="did you mean blocks"):
        build_teacher("vggt", block=[1])
    with pytest.raises(InputError, match="it reads no folder"):
        build_teacher("ground_truth", "somewhere")
    with pytest.raises(InputError, match="no folder was given"):
        build_teacher("cache")


def test_every_name_has_a_class() -> None:
    from importlib import import_module

    for path in TEACHERS.values():
        module, attribute = path.split(":")
        assert hasattr(import_module(module), attribute)
