"""Every attention backend against the oracle in float64, on every kind of plan: error first, then time.

Plans: the views of a reconstruction (global, block-causal, frame-wise), chat with semantic images (full and causal),
text, a pack of two samples, and one decoded token after a cached chat.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from benchmarks.common import (
    OutputsDiffer,
    Repeats,
    Report,
    Run,
    argument_parser,
    milliseconds,
    parse_device,
    relative_error,
    time_variants,
)
from g2vlm.errors import InputError
from g2vlm.model.attention import AttnPlan, attend, backend_names
from g2vlm.sequence import (
    GeometryAttention,
    GeometryViews,
    Sample,
    SemanticImage,
    SemanticImageAttention,
    SequenceBuilder,
    SpecialIds,
    Text,
)

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative error of output and gradients against the oracle on the same inputs in float64."""
HEADS, KEY_HEADS, HEAD_DIM = 12, 2, 128
SPECIAL = SpecialIds(bos=0, eos=1, vision_start=2, vision_end=3)


def plans(side: int, num_views: int) -> dict[str, AttnPlan]:
    """One plan of every kind, for square views and images of `side` patches."""
    text, views = Text(tuple(range(8))), GeometryViews(((side, side),) * num_views)
    recon: Sample = (text, views)
    chat: Sample = (text, views, SemanticImage((side, side)), SemanticImage((side, side)), text)
    found = {f"recon {mode}": _builder(mode).build([recon]).plan for mode in get_args(GeometryAttention)}
    for mode in get_args(SemanticImageAttention):
        found[f"chat, images {mode}"] = _builder("global", mode).build([chat]).plan
    builder = _builder("global")
    found["text"] = builder.build([(text,) * side]).plan
    found["pack"] = builder.build([recon, chat]).plan
    found["decode"] = builder.extend(builder.build([chat]), [[Text((0,))]]).plan
    return found


def _builder(geometry: GeometryAttention, images: SemanticImageAttention = "full") -> SequenceBuilder:
    return SequenceBuilder(SPECIAL, geometry, images)


def outputs(inputs: Sequence[Tensor], plan: AttnPlan, backend: str) -> list[Tensor]:
    """Attention and the gradients of q, k and v."""
    out = attend(inputs[0], inputs[1], inputs[2], plan, backend=backend)
    gradient = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, gradient)]


def measure(plan: AttnPlan, device: torch.device, dtype: torch.dtype, repeats: Repeats) -> list[dict[str, object]]:
    """The rows of one plan: a backend each; one that refuses says why."""
    shapes = [(plan.num_queries, HEADS), (plan.num_keys, KEY_HEADS), (plan.num_keys, KEY_HEADS)]
    inputs = [torch.randn(*shape, HEAD_DIM, device=device).to(dtype).requires_grad_() for shape in shapes]
    oracle = outputs([x.detach().double().requires_grad_() for x in inputs], plan, "eager")
    rows, runs = [], dict[str, Run]()
    for name in backend_names():
        try:
            given = outputs(inputs, plan, name)
        except InputError as refusal:
            rows.append({"backend": name, "error": f"refused: {refusal}"})
            continue
        errors = [relative_error(a, b) for a, b in zip(given, oracle, strict=True)]
        rows.append({"backend": name, "error": f"{errors[0]:.1e}", "gradient error": f"{max(errors[1:]):.1e}"})
        rows[-1]["within"] = max(errors) <= TOLERANCES[dtype]
        runs[name] = _forward(inputs, plan, name)
    timings = time_variants(runs, device, repeats)
    for row in rows:
        if timing := timings.get(str(row["backend"])):
            row |= {"time / sdpa": round(timing.median / timings["sdpa"].median, 2), **milliseconds(timing)}
    return rows


def _forward(inputs: Sequence[Tensor], plan: AttnPlan, backend: str) -> Run:
    q, k, v = (x.detach() for x in inputs)
    return lambda: attend(q, k, v, plan, backend=backend)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, time and report.

    Raises:
        OutputsDiffer: after the report, when a backend is outside its tolerance.
    """
    args = argument_parser("attention", __doc__).parse_args(arguments)
    device = parse_device(args)
    torch.manual_seed(0)
    side, num_views = (4, 2) if args.tiny or device.type == "cpu" else (16, 4)
    repeats = Repeats(1, 3, 0.2) if args.tiny else Repeats(seconds=0.2)
    dtypes = (torch.float32,) if args.tiny else tuple(TOLERANCES)
    heads = {"heads": HEADS, "key heads": KEY_HEADS, "head width": HEAD_DIM}
    tolerances = {f"tolerance {dtype}": tolerance for dtype, tolerance in TOLERANCES.items()}
    report = Report("attention", device, heads | tolerances, "all")
    for name, plan in plans(side, num_views).items():
        for dtype in dtypes:
            case = {"plan": name, "queries": plan.num_queries, "blocks": len(plan.blocks), "dtype": str(dtype)}
            report.rows += [case | row for row in measure(plan, device, dtype, repeats)]
    report.publish(args.output, args.note)
    failed = [row for row in report.rows if row.get("within") is False]
    wrong = [f"{row['backend']} on {row['plan']} in {row['dtype']}" for row in failed]
    if wrong:
        raise OutputsDiffer(f"outside the tolerance: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
