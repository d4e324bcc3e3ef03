"""All supervisions at once on a tiny model of every backbone family: twenty steps, and what they leave untouched."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from g2vlm.supervision.backbones import backbone_of
from g2vlm.supervision.base import ClipShape, SupervisedModel, TeacherFeatures
from g2vlm.supervision.geovr import GeoVRHeads
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from tests.g2vlm.supervision.taps import families
from tests.g2vlm.supervision.vlms import OURS, Family, Sample
from tests.train.clips import GASP, GEOVR, LIFTING, SMALL_HEADS, SPATIALSV
from train.objectives.base import SupervisionObjective
from train.objectives.gasp import GASPObjective
from train.objectives.geovr import AlignmentTerm, GeoVRObjective
from train.objectives.spatialsv import SpatialSVObjective

FEATURES = TeacherFeatures(blocks=(0, 1), depth=2, dim=6)
HEADS: GeoVRHeads = replace(SMALL_HEADS, teacher_half="both", teacher_pool=1)
SIZE = (28, 28)


@dataclass(frozen=True)
class Clips:
    """What objectives are compared with."""

    targets: tuple[TeacherTargets | None, ...]


def clip_targets(num_views: int) -> TeacherTargets:
    """A wall seen by cameras that move sideways, with features of a teacher."""
    generator = torch.Generator().manual_seed(num_views)
    poses = torch.eye(4).repeat(num_views, 1, 1)
    poses[:, 0, 3] = 0.2 * torch.arange(num_views)
    intrinsics = torch.tensor([[30.0, 0, 14], [0, 30, 14], [0, 0, 1]]).repeat(num_views, 1, 1)
    return TeacherTargets(
        num_views=num_views,
        size=SIZE,
        info=TeacherInfo("wall", "1", SIZE, cell_size=14),
        depth=2 + torch.linspace(0, 1, SIZE[1]).expand(num_views, *SIZE),
        valid=torch.ones(num_views, *SIZE, dtype=torch.bool),
        cam_to_world=poses,
        intrinsics=intrinsics,
        metric_scale=torch.tensor(1.5),
        features={block: torch.randn(num_views, 2, 2, 6, generator=generator) for block in FEATURES.blocks},
    )


def objectives_for(backbone: Any) -> list[SupervisionObjective]:
    torch.manual_seed(0)
    return [
        GeoVRObjective.build(replace(GEOVR, heads=HEADS, alignment=AlignmentTerm()), backbone, FEATURES),
        GASPObjective.build(GASP, backbone),
        SpatialSVObjective.build(replace(SPATIALSV, heads=replace(LIFTING, distill=True)), backbone, FEATURES),
    ]


def samples_of(family: Family) -> list[Sample]:
    """Two clips of three frames of one size, and text alone where a batch can have it."""
    grid, video = family.grids[-1:] * 3, family.kinds[-1]
    clips = [Sample(grid, video), Sample(grid, video, before=(25,), after=(40, 41))]
    return clips if family.one_length or family.name in OURS else [*clips, Sample(())]


@families
def test_twenty_steps_on_every_backbone(family: Family) -> None:
    """The sum of all terms and the language loss falls, every clip counts, and the model has nothing added to it."""
    plain = family.model()
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    modules = [type(module) for module in plain.modules()]
    samples = samples_of(family)
    inputs = family.inputs(samples, probes=(True, True))
    targets = tuple(clip_targets(len(own.grids)) if own.grids else None for own in samples)
    backbone = backbone_of(plain)
    objectives = objectives_for(backbone)
    model = SupervisedModel(backbone, {own.name: own.module for own in objectives}).train()
    if family.name in OURS:
        model.double()
    batch = Clips(targets)
    shapes = [None if own is None else ClipShape.of(own) for own in targets]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals: list[float] = []
    for _ in range(20):
        output = model(shapes=shapes, **inputs)
        terms = {name: term for own in objectives for name, term in own(output, batch).items()}
        language = F.cross_entropy(output.logits.float().flatten(0, -2), output.targets.flatten())
        total = language + torch.stack([term.value.float() * term.factor for term in terms.values()]).sum()
        totals.append(total.item())
        assert all(term.count == 2 for term in terms.values() if term.factor), family.name
        optimizer.zero_grad()
        total.backward()
        assert all(own.grad is not None for own in model.supervisions.parameters())
        optimizer.step()
    assert totals[-1] < 0.8 * totals[0]
    assert [type(module) for module in plain.modules()] == modules
    assert plain.state_dict().keys() == weights.keys()
    plain.load_state_dict(weights)  # the tiny models are shared between tests
