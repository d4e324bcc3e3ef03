"""SpatialSV's heads: what they read, what they predict, and that nothing of them is in the model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g2vlm.supervision.backbones import Taps, backbone_of
from g2vlm.supervision.base import ClipShape, Fit, SupervisedModel, TeacherFeatures
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.lifting import LiftedScene, SpatialSVLifting
from g2vlm.supervision.spatialsv import (
    MapPrediction,
    SpatialSV,
    SpatialSVHeads,
    SpatialSVPrediction,
    Task,
)
from geometry import apply_rigid, unproject
from geometry.rays import make_ray_map
from tests.g2vlm.supervision.taps import families
from tests.g2vlm.supervision.vlms import FAMILIES, Family, Sample

FEATURES = TeacherFeatures(blocks=(2, 5), depth=6, dim=10)
SMALL = SpatialSVHeads(output_dim=8, widths=DPTWidths((8, 8, 8, 8), 8))
CHANNELS = {"depth": 1, "ray": 6, "point": 3}


def attached(family: Family, config: SpatialSVHeads = SMALL, seed: int = 0) -> tuple[SupervisedModel, SpatialSV]:
    """A tiny model of the family with fresh heads; gradients are those of a training step."""
    backbone = backbone_of(family.model())
    torch.manual_seed(seed)
    module = SpatialSV(config, Fit.of(backbone, FEATURES))
    return SupervisedModel(backbone, {"spatialsv": module}), module


def clips(family: Family) -> tuple[Any, list[ClipShape | None], list[Sample]]:
    """Two clips of one grid, one without supervision, one of another grid; with the shapes of their targets."""
    video = family.kinds[-1]
    first, other = family.grids[0], family.grids[-1]
    frames = 2 if family.one_length else 3
    samples = [
        Sample((first,) * 2, video),
        Sample((first,) * frames, video, after=(30, 31)),
        Sample((first,) * 2, video, before=(25,)),
        Sample((other,) * 2, video),
    ]
    probes = (False, False) if family.name.startswith("ours") else None
    shapes = [ClipShape((21, 30)), ClipShape((21, 30)), None, ClipShape((14, 14))]
    return family.inputs(samples, False, probes), shapes, samples


def tensors(prediction: SpatialSVPrediction) -> list[Tensor]:
    assert prediction.features is not None
    return [*(tensor for own in prediction.maps.values() for tensor in own), prediction.features]


@families
def test_predictions_on_every_backbone(family: Family) -> None:
    model, _ = attached(family)
    inputs, shapes, samples = clips(family)
    found = model(shapes=shapes, **inputs).predictions["spatialsv"]
    assert [own is None for own in found] == [False, False, True, False]
    for prediction, sample, size in zip(found, samples, ((11, 15), (11, 15), None, (7, 7)), strict=True):
        if prediction is None:
            continue
        views, grid = len(sample.grids), sample.grids[0]
        assert prediction.features.shape == (views, *grid, FEATURES.dim)
        for task, own in prediction.maps.items():
            assert own.values.shape == (views, *size, CHANNELS[task])
            assert own.confidence.shape == (views, *size)
            assert (own.confidence > 1).all()
        assert (prediction.maps["depth"].values > 0).all()
        assert all(tensor.dtype is torch.float32 for tensor in tensors(prediction))


@pytest.mark.parametrize("name", ["ours", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_clip_is_predicted_from_its_own_layers_alone(name: str) -> None:
    """Against the sub-modules called clip by clip on the library's hidden states."""
    family = next(own for own in FAMILIES if own.name == name)
    model, module = attached(family, replace(SMALL, layers=(0, 1, 1, 2)))
    inputs, shapes, _ = clips(family)
    found = model(shapes=shapes, **inputs).predictions["spatialsv"]
    last = model.backbone.num_layers
    tapped = model.backbone(inputs, Taps(hidden=(0, 1, 2, last)))
    for i, size in ((0, (11, 15)), (1, (11, 15)), (3, (7, 7))):
        grids = tapped.frames[i]
        states = {layer: own[i].unflatten(0, (len(grids), *grids[0])) for layer, own in tapped.hidden.items()}
        maps = module.heads.lift([states[layer] for layer in (0, 1, 1, 2)], size)
        for task, own in maps.items():
            torch.testing.assert_close(found[i].maps[task].values, own.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[i].maps[task].confidence, own.confidence, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[i].features, module.heads.distill(states[last]))


def test_the_model_stays_as_it_was() -> None:
    """Zero inference cost: modules, state and logits are those of a model that never had heads."""
    family = next(own for own in FAMILIES if own.name == "ours")
    plain = family.model()
    modules = [(name, type(module)) for name, module in plain.named_modules()]
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model, module = attached(family)
    inputs, shapes, _ = clips(family)
    everywhere = torch.arange(len(inputs["sequence"].semantic_ids))
    before = plain(**inputs, logits_at=everywhere).logits
    supervised = model(shapes=shapes, **inputs)
    assert supervised.logits.equal(before)
    sum(own.sum() for own in tensors(supervised.predictions["spatialsv"][0])).backward()
    inner = model.backbone.model
    assert [(name, type(module)) for name, module in inner.named_modules()] == modules
    assert inner.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in inner.state_dict().items())
    assert inner(**inputs, logits_at=everywhere).logits.equal(before)
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in inner.modules())
    assert module.aux is None
    assert module.taps.probes is None


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(28, (3, 10, 17, 24)), (36, (4, 12, 20, 28)), (32, (4, 11, 18, 25)), (4, (1, 1, 2, 3)), (24, (3, 9, 15, 21))],
)
def test_default_layers(num_layers: int, layers: tuple[int, ...]) -> None:
    assert SpatialSVHeads().layers_of(num_layers) == layers


def test_taps_are_the_layers_and_the_last_for_distillation() -> None:
    fit = Fit(8, 36, FEATURES)
    assert SpatialSV(SMALL, fit).taps.hidden == (4, 12, 20, 28, 36)
    assert SpatialSV(replace(SMALL, distill=False), fit).taps.hidden == (4, 12, 20, 28)
    assert SpatialSV(replace(SMALL, tasks=()), fit).taps.hidden == (36,)
    assert SpatialSV(replace(SMALL, layers=(36, 36, 36, 36)), fit).taps.hidden == (36,)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_one_projector_has_a_quarter_of_the_parameters_of_four() -> None:
    fit = Fit(8, 36)
    four, one = (SpatialSV(replace(SMALL, num_projectors=n, distill=False), fit).heads.lift for n in (4, 1))
    assert count(four.projectors) == 4 * count(one.projectors) == 4 * (8 * 8 + 8 + 8 * 8 + 8)


@pytest.mark.parametrize(
    ("change", "fit", "message"),
    [
        ({"tasks": (), "distill": False}, Fit(8, 36), "neither tasks nor distill"),
        ({"tasks": ("depth", "depth")}, Fit(8, 36, FEATURES), "a task twice"),
        ({"out_stride": 0}, Fit(8, 36, FEATURES), "out_stride"),
        ({}, Fit(8, 36), "a teacher that gives features"),
        ({"layers": (1, 2, 3, 37)}, Fit(8, 36, FEATURES), r"\[37\]"),
    ],
)
def test_what_is_refused(change: dict[str, Any], fit: Fit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpatialSV(replace(SMALL, **change), fit)


def exact_maps(tasks: tuple[Task, ...]) -> tuple[SpatialSVPrediction, LiftedScene]:
    """What perfect heads predict of a slanted wall seen by two cameras, and the truth."""
    height, width = 9, 12
    K = torch.tensor([[11.0, 0, 5.5], [0, 12.0, 4.0], [0, 0, 1]]).repeat(2, 1, 1)
    pose = torch.eye(4).repeat(2, 1, 1)
    angle = torch.tensor(0.3)
    pose[1, 0, 0] = pose[1, 2, 2] = angle.cos()
    pose[1, 0, 2], pose[1, 2, 0] = angle.sin(), -angle.sin()
    pose[1, :3, 3] = torch.tensor([-0.7, 0.1, 0.2])
    depth = 2 + 0.1 * torch.arange(width).float() + 0.05 * torch.arange(height).float()[:, None]
    depth = torch.stack([depth, depth + 0.5])
    rays = make_ray_map(pose, K, height, width)
    points = apply_rigid(pose, unproject(depth, K))
    sure = torch.full((2, height, width), 2.0)
    maps = {"depth": depth[..., None], "ray": rays, "point": points}
    prediction = SpatialSVPrediction({task: MapPrediction(maps[task], sure) for task in tasks}, None)
    return prediction, LiftedScene(depth, pose, K, points)


def lifting(tasks: tuple[Task, ...]) -> SpatialSVLifting:
    return SpatialSVLifting(SpatialSV(replace(SMALL, tasks=tasks, distill=False), Fit(8, 36)))


@pytest.mark.parametrize("source", ["depth", "points"])
def test_exact_maps_give_the_scene_back(source: str) -> None:
    tasks: tuple[Task, ...] = ("depth", "ray", "point")
    prediction, truth = exact_maps(tasks)
    scene = lifting(tasks).scene(prediction, source)
    torch.testing.assert_close(scene.depth, truth.depth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scene.cam_to_world, truth.cam_to_world, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scene.intrinsics, truth.intrinsics, rtol=1e-3, atol=1e-3)
    assert (scene.points is None) == (source == "depth")
    assert scene.metres_per_unit is None
    if scene.points is not None:
        assert scene.points.equal(truth.points)


def test_what_single_tasks_cannot_give() -> None:
    assert lifting(("depth",)).missing("depth") == ("ray",)
    assert lifting(("ray",)).missing("points") == ("point",)
    assert lifting(("depth", "ray")).missing("depth") == ()
