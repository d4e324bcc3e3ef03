"""A decoder of a few attention layers on random tokens, and exact targets of rooms: supervision without a VLM."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.sequence import Grid
from g2vlm.supervision.backbones.base import Tapped, Taps
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets

FEATURES = TeacherFeatures(blocks=(1, 3, 5, 7), depth=8, dim=12)


class Toy(nn.Module):
    """As a `Backbone`: every sample's frames become the same tokens again and again, one learned vector for each."""

    def __init__(self, width: int = 16, num_layers: int = 4, tokens: int = 64):
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(num_layers)
        ]
        self.model = nn.ModuleList(layers)
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.register_buffer("positions", torch.randn(2 * tokens, width))  # tell the camera tokens apart
        self.width, self.num_layers = width, num_layers

    def forward(self, inputs: Mapping[str, Any], taps: Taps) -> Tapped:
        """`inputs["frames"]`: the grids of every sample."""
        frames = tuple(inputs["frames"])
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in taps.hidden}
        camera, scale = [], []
        for grids in frames:
            count = sum(rows * columns for rows, columns in grids)
            states = self.embedding[:count]
            if taps.probes is not None:
                states = torch.cat([states, taps.probes.embeddings(len(grids))])
            states = states + self.positions[: len(states)]
            for layer in range(self.num_layers + 1):
                if layer in hidden:
                    hidden[layer].append(states[:count])
                if layer < self.num_layers and len(states):
                    states = self.model[layer](states[None])[0]
            if taps.probes is not None:
                own_camera, own_scale = taps.probes.split((states[count:],))
                camera += own_camera or ()
                scale += own_scale or ()
        return Tapped(
            logits=self.embedding,
            targets=None,
            frames=frames,
            hidden={layer: tuple(own) for layer, own in hidden.items()},
            camera=tuple(camera) or None,
            scale=tuple(scale) or None,
        )

    def query_projection(self, layer: int) -> Any:
        raise NotImplementedError


def room_targets(
    views: int = 3, size: Grid = (28, 56), features: TeacherFeatures | None = FEATURES, cell: int = 14, index: int = 3
) -> TeacherTargets:
    """Everything about a room whose world is not its first camera."""
    sample = RoomsSource().load(index, ViewRequest(views, size, seed=0))
    assert sample.depth is not None
    assert sample.valid is not None
    generator = torch.Generator().manual_seed(index)
    grid = size[0] // cell, size[1] // cell
    drawn = None
    if features is not None:
        drawn = {block: torch.randn(views, *grid, features.dim, generator=generator) for block in features.blocks}
    return TeacherTargets(
        num_views=views,
        size=size,
        info=TeacherInfo("exact", "1", size, cell),
        depth=sample.depth,
        confidence=1 + torch.rand(views, *size, generator=generator),
        valid=sample.valid,
        cam_to_world=sample.cam_to_world,
        intrinsics=sample.intrinsics,
        features=drawn,
        metric_scale=torch.tensor(1.5),
    )


def frames_of(targets: Sequence[TeacherTargets | None], grid: Grid = (1, 2)) -> list[tuple[Grid, ...]]:
    """Frames of one grid for every sample; one frame without targets."""
    return [(grid,) * (1 if own is None else own.num_views) for own in targets]
