"""GeoVR's terms against formulas written out here from the papers, and their way through heads and backbones."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.supervision.backbones import backbone_of
from g2vlm.supervision.base import ClipShape, Fit, SupervisedModel
from g2vlm.supervision.geovr import GeoVR, GeoVRHeads, GeoVRPrediction
from g2vlm.supervision.lifting import GeoVRLifting
from g2vlm.supervision.targets import TeacherTargets
from geometry import apply_rigid, unproject
from geometry.pose_encoding import encode_pose
from tests.g2vlm.supervision.toy import FEATURES, Toy, frames_of, room_targets
from tests.g2vlm.supervision.vlms import FAMILIES
from train.objectives.geovr import (
    AlignmentTerm,
    CameraTerm,
    DepthTerm,
    GeoVRConfig,
    GeoVRObjective,
    ScaleTerm,
)
from train.objectives.report import LossReport

TINY = GeoVRHeads(teacher_half="frame", teacher_pool=2, camera_dim=12, scale_dim=12, dpt_levels=(8, 8, 8, 8), dpt_dim=8)
RELEASED = GeoVRConfig(heads=TINY)
RAW = replace(RELEASED, normalise=False)
PAPER = replace(
    RAW,
    heads=replace(TINY, predict_confidence=True, teacher_half="both", teacher_pool=1),
    depth=DepthTerm(regression=0.0, weigh_gradient=True, form="plain"),
    scale=ScaleTerm(logarithm="log"),
)
EVERYTHING = replace(
    RELEASED,
    heads=replace(TINY, predict_confidence=True),
    depth=DepthTerm(silog=0.5),
    alignment=AlignmentTerm(relational=1.0),
)
OFF = {"camera": CameraTerm(weight=0), "depth": DepthTerm(weight=0), "scale": ScaleTerm(weight=0),
       "alignment": AlignmentTerm(weight=0)}  # fmt: skip


def only(config: GeoVRConfig, *terms: str) -> GeoVRConfig:
    """The config with these terms alone."""
    return replace(config, **{name: off for name, off in OFF.items() if name not in terms})


def objective_of(config: GeoVRConfig, backbone: Any = None) -> GeoVRObjective:
    return GeoVRObjective.build(config, Toy() if backbone is None else backbone, FEATURES)


def guess(targets: TeacherTargets, config: GeoVRConfig, seed: int = 0) -> GeoVRPrediction:
    """Random predictions of the right shapes, none far from the truth, which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    views, size = targets.num_views, targets.size

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid = [-(-side // config.heads.teacher_pool) for side in next(iter(targets.features.values())).shape[1:3]]
    dim = FEATURES.dim if config.heads.teacher_half == "both" else FEATURES.dim // 2
    confidence = (1 + noise(views, *size).exp()).requires_grad_() if config.heads.predict_confidence else None
    return GeoVRPrediction(
        (targets.in_first_camera().pose_encoding + 0.3 * noise(views, 9)).requires_grad_(),
        (targets.depth * (0.3 * noise(views, *size)).exp()).requires_grad_(),
        confidence,
        (2 * noise(1)[0].exp()).requires_grad_(),
        {block: noise(views, *grid, dim).requires_grad_() for block in FEATURES.blocks},
    )


def losses(config: GeoVRConfig, prediction: GeoVRPrediction, targets: TeacherTargets) -> dict[str, Tensor]:
    """Every reported mean; each is counted."""
    terms = objective_of(config).clip_terms(prediction, targets)
    assert all(count == 1 for _, count in terms.values())
    return {name: value for name, (value, _) in terms.items()}


def total(report: LossReport) -> Tensor:
    return torch.stack([term.factor * term.value for term in report.values()]).sum()


# ---- the formulas ---------------------------------------------------------------------------------------------------


def pose_by_hand(camera: Tensor, targets: TeacherTargets) -> dict[str, Tensor]:
    """Eq. 2: L1 of translation (clamped), quaternion and field of view, cameras seen from the first one."""
    world_to_cam = torch.linalg.inv(targets.cam_to_world) @ targets.cam_to_world[0]
    true = encode_pose(world_to_cam, targets.intrinsics, targets.size)
    error = (camera - true).abs()
    return {
        "translation": error[:, :3].clamp(max=100).mean(),
        "rotation": error[:, 3:7].mean(),
        "field_of_view": error[:, 7:].mean(),
    }


def trimmed(values: Tensor) -> Tensor:
    """The mean without what exceeds the 0.98 quantile, next rank above, of the values clamped at 100."""
    if len(values) <= 1000:
        return values.mean()
    rank = -(-98 * (len(values) - 1) // 100)
    kept = values[values <= values.clamp(max=100).sort().values[rank]]
    return kept.mean() if len(kept) >= 1000 else values.clamp(max=100).mean()


def released_gradient(error: Tensor, valid: Tensor) -> Tensor:
    found = []
    for stride in (1, 2, 4, 8):
        e, m = error[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        x = (e[:, :, 1:] - e[:, :, :-1]).abs().clamp(max=100)[m[:, :, 1:] & m[:, :, :-1]]
        y = (e[:, 1:] - e[:, :-1]).abs().clamp(max=100)[m[:, 1:] & m[:, :-1]]
        if m.sum() >= 10:
            found.append(x.mean() + y.mean())
    return torch.stack(found).mean()


def weighed_gradient(error: Tensor, confidence: Tensor, valid: Tensor) -> Tensor:
    """VGGT's eq. of the paper: confidence times gradient, the sum over the number of pixels; no logarithm."""
    found = []
    for stride in (1, 2, 4, 8):
        e, m, c = (maps[:, ::stride, ::stride] for maps in (error, valid, confidence))
        x = ((e[:, :, 1:] - e[:, :, :-1]).abs() * c[:, :, 1:])[m[:, :, 1:] & m[:, :, :-1]]
        y = ((e[:, 1:] - e[:, :-1]).abs() * c[:, 1:])[m[:, 1:] & m[:, :-1]]
        found.append((x.sum() + y.sum()) / m.sum())
    return torch.stack(found).mean()


def cosine_by_hand(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
    """Eq. 5."""
    return torch.stack([(1 - F.cosine_similarity(student[b], teacher[b], dim=-1)).mean() for b in student]).mean()


@pytest.fixture(scope="module")
def targets() -> TeacherTargets:
    """Of a room, with holes: more than 1000 pixels are left."""
    room = room_targets()
    holes = torch.rand(room.valid.shape, generator=torch.Generator().manual_seed(5)) < 0.2
    return replace(room, valid=room.valid & ~holes)


def test_released_form(targets: TeacherTargets) -> None:
    prediction = guess(targets, RAW)
    ours = losses(RAW, prediction, targets)
    error, valid = prediction.depth - targets.depth, targets.valid
    pooled = {b: F.avg_pool2d(f[..., :6].movedim(-1, 1), 2).movedim(1, -1) for b, f in targets.features.items()}
    expected = pose_by_hand(prediction.camera, targets) | {
        "depth": trimmed(error.abs()[valid]),
        "depth_gradient": released_gradient(error, valid),
        "scale": (prediction.scale.log1p() - torch.tensor(1.5).log1p()).abs(),
        "alignment": cosine_by_hand(prediction.features, pooled),
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    assert objective_of(RAW).factors == {
        "translation": 2.5, "rotation": 2.5, "field_of_view": 1.25, "depth": 1, "depth_gradient": 1, "scale": 1,
        "alignment": 1,
    }  # fmt: skip


def test_paper_form(targets: TeacherTargets) -> None:
    """Eq. 3 with confidence and one logarithm, eq. 4 with plain logarithms, eq. 5 with whole, unpooled features."""
    prediction = guess(targets, PAPER)
    ours = losses(PAPER, prediction, targets)
    error, valid, confidence = prediction.depth - targets.depth, targets.valid, prediction.confidence
    expected = pose_by_hand(prediction.camera, targets) | {
        "depth_confidence": (error.abs() * confidence - 0.2 * confidence.log())[valid].mean(),
        "depth_gradient": weighed_gradient(error, confidence, valid),
        "scale": (prediction.scale.log() - torch.tensor(1.5).log()).abs(),
        "alignment": cosine_by_hand(prediction.features, dict(targets.features)),
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_released_form_with_a_confidence(targets: TeacherTargets) -> None:
    """It is trimmed like the error, and added to it."""
    config = replace(RAW, heads=replace(TINY, predict_confidence=True))
    prediction = guess(targets, config)
    ours = losses(config, prediction, targets)
    error, confidence = (prediction.depth - targets.depth).abs(), prediction.confidence
    expected = trimmed((error * confidence - 0.2 * confidence.log())[targets.valid])
    torch.testing.assert_close(ours["depth_confidence"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["depth"], trimmed(error[targets.valid]), rtol=1e-5, atol=1e-6)
    assert objective_of(config).factors["depth_confidence"] == 1


def test_silog(targets: TeacherTargets) -> None:
    config = only(replace(RAW, depth=DepthTerm(regression=0, gradient=0, silog=1)), "depth")
    prediction = guess(targets, config)
    d = (prediction.depth.log() - targets.depth.log())[targets.valid]
    expected = (d.square().mean() - 0.5 * d.mean().square() + 1e-6).sqrt()
    ours = losses(config, prediction._replace(camera=None, scale=None, features={}), targets)
    assert list(ours) == ["silog"]
    torch.testing.assert_close(ours["silog"], expected)


def test_relations_of_cells(targets: TeacherTargets) -> None:
    """3DRS: the cosines of all pairs of a frame's cells, of every layer."""
    config = replace(RAW, alignment=AlignmentTerm(weight=2, relational=0.5))
    prediction = guess(targets, config)
    found = []
    for block, student in prediction.features.items():
        teacher = F.avg_pool2d(targets.features[block][..., :6].movedim(-1, 1), 2).movedim(1, -1)
        s, t = (F.normalize(own.flatten(1, 2), dim=-1) for own in (student, teacher))
        found.append((s @ s.mT - t @ t.mT).abs().mean())
    torch.testing.assert_close(losses(config, prediction, targets)["relations"], torch.stack(found).mean())
    factors = objective_of(config).factors
    assert (factors["alignment"], factors["relations"]) == (2, 1)


def test_unsure_pixels_can_be_left_out(targets: TeacherTargets) -> None:
    """The least sure 40 %; and a clip of which too few are left does not count."""
    config = replace(RAW, depth=DepthTerm(filter_ratio=0.4))
    prediction = guess(targets, config)
    confidence = targets.confidence
    kept = targets.valid & (confidence >= confidence[targets.valid].quantile(0.4))
    assert kept.sum() == pytest.approx(0.6 * int(targets.valid.sum()), rel=0.01)
    expected = trimmed((prediction.depth - targets.depth).abs()[kept])
    torch.testing.assert_close(losses(config, prediction, targets)["depth"], expected)
    assert objective_of(config).needs.fields >= {"confidence"}
    assert "confidence" not in objective_of(RAW).needs.fields

    few = torch.zeros_like(targets.valid)
    few[0, 0, :50] = few[0, 1, :49] = True
    terms = objective_of(RAW).clip_terms(prediction, replace(targets, valid=few))
    assert all(value == count == 0 for name, (value, count) in terms.items() if name.startswith("depth"))
    few[0, 1, 49] = True
    assert objective_of(RAW).clip_terms(prediction, replace(targets, valid=few))["depth"][1] == 1


def test_unknown_scale_does_not_count(targets: TeacherTargets) -> None:
    prediction = guess(targets, RAW)
    for unknown in (torch.nan, torch.inf, 0.0):
        terms = objective_of(RAW).clip_terms(prediction, replace(targets, metric_scale=torch.tensor(unknown)))
        value, count = terms["scale"]
        assert value == count == 0
        (gradient,) = torch.autograd.grad(value, prediction.scale)
        assert gradient == 0


def test_frames_without_a_pose_do_not_count(targets: TeacherTargets) -> None:
    """Those of the data whose tracking was lost."""
    lost = targets.cam_to_world.clone()
    lost[1] = torch.nan
    prediction = guess(targets, RAW)
    expected = pose_by_hand(prediction.camera[[0, 2]], replace(targets, num_views=2, size=targets.size, depth=None,
        confidence=None, valid=None, features=None, cam_to_world=targets.cam_to_world[[0, 2]],
        intrinsics=targets.intrinsics[[0, 2]]))  # fmt: skip
    ours = losses(only(RAW, "camera"), prediction._replace(depth=None, scale=None, features={}),
                  replace(targets, cam_to_world=lost))  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_either_quaternion_of_a_rotation(targets: TeacherTargets) -> None:
    prediction = guess(targets, RAW)
    signs = torch.tensor([1.0] * 3 + [-1.0] * 4 + [1.0] * 2)
    turned = prediction._replace(camera=prediction.camera * signs)
    assert losses(RAW, prediction, targets)["rotation"] == losses(RAW, turned, targets)["rotation"]
    peers = replace(RAW, camera=CameraTerm(sign_invariant=False))
    assert losses(peers, turned, targets)["rotation"] > 2 * losses(peers, prediction, targets)["rotation"]


def test_a_far_translation_costs_the_limit(targets: TeacherTargets) -> None:
    prediction = guess(targets, RAW)
    far = prediction._replace(camera=prediction.camera + torch.tensor([1e6] + [0.0] * 8))
    assert 100 / 3 < losses(RAW, far, targets)["translation"] < 100 / 3 + 1
    assert losses(replace(RAW, camera=CameraTerm(limit=7.0)), far, targets)["translation"] < 8 / 3


def test_normalised_targets_know_no_unit(targets: TeacherTargets) -> None:
    """Lengths are in mean distances, metres per unit too; raw ones are the teacher's."""
    prediction = guess(targets, RELEASED)
    unit = targets.mean_distance
    expected = losses(RAW, prediction, targets.scaled(1 / unit))
    for other in (targets, targets.scaled(3.0)):
        ours = losses(RELEASED, prediction, other)
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    assert losses(RAW, prediction, targets)["depth"] < 0.9 * expected["depth"]


# ---- what there is --------------------------------------------------------------------------------------------------

GEOMETRY = {"cam_to_world", "intrinsics", "depth", "valid"}


@pytest.mark.parametrize(
    ("term", "raw", "normalised", "blocks"),
    [
        ("camera", {"cam_to_world", "intrinsics"}, GEOMETRY, ()),
        ("depth", {"depth", "valid"}, GEOMETRY, ()),
        ("scale", {"metric_scale"}, GEOMETRY | {"metric_scale"}, ()),
        ("alignment", set(), set(), FEATURES.blocks),
    ],
)
def test_a_term_without_weight_needs_nothing(term: str, raw: set[str], normalised: set[str], blocks: Any) -> None:
    """It has no head, no need and no entry in the report."""
    for config, fields in ((RAW, raw), (RELEASED, normalised)):
        objective = objective_of(only(config, term))
        assert (objective.needs.fields, objective.needs.blocks) == (fields, blocks)
        assert objective.module.config.terms == (term,)
        assert (objective.module.fit.features is None) == (term != "alignment")
        given = room_targets(views=2)
        unknown = {name: None for name in ("depth", "valid", "cam_to_world", "intrinsics", "metric_scale", "confidence")
                   if name not in fields}  # fmt: skip
        bare = replace(given, **unknown, features=given.features if blocks else None)
        assert objective.needs.missing(bare) == []
        model = SupervisedModel(Toy(), {"geovr": objective.module})
        report = objective(
            model(shapes=[ClipShape.of(bare)], frames=frames_of([bare])), SimpleNamespace(targets=[bare])
        )
        assert report.keys() == {f"geovr.{name}" for name in objective.factors}
        assert all(own.count == 1 for own in report.values())
        total(report).backward()


def test_heads_that_are_left_out_have_no_term() -> None:
    config = replace(RELEASED, heads=replace(TINY, terms=("depth", "scale")))
    assert objective_of(config).factors.keys() == {"depth", "depth_gradient", "scale"}


@pytest.mark.parametrize(
    ("config", "features", "message"),
    [
        (only(RELEASED), FEATURES, "objectives.geovr has no term"),
        (RELEASED, None, "none of the teachers gives features"),
        (replace(RELEASED, heads=replace(TINY, alignment_blocks=(9,))), FEATURES, "alignment_blocks"),
        (replace(RELEASED, depth=DepthTerm(weigh_gradient=True)), FEATURES, "the head predicts no confidence"),
        (replace(PAPER, depth=DepthTerm(confidence=0)), FEATURES, "geovr.depth.confidence is 0"),
    ],
)
def test_configs_that_make_no_sense(config: GeoVRConfig, features: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GeoVRObjective.build(config, Toy(), features)


def test_frames_and_targets_must_be_as_many(targets: TeacherTargets) -> None:
    prediction = guess(targets, RAW)
    for name in ("camera", "depth", "features"):
        alone = GeoVRPrediction(None, None, None, None, {})._replace(**{name: getattr(prediction, name)})
        with pytest.raises(ValueError, match="3 frames of tokens, targets of 2"):
            objective_of(RAW).clip_terms(alone, room_targets(views=2))


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_of_every_term() -> None:
    """Against finite differences, in float64 on a small map."""
    small = room_targets(views=2, size=(14, 14), cell=7).to(torch.float64)
    prediction = guess(small, EVERYTHING)
    objective = objective_of(EVERYTHING)
    blocks = tuple(prediction.features)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (*prediction[:4], *prediction.features.values())]

    def every_term(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = GeoVRPrediction(*tensors[:4], features=dict(zip(blocks, tensors[4:], strict=True)))
        terms = objective.clip_terms(named, small)
        assert terms.keys() == objective.factors.keys()
        return tuple(value for value, _ in terms.values())

    assert torch.autograd.gradcheck(every_term, leaves, fast_mode=True)


@pytest.mark.parametrize("family", ["ours", "ours-causal", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_term_reaches_the_model_and_no_target(family: str) -> None:
    """On tiny models of every family; of two samples one has targets."""
    kind = next(own for own in FAMILIES if own.name == family)
    samples = kind.samples[:2]
    given = room_targets(views=3, size=(56, 84))
    given = replace(
        given,
        depth=given.depth.clone().requires_grad_(),
        cam_to_world=given.cam_to_world.clone().requires_grad_(),
        metric_scale=torch.tensor(1.5, requires_grad=True),
        features={block: own.requires_grad_() for block, own in given.features.items()},
    )
    one_size = replace(samples[0], grids=((2, 3),) * 3)
    backbone = backbone_of(kind.model())
    for term, probed in (("camera", True), ("depth", False), ("scale", True), ("alignment", False)):
        objective = objective_of(only(EVERYTHING, term), backbone)
        model = SupervisedModel(backbone, {"geovr": objective.module})
        probes = (term == "camera", term == "scale") if probed else None
        inputs = kind.inputs([one_size, samples[1]], probes=probes)
        output = model(shapes=[ClipShape.of(given), None], **inputs)
        model.zero_grad()
        total(objective(output, SimpleNamespace(targets=[given, None]))).backward()
        weights = {name: own for name, own in backbone.model.named_parameters() if first_block(name)}
        assert weights
        assert all(own.grad is not None and own.grad.any() for own in weights.values())
        assert all(own.grad is not None and own.grad.isfinite().all() for own in objective.module.parameters())
        if probed:
            assert all(own.grad.any() for own in objective.module.aux.parameters())
        for tensor in (given.depth, given.cam_to_world, given.metric_scale, *given.features.values()):
            assert tensor.grad is None


def first_block(name: str) -> bool:
    """A weight that every hidden state behind the embeddings depends on."""
    return "layers.0." in name and ("v_proj.weight" in name) and "visual" not in name and ".geometric." not in name


@pytest.mark.parametrize("none", [(), (None, None)])
def test_without_targets_the_loss_is_zero_and_no_gradient_is_missing(none: Sequence[None]) -> None:
    """Nothing supervised in the batch; and a supervised clip in which nothing is valid."""
    objective = objective_of(EVERYTHING)
    model = SupervisedModel(Toy(), {"geovr": objective.module})
    empty = room_targets(views=2)
    empty = replace(
        empty,
        valid=torch.zeros_like(empty.valid),
        depth=torch.full_like(empty.depth, torch.nan),
        metric_scale=torch.tensor(torch.nan),
        cam_to_world=torch.full_like(empty.cam_to_world, torch.nan),
        features={block: torch.full_like(own, torch.nan) for block, own in empty.features.items()},
    )
    batch = list(none) or [empty]
    shapes = [own and ClipShape.of(own) for own in batch]
    report = objective(model(shapes=shapes, frames=frames_of(batch)), SimpleNamespace(targets=batch))
    assert report.keys() == {f"geovr.{name}" for name in objective.factors}
    nothing = {name: own for name, own in report.items() if none or own.count == 0}
    assert nothing.keys() >= {"geovr.depth", "geovr.silog", "geovr.scale", "geovr.alignment", "geovr.relations"}
    assert all(own.value == 0 for own in nothing.values())
    total(report).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("supervisions"):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert not none or not parameter.grad.any(), name


def test_a_batch_is_the_mean_over_its_clips() -> None:
    """Each term over the clips that have something to compare."""
    objective = objective_of(EVERYTHING)
    model = SupervisedModel(Toy(), {"geovr": objective.module})
    first, second = room_targets(views=2), room_targets(views=3, index=5)
    second = replace(second, metric_scale=torch.tensor(torch.nan))
    batch = [first, None, second]
    shapes = [own and ClipShape.of(own) for own in batch]
    output = model(shapes=shapes, frames=frames_of(batch))
    report = objective(output, SimpleNamespace(targets=batch))
    alone = [objective.clip_terms(output.predictions["geovr"][i], batch[i]) for i in (0, 2)]
    for name, (value, _) in alone[0].items():
        expected = value if name == "scale" else (value + alone[1][name][0]) / 2
        torch.testing.assert_close(report[f"geovr.{name}"].value, expected)
        assert report[f"geovr.{name}"].count == (1 if name == "scale" else 2)


def test_one_clip_is_learned_by_heart() -> None:
    """Four frames of a room through a toy decoder: errors of depth and pose fall to a tenth."""
    room = room_targets(views=4, features=None, index=5)
    config = replace(RELEASED, heads=replace(TINY, dpt_levels=(32,) * 4, dpt_dim=32))
    objective = objective_of(only(config, "camera", "depth", "scale"), backbone := Toy(width=32, num_layers=2))
    model = SupervisedModel(backbone, {"geovr": objective.module})
    optimizer = torch.optim.Adam(model.parameters())
    true = room.normalised().in_first_camera()
    steps, depth_errors, pose_errors = 120, [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        output = model(shapes=[ClipShape.of(room)], frames=frames_of([room]))
        (prediction,) = output.predictions["geovr"]
        depth_errors.append(((prediction.depth - true.depth).abs() / true.depth)[true.valid].mean().item())
        pose_errors.append((prediction.camera - true.pose_encoding).abs().mean().item())
        optimizer.zero_grad()
        total(objective(output, SimpleNamespace(targets=[room]))).backward()
        optimizer.step()
    assert depth_errors[-1] < depth_errors[0] / 10
    assert pose_errors[-1] < pose_errors[0] / 10
    scene = GeoVRLifting(objective.module).scene(prediction)
    points = apply_rigid(scene.cam_to_world, unproject(scene.depth, scene.intrinsics))
    distance = (points - true.world_points).norm(dim=-1)[true.valid].mean()
    assert distance < 0.1  # in mean distances of the points


def test_the_module_is_for_the_backbone() -> None:
    objective = objective_of(RELEASED, backbone := Toy(width=24, num_layers=6))
    assert isinstance(objective.module, GeoVR)
    assert objective.module.fit == Fit.of(backbone, FEATURES)
