"""Reconstruction from decoded pixels to world points, over numbers of views and sizes, with random weights.

Timed are the sequence, normalisation, encoder, decoder, heads and world points of one scene whose pixels are already on
the device; not the decoding of files. The share of the roofline is the work model's time at the matrix product and copy
rates measured in the same run, over the measured time.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import (
    Repeats,
    Report,
    Run,
    argument_parser,
    available_bytes,
    chosen_attention,
    chosen_repeats,
    gigabytes,
    measure_ceilings,
    milliseconds,
    parse_device,
    peak_memory,
    require_equal,
    time_once,
    time_variants,
)
from benchmarks.models import add_preset_option, chosen_model, prediction_tensors, random_views
from benchmarks.work_model import (
    Ceilings,
    Workload,
    attention_plan,
    parameters,
    peak_bytes,
    roofline_seconds,
    total_flops,
)
from g2vlm.config import G2VLMConfig
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs
from geometry import GeometryPrediction

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest relative error of points, cameras and normals between the default attention and the oracle."""
ORACLE_TOKENS = 6000
"""The oracle builds (heads, T, T) in float32; larger inputs are not compared."""
MEMORY_MARGIN = 1.2
"""Predicted bytes are multiplied by this before they are compared with what is free."""
VIEWS = {"cpu": (1, 2, 4, 8), "cuda": (1, 2, 4, 8, 16, 24, 32, 50, 100, 200)}
SIZES = {"cpu": (56, 84), "cuda": (224, 518)}
FEW = Repeats(warmup=1, rounds=3, seconds=0.0, least=1)
"""For passes so long that three warm-ups would be waste."""
LONG_PASS = 5.0
"""Seconds from which a pass counts as long."""


@dataclass
class Sweep:
    """What all cases of a run share."""

    model: G2VLMForConditionalGeneration
    device: torch.device
    ceilings: Ceilings
    repeats: Repeats
    deadline: float  # of time.perf_counter
    rate: float | None = None  # FLOP/s of the last case, to predict the next

    @property
    def config(self) -> G2VLMConfig:
        """The model's."""
        return self.model.config

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight."""
        return self.model.decoder.semantic_norm.weight.element_size()

    def predicted_seconds(self, work: Workload) -> float:
        """Of the case with warm-up and repeats, at the last case's rate, at first a tenth of the ceiling."""
        one = total_flops(self.config, work).total / (self.rate or self.ceilings.gemm_flops / 10)
        repeats = FEW if one > LONG_PASS else self.repeats
        return one * (2 + repeats.warmup + repeats.least) + repeats.seconds

    def lack_of_memory(self, work: Workload) -> str | None:
        """Why a case is predicted not to fit; None if it fits."""
        needed, free = MEMORY_MARGIN * self.activation_bytes(work), available_bytes(self.device)
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > free else None

    def lack_of_time(self, work: Workload) -> str | None:
        """Why a case is predicted to end after the deadline; None if it does not."""
        needed, left = self.predicted_seconds(work), self.deadline - time.perf_counter()
        return f"needs about {needed:.0f} s, {left:.0f} s of the budget are left" if needed > left else None

    def activation_bytes(self, work: Workload) -> int:
        """Predicted peak beyond the weights, which are already there."""
        weights = sum(parameters(self.config).values()) * self.value_bytes
        return peak_bytes(self.config, work, self.value_bytes) - weights


@torch.inference_mode()
def reconstruct(
    model: G2VLMForConditionalGeneration, pixels: Tensor, backend: str | None = None
) -> tuple[GeometryPrediction, Tensor]:
    """Prediction and world points (S, H, W, 3) of one scene, pixels (S, 3, H, W) in [0, 1] on the model's device."""
    output = model(**recon_inputs(pixels, model.config, pixels.device), backend=backend)
    (prediction,) = output.geometry
    return prediction, prediction.world_points


def largest_difference(model: G2VLMForConditionalGeneration, pixels: Tensor, tolerance: float) -> float:
    """Relative error of a reconstruction against the same one with the oracle's attention.

    Raises:
        OutputsDiffer: it exceeds the tolerance.
    """
    given, expected = (prediction_tensors(reconstruct(model, pixels, name)[0]) for name in (None, "eager"))
    return require_equal("reconstruction against the oracle's attention", given, expected, tolerance)


def measure(sweep: Sweep, work: Workload) -> dict[str, object]:
    """The row of one case."""
    model, config = sweep.model, sweep.config
    pixels = random_views(work.num_views, work.height, work.width, sweep.device)
    num_tokens = attention_plan(config, work).num_queries
    error = "not compared"
    if num_tokens <= ORACLE_TOKENS:
        error = f"{largest_difference(model, pixels, TOLERANCES[model.embed_tokens.weight.dtype]):.1e}"
    runs: dict[str, Run] = {"ours": lambda: reconstruct(model, pixels)}
    first = time_once(runs["ours"], sweep.device)
    timing = time_variants(runs, sweep.device, FEW if first > LONG_PASS else sweep.repeats)["ours"]
    flops = total_flops(config, work).total
    sweep.rate = flops / timing.median
    floor = roofline_seconds(config, work, sweep.ceilings, sweep.value_bytes)
    return {
        "size": f"{work.width}x{work.height}",
        "views": work.num_views,
        "tokens": num_tokens,
        "roofline %": round(100 * floor / timing.median, 1),
        "views/s": round(work.num_views / timing.median, 2),
        **milliseconds(timing),
        "TFLOP": round(flops / 1e12, 4),
        "TFLOP/s": round(sweep.rate / 1e12, 4),
        "weights GB": gigabytes(sum(p.numel() * p.element_size() for p in model.parameters())),
        "peak above GB": gigabytes(peak_memory(runs["ours"], sweep.device)),
        "predicted GB": gigabytes(sweep.activation_bytes(work)),
        "oracle error": error,
    }


def workloads(args: argparse.Namespace, device: torch.device, prompt_tokens: int) -> Iterator[Workload]:
    """The cases, per size from few views to many."""
    for size in args.sizes or (SIZES["cpu"][:1] if args.tiny else SIZES[device.type]):
        for num_views in args.views or ((1, 2) if args.tiny else VIEWS[device.type]):
            yield Workload(num_views, size, size, prompt_tokens)


def run(args: argparse.Namespace) -> Report:
    """Sweep over the cases until all are done or the budget is used."""
    deadline = time.perf_counter() + args.budget_seconds
    device = parse_device(args)
    model, settings = chosen_model(args, device)
    repeats = chosen_repeats(args)
    sweep = Sweep(model, device, measure_ceilings(device, args.tiny, args.cpu_time), repeats, deadline)
    settings |= {"tolerance": TOLERANCES[model.embed_tokens.weight.dtype], "CPU time": args.cpu_time}
    report = Report(args.name, device, settings, chosen_attention(), sweep.ceilings)
    for work in workloads(args, device, 1 + len(sweep.config.tokens.recon_prompt)):
        memory, seconds = sweep.lack_of_memory(work), sweep.lack_of_time(work)
        if memory or seconds:
            report.not_run.append(f"{work.num_views} views of {work.width}x{work.height}: {memory or seconds}")
            report.complete &= seconds is None
        else:
            report.rows.append(measure(sweep, work))
    report.notes.append("pixels start on the device; image files are not decoded")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep and report."""
    parser = argument_parser("recon", __doc__)
    add_preset_option(parser)
    parser.add_argument("--views", type=int, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the square views in pixels")
    parser.add_argument("--budget-seconds", type=float, default=480)
    parser.add_argument("--name", default="recon", help="name of the result")
    args = parser.parse_args(arguments)
    run(args).publish(args.output, args.note)


if __name__ == "__main__":
    main()
