"""GeoVR's heads: what there is of them, what they read, and what they give for a batch of unlike clips."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from g2vlm.supervision.base import ClipShape, Fit, SupervisedModel, TeacherFeatures
from g2vlm.supervision.dense_head import patch_grid
from g2vlm.supervision.geovr import (
    GeoVR,
    GeoVRHeads,
    GeoVRPrediction,
    compared_channels,
    pooled_grid,
)
from g2vlm.supervision.lifting import GeoVRLifting
from geometry import apply_rigid, unproject
from geometry.losses.features import pool_patches, pool_to_grid, resize_to_grid
from tests.g2vlm.supervision.toy import FEATURES, Toy, room_targets
from train.objectives.base import tensors_of

TINY = GeoVRHeads(
    teacher_half="frame", teacher_pool=2, camera_dim=12, scale_dim=12, dpt_levels=(8, 8, 8, 8), dpt_dim=8, mlp_dim=12
)
CONFIDENT = replace(TINY, predict_confidence=True)
WIDE = ClipShape((28, 56), (2, 4))
FRAMES = [((1, 2),) * 3, ((2, 2),) * 2, ((1, 2),), ((1, 2),) * 2, ((2, 4),)]
SHAPES = [WIDE, ClipShape((56, 56), (4, 4)), None, WIDE, WIDE]


def supervised(config: GeoVRHeads, features: TeacherFeatures | None = FEATURES, **toy: Any) -> SupervisedModel:
    backbone = Toy(**toy)
    return SupervisedModel(backbone, {"geovr": GeoVR(config, Fit.of(backbone, features))})


def geovr(model: SupervisedModel) -> GeoVR:
    found = model.supervisions["geovr"]
    assert isinstance(found, GeoVR)
    return found


def same(left: Any, right: Any) -> None:
    lefts, rights = list(tensors_of(left)), list(tensors_of(right))
    assert len(lefts) == len(rights) > 0
    for one, other in zip(lefts, rights, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["dense", "dpt", "mlp"])
def test_predictions_of_unlike_clips(kind: Any) -> None:
    """Each is what its clip alone gives; a sample without a shape has none."""
    model = supervised(replace(CONFIDENT, depth_head=kind))
    together = model(shapes=SHAPES, frames=FRAMES).predictions["geovr"]
    assert [own is None for own in together] == [False, False, True, False, False]
    for frames, shape, own in zip(FRAMES, SHAPES, together, strict=True):
        if shape is None:
            continue
        (alone,) = model(shapes=[shape], frames=[frames]).predictions["geovr"]
        same(own, alone)
        maps = (len(frames), *shape.size)
        assert [tuple(tensor.shape) for tensor in own[:4]] == [(len(frames), 9), maps, maps, ()]
        assert (own.depth > 0).all()
        assert (own.confidence > 1).all()
        assert own.scale > 0
        assert {block: tuple(own.features[block].shape) for block in own.features} == dict.fromkeys(
            FEATURES.blocks, (len(frames), shape.feature_grid[0] // 2, shape.feature_grid[1] // 2, FEATURES.dim // 2)
        )


def test_sub_heads_run_once_per_size() -> None:
    """Frames of one size go through together, cameras and scales of all clips too."""
    model, calls = supervised(TINY), []
    heads = geovr(model).heads
    for name in ("camera", "scale", "depth", "alignment.0"):
        heads.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(shapes=SHAPES, frames=FRAMES)
    assert sorted(calls) == ["alignment.0"] * 3 + ["camera"] + ["depth"] * 3 + ["scale"]


@pytest.mark.parametrize("terms", [("camera",), ("depth",), ("scale",), ("alignment",), ("camera", "scale")])
def test_only_what_is_needed_is_there(terms: Any) -> None:
    """Heads, probe tokens, taps and predictions of the terms alone."""
    model = supervised(replace(TINY, terms=terms), num_layers=5)
    supervision = geovr(model)
    assert {name.split(".")[0] for name, _ in supervision.heads.named_parameters()} == {*terms}
    probes = {name for name in terms if name in ("camera", "scale")}
    assert (supervision.aux is None) == (not probes)
    assert {name for name, _ in supervision.named_parameters() if name.startswith("aux")} == {
        f"aux.{p}" for p in probes
    }
    layers = {"depth": (1, 2, 4, 5), "alignment": (1, 2, 4, 5)}
    assert supervision.taps.hidden == max((layers.get(term, ()) for term in terms), key=len)
    assert supervision.taps.probes is None
    assert supervision.blocks == (FEATURES.blocks if "alignment" in terms else ())
    prediction = model(shapes=SHAPES, frames=FRAMES).predictions["geovr"][0]
    found = {"alignment" if name == "features" else name for name, own in prediction._asdict().items()
             if own is not None and own != {}}  # fmt: skip
    assert found == {*terms}


@pytest.mark.parametrize("kind", ["dense", "dpt", "mlp"])
@pytest.mark.parametrize("patch", [28, 32])
def test_without_any_shape_every_weight_still_has_a_gradient(kind: Any, patch: int) -> None:
    """A step of a process that has no supervised clip; probe tokens too, though there is one frame."""
    model = supervised(replace(CONFIDENT, depth_head=kind, patch_size=patch))
    predictions = model(shapes=[None, None], frames=[(), ((1, 2),)]).predictions["geovr"]
    torch.stack([0 * tensor.sum() for tensor in tensors_of(predictions)]).sum().backward()
    for name, parameter in geovr(model).named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["dense", "mlp"])
def test_sizes_that_are_no_multiples_of_the_patch(kind: Any) -> None:
    """The depth of the next larger size, resized; the features' odd row keeps a cell of its own."""
    model = supervised(replace(CONFIDENT, depth_head=kind))
    frames = [((2, 2),) * 2]
    (odd,) = model(shapes=[ClipShape((42, 50), (3, 5))], frames=frames).predictions["geovr"]
    (whole,) = model(shapes=[ClipShape((56, 56), (4, 6))], frames=frames).predictions["geovr"]
    for name in ("depth", "confidence"):
        expected = resize_to_grid(getattr(whole, name)[..., None], (42, 50))[..., 0]
        torch.testing.assert_close(getattr(odd, name), expected)
    same(odd.features, whole.features)
    with pytest.raises(ValueError, match="multiples of the patch size 28"):
        patch_grid((42, 50), 28)


def test_dpt_gives_any_size_itself() -> None:
    model, sizes = supervised(replace(TINY, depth_head="dpt")), []
    geovr(model).heads.depth.register_forward_hook(lambda _, args, __: sizes.append(args[1]))
    model(shapes=[ClipShape((42, 50), (3, 5))], frames=[((2, 2),)])
    assert sizes == [(42, 50)]


def test_layers_of_the_paper() -> None:
    """Fixture layer_mapping: VGGT's blocks 4, 11, 17, 23 of 24 in a decoder of 28 blocks; depth needs no teacher."""
    vggt = TeacherFeatures((4, 11, 17, 23), 24, 1024)
    with torch.device("meta"):
        model = GeoVR(GeoVRHeads(), Fit(1536, 28, vggt))
        assert model.taps.hidden == (6, 14, 21, 28)
        assert GeoVR(replace(GeoVRHeads(), terms=("depth",)), Fit(1536, 36)).taps.hidden == (8, 18, 27, 36)
        assert [tuple(head.mlp.layers[-1].weight.shape) for head in model.heads.alignment] == [(1024, 1024)] * 4
        one = GeoVR(GeoVRHeads(terms=("alignment",), alignment_blocks=(11,)), Fit(1536, 28, vggt))
        assert (one.taps.hidden, one.blocks) == ((14,), (11,))
        other = GeoVRHeads(depth_layers=(1, 2, 3, 4), alignment_blocks=(4, 23), alignment_layers=(5, 9))
        both = GeoVR(other, Fit(1536, 28, vggt))
        assert (both.taps.hidden, both.blocks) == ((1, 2, 3, 4, 5, 9), (4, 23))


@pytest.mark.parametrize(
    ("changes", "features", "message"),
    [
        ({"terms": ()}, FEATURES, "without terms"),
        ({}, None, "the teacher gives none"),
        ({"alignment_blocks": (1, 2)}, FEATURES, r"alignment_blocks: \[2\] given, the teacher has \[1, 3, 5, 7\]"),
        ({"alignment_blocks": ()}, FEATURES, "alignment_blocks: none given"),
        ({"alignment_layers": (1, 2)}, FEATURES, "one is needed for each of the blocks"),
        ({}, replace(FEATURES, dim=5), "have no halves"),
        ({"depth_head": "conv"}, FEATURES, "must be one of dense, dpt, mlp"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeoVR(replace(TINY, **changes), Fit(16, 4, features))


def test_depth_is_read_from_the_layers_that_are_asked_for() -> None:
    """And each aligned feature from its own."""
    model = supervised(replace(TINY, depth_layers=(0, 1, 1, 2), alignment_layers=(1, 2, 3, 4)))
    heads = geovr(model).heads
    seen: dict[str, list[Tensor]] = {}
    for name in ("depth", *(f"alignment.{i}" for i in range(4))):
        heads.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: seen.update({name: list(args[0]) if name == "depth" else [args[0]]})
        )
    taps = geovr(model).taps
    tapped = model.backbone({"frames": FRAMES[:1]}, replace(taps, probes=geovr(model).aux()))
    heads(tapped, SHAPES[:1])
    expected = {"depth": (0, 1, 1, 2)} | {f"alignment.{i}": (i + 1,) for i in range(4)}
    for name, layers in expected.items():
        for own, layer in zip(seen[name], layers, strict=True):
            torch.testing.assert_close(own.flatten(0, 2), tapped.hidden[layer][0])


def test_saved_as_json_and_made_again() -> None:
    """The config has plain values, and with the weights it is the same supervision."""
    model = supervised(CONFIDENT)
    config = GeoVRHeads(**json.loads(json.dumps(asdict(CONFIDENT))))
    again = GeoVR(config, geovr(model).fit)
    again.load_state_dict(geovr(model).state_dict())
    expected = model(shapes=SHAPES, frames=FRAMES).predictions["geovr"]
    model.supervisions["geovr"] = again
    same(model(shapes=SHAPES, frames=FRAMES).predictions["geovr"], expected)


def test_halves_and_pooling() -> None:
    features = torch.arange(2 * 4 * 6 * 8.0).reshape(2, 4, 6, 8)
    assert compared_channels(features, "frame").equal(features[..., :4])
    assert compared_channels(features, "global").equal(features[..., 4:])
    assert compared_channels(features, "both") is features
    assert [pooled_grid(grid, 2) for grid in ((4, 6), (3, 5), (1, 1))] == [(2, 3), (2, 3), (1, 1)]
    assert pooled_grid((3, 5), 1) == (3, 5)
    torch.testing.assert_close(pool_to_grid(features, pooled_grid((4, 6), 2)), pool_patches(features, 2))


def lifting(**changes: Any) -> GeoVRLifting:
    return GeoVRLifting(GeoVR(replace(TINY, **changes), Fit(16, 4, FEATURES)))


def test_a_scene_of_exact_predictions() -> None:
    """All frames in the first camera, whatever world the predicted cameras are in."""
    targets = room_targets()
    scene = lifting().scene(GeoVRPrediction(targets.pose_encoding, targets.depth, None, targets.metric_scale, {}))
    exact = targets.in_first_camera()
    torch.testing.assert_close(scene.cam_to_world, exact.cam_to_world, atol=2e-6, rtol=1e-5)
    assert scene.cam_to_world[0].equal(torch.eye(4))
    height, width = targets.size
    half = torch.tensor([width / 2, height / 2])
    torch.testing.assert_close(scene.intrinsics[:, :2, 2], half.expand(3, 2))
    torch.testing.assert_close(scene.intrinsics[:, 0, 0], targets.intrinsics[:, 0, 0])
    assert scene.depth is targets.depth
    assert scene.points is None
    assert scene.metres_per_unit is targets.metric_scale
    points = apply_rigid(scene.cam_to_world, unproject(scene.depth, scene.intrinsics))
    lost = (targets.intrinsics[0, :2, 2] - half).norm() / targets.intrinsics[0, 0, 0] * targets.depth.max()
    assert (
        points - exact.world_points
    ).abs().max() < lost + 1e-4  # as far as the principal point, which is not encoded


def test_a_flat_field_of_view_has_a_finite_focal_length() -> None:
    camera = torch.tensor([[0.0, 0, 0, 0, 0, 0, 2, 0, 0]])
    scene = lifting().scene(GeoVRPrediction(camera, torch.ones(1, 4, 6), None, None, {}))
    assert scene.intrinsics.isfinite().all()
    assert scene.metres_per_unit is None


def test_a_scene_needs_camera_and_depth() -> None:
    assert lifting().missing("depth") == ()
    assert lifting(terms=("scale",)).missing("depth") == ("camera", "depth")
    assert lifting(terms=("camera", "scale")).missing("depth") == ("depth",)
