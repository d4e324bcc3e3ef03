"""GASP's heads on every backbone: what they read, how they start, and that all samples go through a head together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.supervision.backbones import Tapped, Taps, backbone_of
from g2vlm.supervision.base import ClipShape, Fit
from g2vlm.supervision.gasp import GASP, GASPHeads
from g2vlm.supervision.heads import CorrespondenceHead, query_basis
from tests.g2vlm.supervision.taps import families, of
from tests.g2vlm.supervision.vlms import Family

SHAPE = ClipShape((28, 28))
RANK = 6


def tap(backbone: Any, inputs: Any, gasp: GASP, **more: Any) -> Tapped:
    with torch.no_grad():
        return backbone(inputs, gasp.taps | Taps(**more))


def one_size(tapped: Tapped) -> list[ClipShape | None]:
    """A shape for every sample whose frames have one size."""
    return [SHAPE if len(set(grids)) == 1 else None for grids in tapped.frames]


def gasp_for(backbone: Any, **config: Any) -> GASP:
    """Started, in the norm of the backbone's blocks."""
    eps = backbone.query_projection(1).input_norm.eps
    gasp = GASP(GASPHeads(**{"embed_dim": RANK, "norm_eps": eps, **config}), Fit.of(backbone))
    gasp.initialise(backbone)
    return gasp


def queries_seen(backbone: Any, states: Tensor, block: int) -> Tensor:
    """The queries that a block makes of states (n, d), along their strongest directions: (n, r) float64."""
    query = backbone.query_projection(block)
    x = states.double()
    normed = query.input_norm.weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + query.input_norm.eps).sqrt()
    bias = 0 if query.bias is None else query.bias.double()
    return (normed @ query.weight.double().T + bias) @ query_basis(query.weight, RANK)


def close(ours: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(ours.double(), right, atol=1e-4 * right.abs().max().item(), rtol=0)


@families
@pytest.mark.parametrize("source", ["same", "next"])
def test_heads_start_as_queries_seen_along_their_strongest_directions(family: Family, source: str) -> None:
    """E = Q U_r of the block itself or of the next one, on every block's output."""
    backbone, inputs = backbone_of(family.model()), family.inputs(family.samples)
    gasp, last = gasp_for(backbone, layer_source=source), backbone.num_layers
    tapped = tap(backbone, inputs, gasp)
    shapes = one_size(tapped)
    found = gasp.heads(tapped, shapes)
    assert [own is None for own in found] == [shape is None for shape in shapes]
    assert any(shapes)
    for sample, embeddings in enumerate(found):
        if embeddings is None:
            continue
        frames, (rows, columns) = len(tapped.frames[sample]), tapped.frames[sample][0]
        assert embeddings.shape == (last, frames, rows, columns, RANK)
        assert embeddings.dtype == torch.float32
        for block in range(1, last + 1):
            assert tapped.raw_last is not None
            states = tapped.hidden[block] if block < last else tapped.raw_last
            reads = block if source == "same" else min(block + 1, last)
            close(embeddings[block - 1].flatten(0, 2), queries_seen(backbone, states[sample], reads))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava_next_video", "llava_onevision", "internvl"])
def test_started_from_the_next_block_a_head_gives_the_queries_that_block_makes(name: str) -> None:
    """Of models that norm no queries: those that the attention was given, recorded in the forward itself."""
    _, backbone, inputs = of(name)
    gasp = gasp_for(backbone, layer_source="next", blocks=(1,))
    tapped = tap(backbone, inputs, gasp, attention=(2,))
    basis = query_basis(backbone.query_projection(2).weight, RANK)
    for sample, embeddings in enumerate(gasp.heads(tapped, one_size(tapped))):
        if embeddings is not None:
            queries = tapped.queries[2].before_rotary[sample].flatten(1).double()
            close(embeddings[0].flatten(0, 2), queries @ basis)


def test_only_the_blocks_asked_for_are_read() -> None:
    _, backbone, inputs = of("qwen2_vl")
    last = backbone.num_layers
    gasp = gasp_for(backbone, blocks=(1, last))
    assert gasp.taps == Taps(hidden=(1,), raw_last=True)
    assert gasp_for(backbone, blocks=(1,)).taps == Taps(hidden=(1,))
    every = gasp_for(backbone)
    assert every.taps == Taps(hidden=tuple(range(1, last)), raw_last=True)
    tapped = tap(backbone, inputs, every)
    shapes = one_size(tapped)
    for few, all_blocks in zip(gasp.heads(tapped, shapes), every.heads(tapped, shapes), strict=True):
        if few is not None:
            assert all_blocks is not None
            torch.testing.assert_close(few, all_blocks[[0, last - 1]])


def test_order_of_blocks_is_that_of_the_config() -> None:
    _, backbone, inputs = of("qwen2_vl")
    ahead, back = gasp_for(backbone, blocks=(1, 2)), gasp_for(backbone, blocks=(2, 1))
    tapped = tap(backbone, inputs, ahead)
    for straight, turned in zip(
        ahead.heads(tapped, one_size(tapped)), back.heads(tapped, one_size(tapped)), strict=True
    ):
        if straight is not None:
            assert turned is not None
            torch.testing.assert_close(straight, turned.flip(0))


def test_a_head_runs_once_for_all_samples() -> None:
    _, backbone, inputs = of("internvl")
    gasp = gasp_for(backbone)
    calls: list[int] = []
    for head in gasp.heads.modules():
        if isinstance(head, CorrespondenceHead):
            head.register_forward_hook(lambda _head, given, _made: calls.append(len(given[0])))
    tapped = tap(backbone, inputs, gasp)
    both = gasp.heads(tapped, [SHAPE, SHAPE])
    sizes = [sum(h * w for h, w in grids) for grids in tapped.frames]
    assert calls == [sum(sizes)] * backbone.num_layers
    for sample, shapes in enumerate(([SHAPE, None], [None, SHAPE])):
        alone = gasp.heads(tapped, shapes)
        assert alone[1 - sample] is None
        torch.testing.assert_close(alone[sample], both[sample])


def test_frames_of_several_sizes_are_no_clip() -> None:
    _, backbone, inputs = of("qwen2_vl")
    gasp = gasp_for(backbone)
    tapped = tap(backbone, inputs, gasp)
    mixed = next(i for i, grids in enumerate(tapped.frames) if len(set(grids)) > 1)
    with pytest.raises(ValueError, match="one size"):
        gasp.heads(tapped, [SHAPE if i == mixed else None for i in range(len(tapped.frames))])


@pytest.mark.parametrize("blocks", [(), (0, 1), (9,), (1, 1)])
def test_blocks_that_cannot_be(blocks: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks|layers"):
        GASP(GASPHeads(blocks=tuple(blocks)), Fit(8, 4))


def test_config_and_fit_make_the_same_modules_again() -> None:
    _, backbone, _ = of("ours")
    gasp = gasp_for(backbone, blocks=(1, 2))
    again = GASP(gasp.config, gasp.fit)
    again.load_state_dict(gasp.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gasp.parameters(), again.parameters(), strict=True))
    listed = GASP(replace(gasp.config, blocks=[1, 2]), gasp.fit)  # pyright: ignore[reportArgumentType]  (read from JSON)
    assert listed.taps == gasp.taps


def test_heads_stay_in_full_precision() -> None:
    """Half-precision states, as of a backbone in bfloat16."""
    gasp = GASP(GASPHeads(embed_dim=RANK), Fit(8, 2))
    states = torch.randn(4, 8).bfloat16()
    tapped = Tapped(states, None, (((2, 2),),), hidden={1: (states,)}, raw_last=(states,))
    (embeddings,) = gasp.heads(tapped, [SHAPE])
    assert embeddings is not None
    assert embeddings.dtype == torch.float32
    head = gasp.heads.by_block["1"]
    assert isinstance(head, nn.Module)
    torch.testing.assert_close(embeddings[0, 0].flatten(0, 1), head(states.float()))
    assert F.mse_loss(embeddings[0], embeddings[1]) > 0  # blocks have heads of their own
