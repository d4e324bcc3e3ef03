"""Chat: prefill of views, images and a question, and tokens a second after contexts of several lengths.

`ours` is the library: one forward for the whole context, then rows with preallocated keys. `official` is the same model
run the way the released code runs it: a forward for each segment, tokens in sequence order, each expert's rows read and
written by index around every step that has weights, rotary tables made in every layer, and a cache that is copied whole
for every token. Both use the same attention kernels; the released code's host synchronisations in every layer are left
out.

Shapes: C cached tokens, n new ones, D width, K head width.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Repeats,
    Report,
    Run,
    Timing,
    argument_parser,
    chosen_attention,
    chosen_repeats,
    gigabytes,
    measure_ceilings,
    milliseconds,
    parse_device,
    peak_memory,
    require_equal,
    time_variants,
)
from benchmarks.gathered import by_index, gathered_projection, gathered_update
from benchmarks.models import add_preset_option, chosen_model, random_views
from benchmarks.work_model import Ceilings
from g2vlm.generation import Prefix
from g2vlm.model.attention import AttnPlan, Block, attend
from g2vlm.model.cache import Rows
from g2vlm.model.decoder import MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.rope import mrope_table
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.sequence import GeometryViews, PackedSequence, Segment, SemanticImage, Text

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest relative error of the logits between the variants: they add in another order."""
QUESTION_TOKENS = 16
SIDES = {"cpu": 4, "cuda": 16}
"""Patches along a side of a view and of an image."""

LayerKeys = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Chat:
    """A context of an exact number of tokens: views, as many images, then text."""

    segments: list[Segment]
    views: list[Tensor]
    patches: list[Tensor]  # of each image
    grid: Tensor  # (1, 3) of every image

    @property
    def pixels(self) -> dict[str, Any]:
        """What a forward over all segments takes."""
        if not self.patches:
            return {"views": self.views}
        grids = self.grid.expand(len(self.patches), -1)
        return {"views": self.views, "pixel_values": torch.cat(self.patches), "image_grid_thw": grids}


def make_chat(model: G2VLMForConditionalGeneration, context: int, side: int, device: torch.device) -> Chat:
    """Views and images of `side` x `side` patches that fill a context of `context` tokens, the rest of it text."""
    merge, patch = model.config.semantic_encoder.merge_size, model.config.geometry_encoder.patch_size
    pair = side * side + 2 + (side // merge) ** 2 + 2
    count = max((context - 2 * QUESTION_TOKENS) // pair, 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (context - count * pair,), generator=generator).tolist()
    header, question = Text(tuple(ids[:-QUESTION_TOKENS])), Text(tuple(ids[-QUESTION_TOKENS:]))
    views: list[Segment] = [GeometryViews(((side, side),) * count)] if count else []
    pixels = normalise_views(random_views(max(count, 1), patch * side, patch * side, device))
    pixels = pixels.to(model.embed_tokens.weight.dtype)
    values = torch.randn(side * side, 1176, generator=generator).to(pixels)
    images = [SemanticImage((side, side), merge)] * count
    grid = torch.tensor([[1, side, side]], device=device)
    return Chat([header, *views, *images, question], [pixels] if count else [], [values] * count, grid)


# The released code's way.


def official_forward(
    model: G2VLMForConditionalGeneration,
    embeddings: Tensor,
    positions: Tensor,
    indices: Sequence[Tensor],
    causal: bool,
    cache: list[LayerKeys] | None,
) -> tuple[Tensor, list[LayerKeys]]:
    """One segment in sequence order: embeddings (n, D), positions (3, n) -> final hidden states (n, D), the new cache.

    Args:
        model: its weights.
        embeddings, positions: of the segment's tokens.
        indices: where the geometry tokens are, and where the others are.
        causal: attention inside the segment; everything cached is seen.
        cache: per layer, keys and values (C, heads, K) of the segments before.
    """
    config, new = model.config.decoder, list[LayerKeys]()
    num_new, num_cached = embeddings.shape[0], cache[0][0].shape[0] if cache else 0
    whole = (0, num_cached + num_new)
    plan = AttnPlan((Block((0, num_new), (whole,), causal),), num_new, num_cached + num_new)
    x = embeddings
    for number, layer in enumerate(model.decoder.layers):
        assert isinstance(layer, MoTLayer)
        cos, sin = mrope_table(positions, config.head_dim, config.rope_theta, config.mrope_sections)
        q, k, v = gathered_projection(layer, x, cos, sin, indices)
        if cache:
            k, v = torch.cat([cache[number][0], k]), torch.cat([cache[number][1], v])
        new.append((k, v))
        x = gathered_update(layer, x, attend(q, k, v, plan), indices)
    return by_index(x, indices, [model.decoder.geometric_norm, model.decoder.semantic_norm]), new


@torch.inference_mode()
def official_prefill(model: G2VLMForConditionalGeneration, chat: Chat) -> tuple[Tensor, list[LayerKeys]]:
    """Logits (1, vocab) at the end of the context, and its cache; one forward for each segment."""
    builder, patches = sequence_builder(model.config), iter(chat.patches)
    sequence: PackedSequence | None = None
    hidden, cache = model.embed_tokens.weight[:0], None
    for segment in chat.segments:
        sequence = builder.extend(sequence, [[segment]]) if sequence else builder.build([[segment]])
        moved = sequence.to(model.device)
        is_view, is_image = isinstance(segment, GeometryViews), isinstance(segment, SemanticImage)
        pixels = (next(patches), chat.grid) if is_image else (None, None)
        semantic, _ = model.embed_semantic(moved, *pixels)
        embeddings = torch.cat([model.embed_views(chat.views if is_view else []), semantic])[moved.order]
        geometric = moved.order < moved.num_geometry
        indices = geometric.nonzero().flatten(), (~geometric).nonzero().flatten()
        positions = moved.position_ids[:, moved.order]
        hidden, cache = official_forward(model, embeddings, positions, indices, isinstance(segment, Text), cache)
    assert cache is not None
    return model.lm_head(hidden[-1:]), cache


@torch.inference_mode()
def official_decode(
    model: G2VLMForConditionalGeneration, cache: list[LayerKeys], first: int, ids: Tensor
) -> list[Tensor]:
    """Feeds ids (n,) one by one from position `first`: the logits (1, vocab) after each."""
    logits = []
    indices = (ids.new_zeros(0), ids.new_zeros(1))
    for i in range(len(ids)):
        embedding, position = model.embed_tokens(ids[i : i + 1]), torch.full((3, 1), first + i, device=ids.device)
        hidden, cache = official_forward(model, embedding, position, indices, True, cache)
        logits.append(model.lm_head(hidden))
    return logits


# The library's way.


@torch.inference_mode()
def our_prefill(model: G2VLMForConditionalGeneration, chat: Chat) -> tuple[Tensor, Prefix]:
    """Logits (1, vocab) at the end of the context, and its cache; one forward."""
    sequence = sequence_builder(model.config).build([chat.segments])
    last = torch.tensor(sequence.last_tokens, device=model.device)
    output = model(
        sequence=sequence.to(model.device), **chat.pixels, logits_at=last, predict_geometry=False, use_cache=True
    )
    return output.logits, Prefix(sequence, output.cache)


@torch.inference_mode()
def our_decode(model: G2VLMForConditionalGeneration, rows: Rows, ids: Tensor) -> list[Tensor]:
    """Feeds ids (n,), the same ones to every row: the logits (B, vocab) after each. The rows can be used again."""
    used = replace(rows)
    return [model.decode(token.expand(len(rows.positions)), used) for token in ids]


# The benchmark.


@dataclass(frozen=True)
class Bench:
    """What all contexts share."""

    model: G2VLMForConditionalGeneration
    device: torch.device
    ceilings: Ceilings
    repeats: Repeats
    side: int
    num_tokens: int
    batch: int

    @property
    def tolerance(self) -> float:
        """Of the logits."""
        return TOLERANCES[self.model.embed_tokens.weight.dtype]

    def decode_floor(self, context: int, num_rows: int) -> float:
        """Seconds to read the weights of the text's path once, and every row's keys and values of the context."""
        model, config = self.model, self.model.config.decoder
        parts = [model.lm_head, *(layer.get_submodule("semantic") for layer in model.decoder.layers)]
        weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        keys = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.lm_head.weight.element_size()
        return (weights + keys * context * num_rows) / self.ceilings.copy_bytes


def measure(bench: Bench, context: int) -> list[dict[str, object]]:
    """Rows of one context: prefill, then decoding."""
    model = bench.model
    chat = make_chat(model, context, bench.side, bench.device)
    (ours, prefix), (theirs, cache) = our_prefill(model, chat), official_prefill(model, chat)
    if prefix.num_tokens != context:
        raise ValueError(f"the context has {prefix.num_tokens} tokens instead of {context}")
    error = require_equal("prefill segment by segment", [theirs], [ours], bench.tolerance)
    runs: dict[str, Run] = {
        "ours": lambda: our_prefill(model, chat),
        "official": lambda: official_prefill(model, chat),
    }
    found = _table(bench, context, "prefill", runs, context, error)
    ids = torch.arange(4, 4 + bench.num_tokens, device=bench.device) % model.config.vocab_size
    with torch.inference_mode():
        rows = Rows.after(prefix.sequence.to(bench.device), prefix.cache, room=bench.num_tokens)
        many = rows.repeated(bench.batch)
    first = prefix.sequence.next_positions[0]
    ours, theirs = our_decode(model, rows, ids), official_decode(model, cache, first, ids)
    error = require_equal("decoding with a copied cache", theirs, ours, bench.tolerance)
    require_equal("decoding many rows", [x[-1:] for x in our_decode(model, many, ids)], ours, bench.tolerance)
    runs = {
        "ours": lambda: our_decode(model, rows, ids),
        "official": lambda: official_decode(model, cache, first, ids),
        f"ours, {bench.batch} rows": lambda: our_decode(model, many, ids),
    }
    return found + _table(bench, context, "decode", runs, bench.num_tokens, error)


def _table(
    bench: Bench, context: int, phase: str, runs: dict[str, Run], num_tokens: int, error: float
) -> list[dict[str, object]]:
    timings = time_variants(runs, bench.device, bench.repeats)
    found = []
    for name, run in runs.items():
        num_rows = bench.batch if name.endswith("rows") else 1
        tokens = num_tokens * num_rows
        floor = bench.decode_floor(context, num_rows) * num_tokens if phase == "decode" else None
        found.append(_row(timings, name, tokens, floor, error) | {"peak GB": gigabytes(peak_memory(run, bench.device))})
    return [{"context": context, "phase": phase, **row} for row in found]


def _row(
    timings: dict[str, Timing], name: str, num_tokens: int, floor: float | None, error: float
) -> dict[str, object]:
    timing = timings[name]
    return {
        "variant": name,
        "time / ours": round(timing.median / timings["ours"].median, 3),
        "roofline %": None if floor is None else round(100 * floor / timing.median, 1),
        "tokens/s": round(num_tokens / timing.median, 1),
        **milliseconds(timing),
        "official error": f"{error:.1e}",
    }


def run(args: argparse.Namespace) -> Report:
    """All contexts, from short to long."""
    device = parse_device(args)
    model, settings = chosen_model(args, device)
    model.config.geometry_sees = "everything"  # the rule of the released code that is compared
    num_tokens = args.tokens or (3 if args.tiny else 64)
    contexts = args.contexts or ([128] if args.tiny else [1024, 8192])
    ceilings = measure_ceilings(device, args.tiny, args.cpu_time)
    side = SIDES["cpu" if args.tiny else device.type]
    bench = Bench(model, device, ceilings, chosen_repeats(args), side, num_tokens, args.batch)
    settings |= {"tolerance": bench.tolerance, "side": side, "decoded tokens": num_tokens, "CPU time": args.cpu_time}
    report = Report("generate", device, settings, chosen_attention(), ceilings)
    for context in contexts:
        report.rows += measure(bench, context)
    report.notes.append("official: the same weights and attention kernels, in the released code's order of work")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, time and report."""
    parser = argument_parser("generate", __doc__)
    add_preset_option(parser)
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens before the answer (default: 1024 8192)")
    parser.add_argument("--tokens", type=int, help="tokens that are decoded (default: 64)")
    parser.add_argument("--batch", type=int, default=8, help="rows decoded together in the third variant")
    args = parser.parse_args(arguments)
    run(args).publish(args.output, args.note)


if __name__ == "__main__":
    main()
