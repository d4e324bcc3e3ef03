"""What one forward pass costs by its shapes alone: FLOPs, parameters, memory and the roofline time of each part.

A multiply-add is two FLOP. Products with weights and attention (scores and weighted sum) are counted; norms,
activations and the cameras' 3 x 3 products are not. Attention is counted as a kernel without skipping does it: a causal
block costs its whole rectangle.

Shapes: N views, P patches of a view, T decoder tokens, D width.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from benchmarks.table import markdown_table
from g2vlm.config import PRESETS, G2VLMConfig, GeometryEncoderConfig, HeadsConfig, SemanticEncoderConfig
from g2vlm.model.attention import AttnPlan
from g2vlm.model.attention.splits import Mode, Split, SplitLayout
from g2vlm.sequence import GeometryAttention, Grid

RECON_PROMPT_TOKENS = 8
"""bos and "Reconstruct the 3D scene." in the released tokenizer."""


@dataclass(frozen=True)
class Workload:
    """The sizes of one forward pass over one sample: prompt, views, semantic images, question.

    Args:
        num_views, height, width: the views, in pixels.
        prompt_tokens: causal text before the views.
        geometry_attention: which views see each other.
        images: patch grids of the semantic images after the views.
        question_tokens: causal text at the end.
        num_logits: tokens at which the language head runs.
        geometry: run the geometry heads.
        global_points: run the auxiliary global-point decoder (training); needs `geometry`.
    """

    num_views: int
    height: int
    width: int
    prompt_tokens: int = RECON_PROMPT_TOKENS
    geometry_attention: GeometryAttention = "global"
    images: tuple[Grid, ...] = ()
    question_tokens: int = 0
    num_logits: int = 0
    geometry: bool = True
    global_points: bool = False

    @property
    def pixels(self) -> int:
        """Pixels of all views."""
        return self.num_views * self.height * self.width

    def grid(self, patch_size: int) -> Grid:
        """Rows and columns of patches of one view.

        Raises:
            ValueError: a side that is not a multiple of the patch.
        """
        if self.height % patch_size or self.width % patch_size:
            raise ValueError(f"views of {self.width}x{self.height}: sides must be multiples of {patch_size}")
        return self.height // patch_size, self.width // patch_size


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of the model: products with weights, and attention."""

    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.linear + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, count: int) -> "Flops":
        return Flops(self.linear * count, self.attention * count)


@dataclass(frozen=True)
class Ceilings:
    """Rates that no kernel exceeds, measured (`benchmarks.common.measure_ceilings`) or assumed.

    Args:
        gemm_flops: FLOP/s of a large matrix product.
        copy_bytes: bytes/s of a large copy, reads and writes counted.
        attention_flops: FLOP/s of attention; None takes the matrix product's.
    """

    gemm_flops: float
    copy_bytes: float
    attention_flops: float | None = None


# FLOPs.


def forward_flops(config: G2VLMConfig, work: Workload) -> dict[str, Flops]:
    """FLOPs of a forward pass by part; the parts are those of `parameters`."""
    dim = config.hidden_size
    grid = work.grid(config.geometry_encoder.patch_size)
    patches = work.num_views * math.prod(grid)
    decoded = work.num_views if work.geometry else 0
    global_points = config.heads.global_points and work.global_points
    return {
        "embedding": Flops(),
        "semantic_encoder": tower_flops(_tower(config), dim, work.images),
        "geometry_encoder": _geometry_encoder_flops(config, work.num_views, grid),
        "projection": _linear(patches, _geometry_width(config), dim),
        "decoder": decoder_flops(config, attention_plan(config, work)),
        "frame_decoders": _frame_decoders_flops(config, decoded, math.prod(grid)),
        "global_points": _global_points_flops(config, decoded, math.prod(grid)) if global_points else Flops(),
        "heads": _heads_flops(config, decoded, math.prod(grid)),
        "lm_head": _linear(work.num_logits, dim, config.vocab_size),
    }


def total_flops(config: G2VLMConfig, work: Workload) -> Flops:
    """All parts together."""
    return sum(forward_flops(config, work).values(), Flops())


def attention_plan(config: G2VLMConfig, work: Workload) -> AttnPlan:
    """The plan that the model gets for this workload."""
    return layout(config, work).plan()


def layout(config: G2VLMConfig, work: Workload) -> SplitLayout:
    """The splits of the workload's sequence and where its geometry tokens are."""
    patches = math.prod(work.grid(config.geometry_encoder.patch_size))
    view = patches + 2  # with its two markers
    merge = config.semantic_encoder.merge_size
    per_view: tuple[Mode, int] = ("frame" if work.geometry_attention == "frame" else "full", view)
    views = [("full", work.num_views * view)] if work.geometry_attention == "global" else [per_view] * work.num_views
    image_mode = "causal" if config.semantic_image_attention == "causal" else "full"
    images = [(image_mode, rows * columns // merge**2 + 2) for rows, columns in work.images]
    runs = [("causal", work.prompt_tokens), *views, *images, ("causal", work.question_tokens)]
    first = work.prompt_tokens + 1
    geometry = [(first + i * view, first + i * view + patches) for i in range(work.num_views)]
    return SplitLayout(_splits(runs), tuple(geometry))


def _splits(runs: Iterable[tuple[Mode, int]]) -> tuple[Split, ...]:
    splits, start = [], 0
    for mode, count in runs:
        if count:
            splits.append(Split(start, start + count, mode))
            start += count
    return tuple(splits)


def decoder_flops(config: G2VLMConfig, plan: AttnPlan) -> Flops:
    """The Mixture-of-Transformers layers; a token costs the same in either expert."""
    decoder = config.decoder
    q_dim, kv_dim = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    weights = decoder.hidden_size * (2 * q_dim + 2 * kv_dim + 3 * decoder.intermediate_size)
    pairs = sum(block.num_queries * block.num_keys for block in plan.blocks)
    return Flops(2 * plan.num_queries * weights, 4 * pairs * q_dim) * decoder.num_layers


def tower_flops(config: SemanticEncoderConfig, output_dim: int, grids: Sequence[Grid]) -> Flops:
    """The Qwen2-VL vision tower with its merger, over images of these patch grids."""
    dim, merged_dim = config.hidden_size, config.hidden_size * config.merge_size**2
    flops = Flops()
    for patches in map(math.prod, grids):
        flops += _linear(patches, 3 * config.temporal_patch_size * config.patch_size**2, dim)
        flops += _block_flops(dim, config.mlp_ratio, 1, patches) * config.num_layers
        merged = patches // config.merge_size**2
        flops += _linear(merged, merged_dim, merged_dim) + _linear(merged, merged_dim, output_dim)
    return flops


def _tower(config: G2VLMConfig) -> SemanticEncoderConfig:
    tower = config.semantic_encoder
    if not isinstance(tower, SemanticEncoderConfig):
        raise ValueError(f"the work model knows the qwen2_vl tower; this config has {tower.architecture}")
    return tower


def dino_flops(config: GeometryEncoderConfig, num_views: int, patches: int) -> Flops:
    """DINOv2; with the released windows, class and register tokens stay out of attention."""
    dim, tokens = config.hidden_size, 1 + config.num_registers + patches
    attended = patches if config.windows == "official" else tokens
    layer = _attention_flops(dim, num_views, attended) + _mlp_flops(dim, config.mlp_ratio, num_views * tokens)
    return _linear(num_views * patches, 3 * config.patch_size**2, dim) + layer * config.num_layers


def _geometry_encoder_flops(config: G2VLMConfig, num_views: int, grid: Grid) -> Flops:
    if config.encoders == "single":
        return tower_flops(_tower(config), config.hidden_size, [grid] * num_views)
    return dino_flops(config.geometry_encoder, num_views, math.prod(grid))


def _frame_decoders_flops(config: G2VLMConfig, num_views: int, patches: int) -> Flops:
    heads, dim = config.heads, config.hidden_size
    widths = [heads.point_dim, heads.camera_dim] + [heads.point_dim] * heads.confidence
    blocks = _block_flops(dim, heads.mlp_ratio, num_views, patches) * heads.depth
    return sum((blocks + _linear(num_views * patches, dim, width) for width in widths), Flops())


def _global_points_flops(config: G2VLMConfig, num_views: int, patches: int) -> Flops:
    """Each block also attends to the context view, whose keys and values are computed for every view."""
    heads, dim, tokens = config.heads, config.hidden_size, num_views * patches
    block = _block_flops(dim, heads.mlp_ratio, num_views, patches) + _attention_flops(dim, num_views, patches)
    return block * heads.depth + _linear(tokens, dim, heads.point_dim) + _pixel_head_flops(config, tokens, 3)


def _heads_flops(config: G2VLMConfig, num_views: int, patches: int) -> Flops:
    heads, tokens, width = config.heads, num_views * patches, config.heads.camera_dim
    channels = 3 + 3 * (heads.normals == "learned") + heads.confidence
    camera = _linear(tokens, width, width) * 6 + _linear(num_views, width, width) * 2 + _linear(num_views, width, 3 + 9)
    return _pixel_head_flops(config, tokens, channels) + camera


def _pixel_head_flops(config: G2VLMConfig, tokens: int, channels: int) -> Flops:
    return _linear(tokens, config.heads.point_dim, channels * config.geometry_encoder.patch_size**2)


def _block_flops(dim: int, mlp_ratio: float, num_sequences: int, length: int) -> Flops:
    """A transformer block over sequences that attend within themselves."""
    return _attention_flops(dim, num_sequences, length) + _mlp_flops(dim, mlp_ratio, num_sequences * length)


def _attention_flops(dim: int, num_sequences: int, length: int) -> Flops:
    """Query, key, value and output projections, and attention."""
    return _linear(num_sequences * length, dim, 4 * dim) + Flops(attention=4 * num_sequences * length**2 * dim)


def _mlp_flops(dim: int, mlp_ratio: float, tokens: int) -> Flops:
    return _linear(tokens, dim, int(dim * mlp_ratio)) * 2


def _linear(tokens: int, input_dim: int, output_dim: int) -> Flops:
    return Flops(linear=2 * tokens * input_dim * output_dim)


# Parameters.


def parameters(config: G2VLMConfig) -> dict[str, int]:
    """Number of parameters of each part."""
    dim, heads = config.hidden_size, config.heads
    return {
        "embedding": config.vocab_size * dim,
        "semantic_encoder": _tower_parameters(_tower(config), dim),
        "geometry_encoder": 0 if config.encoders == "single" else _dino_parameters(config.geometry_encoder),
        "projection": _weights(_geometry_width(config), dim),
        "decoder": _decoder_parameters(config),
        "frame_decoders": sum(
            _frame_decoder_parameters(heads, dim, width)
            for width in (heads.point_dim, heads.camera_dim, *[heads.point_dim] * heads.confidence)
        ),
        "global_points": _global_points_parameters(config) if heads.global_points else 0,
        "heads": _heads_parameters(config),
        "lm_head": config.vocab_size * dim,
    }


def _decoder_parameters(config: G2VLMConfig) -> int:
    decoder, dim = config.decoder, config.hidden_size
    q_dim, kv_dim = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    projections = _weights(dim, q_dim) + 2 * _weights(dim, kv_dim) + q_dim * dim
    expert = projections + 3 * dim * decoder.intermediate_size + 2 * dim  # two norms
    qk_norms = 2 * decoder.head_dim * (decoder.geometric_qk_norm + decoder.semantic_qk_norm)
    layer_scales = 2 * dim  # of the geometric expert
    return decoder.num_layers * (2 * expert + qk_norms + layer_scales) + 2 * dim  # and the final norms


def _tower_parameters(config: SemanticEncoderConfig, output_dim: int) -> int:
    dim, merged = config.hidden_size, config.hidden_size * config.merge_size**2
    patch_embedding = 3 * config.temporal_patch_size * config.patch_size**2 * dim
    merger = 2 * dim + _weights(merged, merged) + _weights(merged, output_dim)
    return patch_embedding + config.num_layers * _block_parameters(dim, config.mlp_ratio) + merger


def _dino_parameters(config: GeometryEncoderConfig) -> int:
    dim, side = config.hidden_size, config.image_size // config.patch_size
    tables = dim * (2 + config.num_registers + 1 + side**2)  # class and mask token, registers, positions
    layer = _block_parameters(dim, config.mlp_ratio) + 2 * dim  # residual scales
    return _weights(3 * config.patch_size**2, dim) + tables + config.num_layers * layer + 2 * dim


def _frame_decoder_parameters(heads: HeadsConfig, dim: int, output_dim: int) -> int:
    return heads.depth * _block_parameters(dim, heads.mlp_ratio) + _weights(dim, output_dim)


def _global_points_parameters(config: G2VLMConfig) -> int:
    heads, dim = config.heads, config.hidden_size
    cross = 4 * _weights(dim, dim) + 4 * dim  # projections and two norms
    decoder = _frame_decoder_parameters(heads, dim, heads.point_dim) + heads.depth * cross
    return decoder + _pixel_head_parameters(config, 3)


def _heads_parameters(config: G2VLMConfig) -> int:
    heads, width = config.heads, config.heads.camera_dim
    camera = 8 * _weights(width, width) + _weights(width, 3) + _weights(width, 9)
    channels = 3 + 3 * (heads.normals == "learned") + heads.confidence
    return camera + _pixel_head_parameters(config, channels)


def _pixel_head_parameters(config: G2VLMConfig, channels: int) -> int:
    return _weights(config.heads.point_dim, channels * config.geometry_encoder.patch_size**2)


def _block_parameters(dim: int, mlp_ratio: float) -> int:
    """A pre-norm block: two layer norms, attention, MLP, all with biases."""
    hidden = int(dim * mlp_ratio)
    return 4 * dim + 4 * _weights(dim, dim) + _weights(dim, hidden) + _weights(hidden, dim)


def _weights(input_dim: int, output_dim: int) -> int:
    """A linear layer with bias."""
    return (input_dim + 1) * output_dim


def _geometry_width(config: G2VLMConfig) -> int:
    single = config.encoders == "single"
    return config.semantic_encoder.hidden_size if single else config.geometry_encoder.hidden_size


# Memory and time.

PIXEL_BYTES = 4 * 3 * 8
"""Float32 maps of three channels that live at once while points and normals are made, per pixel."""


def kv_bytes(config: G2VLMConfig, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the cached keys and values of `num_tokens` tokens."""
    decoder = config.decoder
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * bytes_per_value * num_tokens


def peak_bytes(config: G2VLMConfig, work: Workload, bytes_per_value: int = 2) -> int:
    """Estimated peak of an inference pass: all weights and the largest phase's activations, nothing chunked.

    Phases: an encoder block's MLP, a decoder layer's SwiGLU, a frame decoder's block, the float32 pixel maps. The
    allocator's slack and kernels' workspaces are left out.
    """
    dim, hidden = config.hidden_size, config.decoder.intermediate_size
    patches = work.num_views * math.prod(work.grid(config.geometry_encoder.patch_size))
    width = _geometry_width(config)
    phases = [
        10 * patches * width * bytes_per_value,  # stream, norm, MLP of ratio 4 before and after its activation
        attention_plan(config, work).num_queries * (4 * dim + 3 * hidden) * bytes_per_value,
        patches * (11 * dim + dim) * bytes_per_value,
        work.pixels * PIXEL_BYTES + patches * dim * bytes_per_value,
    ]
    return sum(parameters(config).values()) * bytes_per_value + max(phases)


def active_parameters(config: G2VLMConfig, work: Workload) -> int:
    """Parameters of the parts that the workload runs; each is read at least once."""
    flops = forward_flops(config, work)
    return sum(count for part, count in parameters(config).items() if flops[part].total)


def roofline_seconds(config: G2VLMConfig, work: Workload, ceilings: Ceilings, bytes_per_value: int = 2) -> float:
    """The time below which no implementation runs: arithmetic at the ceilings, or reading the active weights once."""
    flops = total_flops(config, work)
    attention_rate = ceilings.attention_flops or ceilings.gemm_flops
    arithmetic = flops.linear / ceilings.gemm_flops + flops.attention / attention_rate
    return max(arithmetic, active_parameters(config, work) * bytes_per_value / ceilings.copy_bytes)


# The table.

H200 = 790e12, 4.3e12
"""bf16 matrix product and copy of one H200, as this project's work model assumes them where nothing was measured."""
SCENARIOS = {
    "floor ms": Ceilings(*H200),
    "FA2 ms": Ceilings(600e12, H200[1], attention_flops=350e12),
    "fast ms": Ceilings(600e12, H200[1]),
}


def table_row(config: G2VLMConfig, work: Workload) -> dict[str, int | float]:
    """One row of the table: shares in percent of the FLOPs, computed times of one H200 in milliseconds."""
    parts = forward_flops(config, work)
    total = total_flops(config, work).total
    shares = {
        "encoder": parts["geometry_encoder"].total,
        "lin": parts["decoder"].linear,
        "attn": parts["decoder"].attention,
        "dec": parts["frame_decoders"].total,
    }
    times = {name: 1e3 * roofline_seconds(config, work, ceilings) for name, ceilings in SCENARIOS.items()}
    return {
        "views": work.num_views,
        "tokens": attention_plan(config, work).num_queries,
        "TFLOP": round(total / 1e12, 3),
        **{name: round(100 * part / total) for name, part in shares.items()},
        **{name: round(time, 1) for name, time in times.items()},
        "views/s": round(1e3 * work.num_views / times["fast ms"], 1),
        "KV MB": round(kv_bytes(config, attention_plan(config, work).num_queries) / 1e6),
        "peak GB": round(peak_bytes(config, work) / 1e9, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print parameters and the cost table of reconstruction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.work_model", description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="paper_2b")
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--height", type=int, help="default: the width")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32, 50, 100, 200])
    parser.add_argument("--prompt-tokens", type=int, default=RECON_PROMPT_TOKENS)
    parser.add_argument("--geometry-attention", choices=get_args(GeometryAttention), default="global")
    parser.add_argument("--global-points", action="store_true", help="also the training head")
    args = parser.parse_args(arguments)
    config = PRESETS[args.preset]()
    height = args.height or args.width
    works = [
        Workload(
            num_views, height, args.width, args.prompt_tokens, args.geometry_attention, global_points=args.global_points
        )
        for num_views in args.views
    ]
    counts = parameters(config)
    print("Computed from shapes; no time below was measured.\n")
    print(markdown_table([{"part": part, "parameters": count} for part, count in counts.items()]))
    print(f"\ntotal {sum(counts.values()):,} parameters; views of {args.width}x{height}\n")
    print(markdown_table([table_row(config, work) for work in works]))


if __name__ == "__main__":
    main()
