"""One Mixture-of-Transformers layer three ways: what contiguous expert segments save over gathering by index.

`segments` is the model's layer. `gather` keeps the tokens interleaved as the released structure does
(`benchmarks.gathered`).
`dense` sends all tokens through one expert: another function, timed only, as the lower bound.

All tokens attend to all, as the views of a reconstruction do.
Shapes: T tokens, G geometry tokens, D width, N heads, K head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

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
from benchmarks.gathered import gathered_projection, gathered_update
from benchmarks.models import chosen_dtype
from g2vlm.config import DecoderConfig
from g2vlm.model.attention import AttnPlan, Block, attend
from g2vlm.model.decoder import MoTLayer
from g2vlm.model.rope import mrope_table

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative error of outputs and gradients between `gather` and `segments`: they add in another order."""


@dataclass(frozen=True)
class Size:
    """A layer and its input: views of `view_tokens` tokens, the first and the last of which are markers."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_views: int
    view_tokens: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.num_views * self.view_tokens

    @property
    def name(self) -> str:
        """Width / heads : key heads / MLP width."""
        return f"{self.hidden_size}/{self.num_heads}:{self.num_kv_heads}/{self.intermediate_size}"

    def decoder(self) -> DecoderConfig:
        """The config of a decoder of this size."""
        head_dim = self.hidden_size // self.num_heads
        return DecoderConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=head_dim,
            mrope_sections=(head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16),
            geometric_layer_scale=1.0,
        )


TINY_SIZES = (Size(64, 4, 2, 176, num_views=2, view_tokens=256),)
CPU_SIZES = (
    *TINY_SIZES,
    Size(64, 4, 2, 176, num_views=16, view_tokens=256),
    Size(256, 8, 2, 1024, num_views=2, view_tokens=256),
    Size(256, 8, 2, 1024, num_views=16, view_tokens=256),
    Size(768, 6, 2, 4480, num_views=8, view_tokens=256),
)
GPU_SIZES = tuple(Size(1536, 12, 2, 8960, num_views, view_tokens=1371) for num_views in (1, 8, 24))


@dataclass(frozen=True)
class Case:
    """A layer with random weights, its tokens (T, D) in sequence order, and where each expert's tokens are."""

    layer: MoTLayer
    tokens: Tensor
    gradient: Tensor  # (T, D) of the output
    cos: Tensor
    sin: Tensor
    geometric: Tensor  # (G,) indices of the geometry tokens in sequence order
    semantic: Tensor  # (T - G,)
    plan: AttnPlan

    @property
    def order(self) -> Tensor:
        """(T,) expert layout from sequence order."""
        return torch.cat([self.geometric, self.semantic])


def make_case(size: Size, device: torch.device, dtype: torch.dtype) -> Case:
    """Random weights and inputs; the same for every variant."""
    torch.manual_seed(0)
    decoder = size.decoder()
    with torch.device(device):
        layer = MoTLayer(decoder)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
        tokens, gradient = torch.randn(2, size.num_tokens, size.hidden_size, dtype=dtype)
        position = torch.arange(size.num_tokens)
        cos, sin = mrope_table(position.expand(3, -1), decoder.head_dim, decoder.rope_theta, decoder.mrope_sections)
        in_view = position % size.view_tokens
        is_marker = (in_view == 0) | (in_view == size.view_tokens - 1)
    whole = (0, size.num_tokens)
    plan = AttnPlan((Block(whole, (whole,), causal=False),), size.num_tokens, size.num_tokens)
    indices = (~is_marker).nonzero().flatten(), is_marker.nonzero().flatten()
    return Case(layer.to(dtype), tokens, gradient, cos, sin, *indices, plan)


# The variants: (T, D) tokens -> (T, D), `segments` in expert layout, the others in sequence order.


def segments(case: Case, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The model's layer on tokens that lie in expert layout."""
    num_geometry = case.geometric.shape[0]
    return torch.cat(case.layer(tokens[:num_geometry], tokens[num_geometry:], cos, sin, case.plan, None))


def dense(case: Case, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All tokens through the geometric expert."""
    expert = case.layer.geometric
    return expert.update(tokens, attend(*expert.project(tokens, cos, sin), case.plan))


def gather(case: Case, tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved tokens: one gather and one scatter per expert around every step that has weights."""
    indices = case.geometric, case.semantic
    q, k, v = gathered_projection(case.layer, tokens, cos, sin, indices)
    return gathered_update(case.layer, tokens, attend(q, k, v, case.plan), indices)


Variant = Callable[[Case, Tensor, Tensor, Tensor], Tensor]
VARIANTS: dict[str, Variant] = {"dense": dense, "segments": segments, "gather": gather}


def variant_inputs(case: Case, name: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Tokens, rotary tables and output gradient in the order of tokens that a variant works in."""
    order = case.order if name == "segments" else torch.arange(len(case.tokens), device=case.tokens.device)
    return (case.tokens[order].requires_grad_(), case.cos[order], case.sin[order]), case.gradient[order]


def forward(case: Case, name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A variant's output (T, D)."""
    with torch.no_grad():
        return VARIANTS[name](case, *inputs)


def forward_backward(
    case: Case, name: str, inputs: tuple[Tensor, Tensor, Tensor], gradient: Tensor
) -> list[Tensor | None]:
    """A variant's output (T, D), the gradient of its tokens, and those of all parameters (None where it uses none)."""
    out = VARIANTS[name](case, *inputs)
    wanted = [inputs[0], *case.layer.parameters()]
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient, allow_unused=True)]


def variant_runs(case: Case, training: bool) -> dict[str, Run]:
    """One call per variant; reordering the inputs is not part of it."""
    runs: dict[str, Run] = {}
    for name in VARIANTS:
        inputs, gradient = variant_inputs(case, name)
        arguments = (case, name, inputs, gradient) if training else (case, name, inputs)
        runs[name] = partial(forward_backward if training else forward, *arguments)
    return runs


def largest_difference(case: Case, tolerance: float) -> float:
    """Relative error of `gather` against `segments`: output, input gradient and every parameter's gradient.

    Raises:
        OutputsDiffer: it exceeds the tolerance.
    """
    ours, theirs = (forward_backward(case, name, *variant_inputs(case, name)) for name in ("segments", "gather"))
    back = torch.argsort(case.order)
    in_sequence = [x[back] for x in ours[:2] if x is not None]
    expected = in_sequence + [x for x in ours[2:] if x is not None]
    given = [x for x in theirs if x is not None]
    return require_equal("gather against segments", given, expected, tolerance)


# The benchmark.


def measure(size: Size, device: torch.device, dtype: torch.dtype, repeats: Repeats) -> list[dict[str, object]]:
    """Rows of one size: forward, then forward and backward."""
    case = make_case(size, device, dtype)
    error = largest_difference(case, TOLERANCES[dtype])
    rows = []
    for training in (False, True):
        runs = variant_runs(case, training)
        timings = time_variants(runs, device, repeats)
        for name, run in runs.items():
            rows.append(_row(size, name, training, timings, peak_memory(run, device)))
            rows[-1] |= {"gather error": f"{error:.1e}"}
    return rows


def _row(size: Size, name: str, training: bool, timings: dict[str, Timing], peak: int | None) -> dict[str, object]:
    timing = timings[name]
    return {
        "layer": size.name,
        "tokens": size.num_tokens,
        "pass": "forward + backward" if training else "forward",
        "variant": name,
        "time / dense": round(timing.median / timings["dense"].median, 3),
        "time / segments": round(timing.median / timings["segments"].median, 3),
        **milliseconds(timing),
        "peak GB": gigabytes(peak),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, time and report."""
    parser = argument_parser("layer", __doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args(arguments)
    device = parse_device(args)
    dtype = getattr(torch, args.dtype) if args.dtype else chosen_dtype(device)
    sizes = TINY_SIZES if args.tiny else GPU_SIZES if device.type == "cuda" else CPU_SIZES
    repeats = chosen_repeats(args)
    settings = {"dtype": str(dtype), "tolerance": TOLERANCES[dtype], "CPU time": args.cpu_time}
    report = Report("layer", device, settings, chosen_attention())
    report.ceilings = measure_ceilings(device, args.tiny, args.cpu_time)
    for size in sizes:
        report.rows += measure(size, device, dtype, repeats)
    report.publish(args.output, args.note)


if __name__ == "__main__":
    main()
