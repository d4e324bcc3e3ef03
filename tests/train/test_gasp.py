"""GASP's objective against slow loops, at its limits, and on a clip that a small decoder learns by heart."""

from dataclasses import replace
from functools import cache
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.supervision.backbones import backbone_of
from g2vlm.supervision.base import ClipShape, SupervisedModel
from g2vlm.supervision.gasp import GASP, GASPHeads
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.ground_truth import targets_of_scene
from geometry.correspondence import TrackRule, Tracks, cell_coordinates, cell_index, grid_tracks
from geometry.matching import best_cells
from geometry.metrics.matching import match_metrics
from tests.g2vlm.supervision.taps import of
from tests.g2vlm.supervision.vlms import FAMILIES, Sample
from train.objectives.base import tensors_of
from train.objectives.gasp import ANCHOR, GASPConfig, GASPObjective, capped, known_depth

F64 = torch.float64
GRID, WIDTH, LAYERS = (3, 4), 5, 2
CONFIG = GASPConfig(temperature=0.2, tracks=TrackRule(grids=((2, 3), (4, 5))))


@cache
def room(num_views: int, size: tuple[int, int], seed: int = 0) -> TeacherTargets:
    """Exact targets of a room."""
    targets = targets_of_scene(RoomsSource("tiny", cameras="near").load(seed, ViewRequest(num_views, size, seed)))
    assert targets is not None
    return targets


def clip(seed: int = 0) -> TeacherTargets:
    """Four views, some depth of which is unknown: whole cells, and pixels everywhere."""
    targets = room(4, (56, 84), seed)
    assert targets.valid is not None
    known = torch.rand(4, 56, 84, generator=torch.Generator().manual_seed(seed)) < 0.9
    known[:, :19, :22] = False  # the first cell
    return replace(targets, valid=targets.valid & known)


def objective(config: GASPConfig = CONFIG) -> GASPObjective:
    """For embeddings made by hand; its heads are not used."""
    _, backbone, _ = of("qwen2_vl")
    return GASPObjective.build(replace(config, heads=GASPHeads(embed_dim=WIDTH)), backbone)


def random_embeddings(frames: int = 4, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(LAYERS, frames, *GRID, WIDTH, dtype=dtype, requires_grad=True)


def tracks_of(targets: TeacherTargets, config: GASPConfig) -> Tracks:
    assert targets.intrinsics is not None
    return grid_tracks(known_depth(targets, 0)[0], targets.intrinsics, targets.world_to_cam, config.tracks)


def depths_of(targets: TeacherTargets) -> dict[tuple[int, int], float]:
    """Mean depth of the valid pixels of every cell (frame, cell) that has any, pixel by pixel."""
    assert targets.depth is not None
    assert targets.valid is not None
    (height, width), (rows, columns), found = targets.size, GRID, {}
    depth, valid = targets.depth.tolist(), targets.valid.tolist()
    for f, y, x in product(range(targets.num_views), range(height), range(width)):
        if valid[f][y][x]:
            cell = int((y + 0.5) * rows / height) * columns + int((x + 0.5) * columns / width)
            found.setdefault((f, cell), []).append(depth[f][y][x])
    return {place: sum(own) / len(own) for place, own in found.items()}


def slow(embeddings: Tensor, targets: TeacherTargets, config: GASPConfig) -> tuple[Tensor, Tensor]:
    """Both terms, layer by layer, anchor by anchor, frame by frame, candidate by candidate."""
    tracks, (rows, columns) = tracks_of(targets, config), GRID
    (height, width), (num_frames, patches) = targets.size, (targets.num_views, rows * columns)
    depths = depths_of(targets)
    contrast, errors = [], []
    for layer in embeddings:
        unit = F.normalize(layer.flatten(1, 2), dim=-1)
        for track in range(tracks.visible.shape[1]):
            shows: dict[int, tuple[int, int]] = {}
            for frame in range(num_frames):
                if tracks.visible[frame, track]:
                    x, y = tracks.points[frame, track].tolist()
                    cell = int((y + 0.5) * rows / height) * columns + int((x + 0.5) * columns / width)
                    shows[frame] = (frame, cell)
            if ANCHOR not in shows:
                continue
            anchor = unit[shows[ANCHOR]]
            for frame, match in shows.items():
                if frame == ANCHOR:
                    continue
                frames = [frame] if config.negatives == "target_frame" else range(num_frames)
                own = set(shows.values()) if config.mask_same_track else {shows[ANCHOR], match}
                others = [(f, p) for f in frames for p in range(patches) if (f, p) not in own]
                logits = torch.stack([unit[place] @ anchor for place in (match, *others)]) / config.temperature
                contrast.append(-logits.log_softmax(0)[0])
                deep = [place for place in depths if place[0] == frame]
                weights = (torch.stack([unit[place] @ anchor for place in deep]) / config.temperature).softmax(0)
                expected = weights @ torch.tensor([depths[place] for place in deep], dtype=unit.dtype)
                true = tracks.depth[frame, track].to(unit.dtype)
                errors.append((true - expected).abs() / (true + expected + config.epsilon))
    return torch.stack(contrast).mean(), torch.stack(errors).mean()


def values(embeddings: Tensor, targets: TeacherTargets, config: GASPConfig = CONFIG) -> tuple[Tensor, Tensor]:
    terms = objective(config).clip_terms(embeddings, targets)
    return terms["correspondence"][0], terms["depth"][0]


@pytest.mark.parametrize(
    "changes", [{}, {"negatives": "target_frame"}, {"mask_same_track": False}], ids=["default", "equation", "unmasked"]
)
def test_terms_against_loops_over_every_anchor(changes: dict[str, Any]) -> None:
    config, targets, embeddings = replace(CONFIG, **changes), clip(), random_embeddings()
    terms = objective(config).clip_terms(embeddings, targets)
    contrast, error = slow(embeddings, targets, config)
    torch.testing.assert_close(terms["correspondence"][0], contrast)
    torch.testing.assert_close(terms["depth"][0], error, atol=1e-6, rtol=1e-6)  # depths are float32
    assert [float(count) for _, count in terms.values()] == [1, 1]
    ours = torch.autograd.grad(terms["correspondence"][0], embeddings)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(contrast, embeddings)[0])


def test_order_of_the_other_frames_does_not_matter() -> None:
    targets, embeddings = clip(), random_embeddings()
    order = torch.tensor([0, 2, 3, 1])
    fields = {n: value[order] for n in ("depth", "valid", "cam_to_world", "intrinsics")
              if (value := getattr(targets, n)) is not None}  # fmt: skip
    for straight, turned in zip(
        values(embeddings, targets), values(embeddings[:, order], replace(targets, **fields)), strict=True
    ):
        torch.testing.assert_close(straight, turned)


def test_the_anchor_is_the_first_frame() -> None:
    targets, embeddings = clip(), random_embeddings()
    assert targets.valid is not None
    hidden = targets.valid.clone()
    hidden[0] = False
    terms = objective().clip_terms(embeddings, replace(targets, valid=hidden))
    assert [(value.item(), count.item()) for value, count in terms.values()] == [(0, 0), (0, 0)]


def test_scale_of_the_scene_does_not_matter() -> None:
    targets, embeddings = clip(), random_embeddings()
    for metric, large in zip(values(embeddings, targets), values(embeddings, targets.scaled(7.0)), strict=True):
        torch.testing.assert_close(metric, large, rtol=1e-5, atol=1e-6)


def test_temperature_towards_zero_expects_the_depth_of_the_best_cell() -> None:
    targets, config = clip(), replace(CONFIG, temperature=1e-6)
    embeddings = random_embeddings().detach()[:1]
    unit = F.normalize(embeddings[0].flatten(1, 2), dim=-1)
    tracks, depths, errors = tracks_of(targets, config), depths_of(targets), []
    for frame in range(1, 4):
        for track in (tracks.visible[0] & tracks.visible[frame]).nonzero().flatten().tolist():
            x, y = cell_coordinates(tracks.points[0, track], targets.size, GRID).round().long().tolist()
            cosines = (unit[frame] @ unit[0, y * 4 + x]).tolist()
            best = max((cell for cell in range(12) if (frame, cell) in depths), key=cosines.__getitem__)
            expected, true = depths[frame, best], float(tracks.depth[frame, track])
            errors.append(abs(true - expected) / (true + expected))
    assert values(embeddings, targets, config)[1].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_what_is_unknown_contributes_nothing() -> None:
    targets, embeddings = clip(), random_embeddings()
    assert targets.depth is not None
    assert targets.valid is not None
    for junk in (torch.nan, 0.0, 3.0):
        changed = replace(targets, depth=torch.where(targets.valid, targets.depth, junk))
        for before, after in zip(values(embeddings, targets), values(embeddings, changed), strict=True):
            assert after.item() == before.item()


def test_doubtful_depth_does_not_count() -> None:
    targets, embeddings = clip(), random_embeddings()
    assert targets.valid is not None
    doubtful = torch.rand(targets.valid.shape) < 0.3
    confident = replace(targets, confidence=torch.where(doubtful, 1.2, 2.0))
    less = replace(targets, valid=targets.valid & ~doubtful)
    strict = replace(CONFIG, min_confidence=1.5)
    for ours, right in zip(values(embeddings, confident, strict), values(embeddings, less), strict=True):
        assert ours.item() == right.item()
    assert values(embeddings, confident)[0].item() == values(embeddings, targets)[0].item()


@pytest.mark.parametrize("case", ["apart", "one frame"])
def test_a_clip_without_a_match_is_zero_with_gradients(case: str) -> None:
    """Cameras back to back, and a clip of a single frame."""
    if case == "apart":
        targets = room(2, (56, 84))
        assert targets.cam_to_world is not None
        away = torch.diag(torch.tensor([-1.0, 1, -1, 1]))
        targets = replace(targets, cam_to_world=torch.stack([torch.eye(4), away]))
    else:
        targets = room(1, (56, 84))
    embeddings = random_embeddings(targets.num_views)
    for value, count in objective().clip_terms(embeddings, targets).values():
        assert (value.item(), count.item()) == (0, 0)
        gradient = torch.autograd.grad(value, embeddings, retain_graph=True)[0]
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_half_precision_around_it_changes_nothing() -> None:
    targets, embeddings = clip(), random_embeddings(dtype=torch.float32)
    plain = values(embeddings, targets)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values(embeddings, targets)
    for left, right in zip(plain, inside, strict=True):
        assert left.item() == right.item()


def test_targets_of_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="4 frames for embeddings of 3"):
        objective().clip_terms(random_embeddings(3), clip())


# ---- the cap --------------------------------------------------------------------------------------------------------


def numbered(visible: Tensor) -> Tracks:
    """Tracks whose depth is their number."""
    number = torch.arange(visible.shape[1], dtype=F64).expand(visible.shape)
    return Tracks(torch.stack([number, number], -1), number, visible, visible)


@pytest.mark.parametrize("most", [1, 7, 40, 99, 100, 300])
def test_the_cap_spreads_over_the_useful_tracks(most: int) -> None:
    visible = torch.rand(3, 100) < 0.6
    tracks = numbered(visible)
    numbers = capped(tracks, most).depth[0].long().tolist()
    useful = tracks.useful(ANCHOR).nonzero().flatten().tolist()
    expected = [useful[i * len(useful) // most] for i in range(most)] if most < len(useful) else useful
    assert len(set(numbers)) == len(numbers) == min(most, 100)
    assert numbers[: len(expected)] == expected if most < 100 else numbers == list(range(100))
    assert torch.equal(capped(tracks, most).visible, visible[:, numbers])


def test_a_cap_takes_the_mean_over_fewer_anchors() -> None:
    targets, embeddings = clip(), random_embeddings()
    every = values(embeddings, targets)
    few = [values(embeddings, targets, replace(CONFIG, max_anchors=most)) for most in (3, 3, 10**6)]
    assert few[0][0].item() == few[1][0].item() != every[0].item()
    assert few[2][0].item() == every[0].item()


# ---- a model --------------------------------------------------------------------------------------------------------


def supervised(name: str, config: GASPConfig) -> tuple[SupervisedModel, GASPObjective]:
    """The model of a family in single precision, its gradients on."""
    _, backbone, _ = of(name)
    model: Any = backbone.model
    backbone = backbone_of(model.float().requires_grad_())
    gasp = GASPObjective.build(config, backbone)
    return SupervisedModel(backbone, {"gasp": gasp.module}), gasp


def batch_of(name: str, frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    """One clip of images, and a text."""
    family = next(family for family in FAMILIES if family.name == name)
    inputs = family.inputs([Sample((grid,) * frames), Sample((), after=(30, 31))])
    return {
        key: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("term", ["correspondence", "depth"])
def test_each_term_reaches_backbone_and_heads(term: str) -> None:
    model, gasp = supervised("qwen2_vl", GASPConfig(heads=GASPHeads(embed_dim=8)))
    targets = (room(4, (84, 112)), None)
    output = model(shapes=[ClipShape.of(targets[0]), None], **batch_of("qwen2_vl", 4, (3, 4)))
    report = gasp(output, SimpleNamespace(targets=targets))
    assert set(report) == {"gasp.correspondence", "gasp.depth"}
    assert output.predictions["gasp"][1] is None
    report[f"gasp.{term}"].value.backward()
    backbone: Any = model.backbone
    trained = [f"layers.{block}.self_attn.v_proj.weight" for block in range(backbone.num_layers)]
    for name in trained:
        gradient = backbone.decoder.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
    for name, parameter in gasp.module.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0, name


def test_a_batch_without_targets_keeps_all_heads_in_the_graph() -> None:
    model, gasp = supervised("qwen2_vl", GASPConfig(heads=GASPHeads(embed_dim=8)))
    output = model(shapes=[None, None], **batch_of("qwen2_vl", 2, (2, 3)))
    report = gasp(output, SimpleNamespace(targets=(None, None)))
    total = torch.stack([term.value for term in report.values()]).sum()
    assert total.item() == sum(term.count.item() for term in report.values()) == 0
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in gasp.module.parameters())
    assert list(tensors_of(output.predictions))


def test_terms_are_means_over_the_clips_with_matches() -> None:
    """A clip without any match counts nothing, however long it is."""
    gasp = objective(CONFIG)
    lone = replace(clip(1), valid=torch.zeros(4, 56, 84, dtype=torch.bool))
    clips = (clip(0), None, lone, clip(1))
    predictions = tuple(None if own is None else random_embeddings() for own in clips)
    report = gasp(SimpleNamespace(predictions={"gasp": predictions}), SimpleNamespace(targets=clips))
    for place, name in enumerate(("correspondence", "depth")):
        single = [values(predictions[i], clips[i])[place] for i in (0, 3)]  # pyright: ignore[reportArgumentType]
        term = report[f"gasp.{name}"]
        torch.testing.assert_close(term.value, torch.stack(single).mean())
        assert (term.count.item(), term.factor) == (2, 1.0)


def test_weights_are_the_factors_of_the_terms() -> None:
    _, backbone, _ = of("qwen2_vl")
    gasp = GASPObjective.build(GASPConfig(heads=GASPHeads(embed_dim=4), correspondence=0.5, depth=0.25), backbone)
    assert gasp.factors == {"correspondence": 0.5, "depth": 0.25}
    assert gasp.needs.missing(room(1, (28, 28))) == []
    assert gasp.needs.missing(replace(room(1, (28, 28)), cam_to_world=None, depth=None)) == ["cam_to_world", "depth"]


def test_heads_start_from_the_backbone() -> None:
    """`build` takes the start of `GASP.initialise`."""
    _, backbone, _ = of("llava_onevision")
    gasp = GASPObjective.build(GASPConfig(heads=GASPHeads(embed_dim=4)), backbone)
    expected = GASP(gasp.config.heads, gasp.module.fit)
    expected.initialise(backbone)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), gasp.module.parameters(), strict=True))


# ---- learning -------------------------------------------------------------------------------------------------------


def correct_keypoints(embeddings: Tensor, targets: TeacherTargets, rule: TrackRule) -> float:
    """PCK@2 of the most similar cells, embeddings (T, h, w, r)."""
    assert targets.intrinsics is not None
    tracks = grid_tracks(known_depth(targets, 0)[0], targets.intrinsics, targets.world_to_cam, rule)
    grid = embeddings.shape[1], embeddings.shape[2]
    unit = F.normalize(embeddings, dim=-1).flatten(1, 2)
    anchors = unit[0, cell_index(tracks.points[0], targets.size, grid)]  # (K, r)
    found = best_cells(anchors @ unit[1:].mT, grid[1])
    places = cell_coordinates(tracks.points[1:], targets.size, grid)
    return match_metrics(found.double(), places.double(), tracks.visible[0] & tracks.visible[1:]).pck


def test_a_clip_is_learned_by_heart() -> None:
    """A small decoder over random pixels: nothing but what it is told says which patches belong together.

    One point for every patch; of several in a patch, those that part on the way cannot all be found.
    """
    targets, name, grid = room(3, (112, 112), 3), "qwen2_vl", (7, 7)
    rule = TrackRule(grids=(grid,))
    model, gasp = supervised(name, GASPConfig(heads=GASPHeads(embed_dim=16), tracks=rule))
    inputs, shapes = batch_of(name, 3, grid), [ClipShape.of(targets), None]
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)

    def step() -> tuple[Tensor, Tensor]:
        output = model(shapes=shapes, **inputs)
        report = gasp(output, SimpleNamespace(targets=(targets, None)))
        loss = torch.stack([term.value * term.factor for term in report.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), output.predictions["gasp"][0].detach()

    first, before = step()
    last, after = [step() for _ in range(25)][-1]
    assert max(correct_keypoints(layer, targets, rule) for layer in before) < 0.5
    assert min(correct_keypoints(layer, targets, rule) for layer in after) > 0.99
    assert last < 0.2 * first
