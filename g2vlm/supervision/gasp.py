"""GASP's heads: after every decoder block, embeddings of the patches that are alike where patches show the same point.

Shapes: B samples, T frames of a sample, h x w tokens of a frame, d width, r of an embedding, L blocks, N of them with a
head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from g2vlm.supervision.backbones.base import Backbone, PerSample, Tapped, Taps, clip
from g2vlm.supervision.base import ClipShape, Fit, Heads, Supervision
from g2vlm.supervision.heads import CorrespondenceHead, init_from_query


@dataclass(frozen=True)
class GASPHeads:
    """Where heads are, and how they start.

    Args:
        blocks: numbers of the blocks with a head, from 1; null: all of them.
        embed_dim: r.
        layer_source: whose query projection a head starts from: `same`: its own block's; `next`: the following
            block's, which is the one that reads what the head reads (the last block has but its own).
        norm_eps: of the heads' RMSNorm, as in the blocks.
    """

    blocks: tuple[int, ...] | None = None
    embed_dim: int = 256
    layer_source: Literal["same", "next"] = "same"
    norm_eps: float = 1e-6


class _BlockHeads(Heads):
    """One correspondence head per block.

    Args:
        width: d.
        num_layers: L.
        blocks: numbers of the blocks.
        config: of the heads.
    """

    def __init__(self, width: int, num_layers: int, blocks: Sequence[int], config: GASPHeads):
        super().__init__()
        self.num_layers = num_layers
        heads = {str(block): CorrespondenceHead(width, config.embed_dim, config.norm_eps) for block in blocks}
        self.by_block = nn.ModuleDict(heads)

    def forward(self, tapped: Tapped, shapes: Sequence[ClipShape | None]) -> tuple[Tensor | None, ...]:
        """Embeddings (N, T, h, w, r) float32 of every sample with a shape, not normalised; None for the others.

        Raises:
            ValueError: a sample with a shape has no frames, or frames of different sizes.
        """
        wanted = [sample for sample, shape in enumerate(shapes) if shape is not None]
        lengths = [sum(rows * columns for rows, columns in tapped.frames[sample]) for sample in wanted]
        layers = []
        for block, head in self.by_block.items():
            states = _output_of(tapped, int(block), self.num_layers)
            layers.append(head(torch.cat([states[sample] for sample in wanted])))
        embeddings = torch.stack(layers, dim=1).split(lengths)  # (n, N, r) of each sample
        found = {
            sample: clip(own, tapped.frames[sample]).movedim(3, 0)
            for sample, own in zip(wanted, embeddings, strict=True)
        }
        return tuple(found.get(sample) for sample in range(len(shapes)))


class GASP(Supervision):
    """Correspondence heads on the outputs of decoder blocks, the last one's before the final norm: no block has that.

    Raises:
        ValueError: a block that the backbone does not have, or no block.
    """

    config: GASPHeads
    heads: _BlockHeads

    def __init__(self, config: GASPHeads, fit: Fit):
        blocks = tuple(range(1, fit.num_layers + 1)) if config.blocks is None else tuple(config.blocks)
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f"GASPHeads.blocks is {blocks}; it must name blocks, each once")
        Taps(attention=blocks).check(fit.num_layers)
        self.blocks = blocks
        super().__init__(config, fit, _BlockHeads(fit.width, fit.num_layers, blocks, config))

    @property
    def taps(self) -> Taps:
        """The outputs of the blocks."""
        last = self.fit.num_layers
        return Taps(hidden=tuple(block for block in self.blocks if block < last), raw_last=last in self.blocks)

    def initialise(self, backbone: Backbone) -> None:
        """Start every head as the queries of a block, seen along their strongest directions (`init_from_query`)."""
        for block in self.blocks:
            source = block if self.config.layer_source == "same" else min(block + 1, self.fit.num_layers)
            query = backbone.query_projection(source)
            head = self.heads.by_block[str(block)]
            assert isinstance(head, CorrespondenceHead)
            init_from_query(head, query.weight, query.bias, query.input_norm.weight)


def _output_of(tapped: Tapped, block: int, num_layers: int) -> PerSample:
    """What a block gave, (n, d) per sample."""
    if block < num_layers:
        return tapped.hidden[block]
    assert tapped.raw_last is not None
    return tapped.raw_last
