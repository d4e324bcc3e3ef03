"""The protocol of all benchmarks: equal outputs first, then interleaved repeats in one process, ratios first."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import RESULTS, markdown_table
from benchmarks.work_model import Ceilings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("g2vlm", "geometry", "train", "benchmarks", "tests/gpu")
COMMIT = "G2VLM_COMMIT"
"""Environment variable that names the commit where the checkout came without its history."""


class OutputsDiffer(RuntimeError):
    """Two variants that should compute the same do not; nothing is timed."""


# Equality.


def relative_error(given: Tensor, expected: Tensor) -> float:
    """|given - expected| / |expected| over all elements; infinite when one of them is not finite."""
    given, expected = given.detach().to(expected.device, torch.float64), expected.detach().double()
    if given.shape != expected.shape:
        raise OutputsDiffer(f"shapes {tuple(given.shape)} and {tuple(expected.shape)}")
    error = float((given - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def require_equal(name: str, given: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> float:
    """The largest relative error between two lists of tensors.

    Raises:
        OutputsDiffer: it exceeds the tolerance.
    """
    errors = [relative_error(a, b) for a, b in zip(given, expected, strict=True)]
    worst = max(errors)
    if worst > tolerance:
        where = f"tensor {errors.index(worst)}"
        raise OutputsDiffer(f"{name}: relative error {worst:.2e} of {where} exceeds {tolerance:.0e}")
    return worst


# Time and memory.


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(third quartile - first quartile) / median; 0 for fewer than two repeats."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median


@dataclass(frozen=True)
class Repeats:
    """How often to run: warm-up, then rounds until there are `rounds` or `seconds` have passed, at least `least`.

    With `cpu_time` what counts on a CPU is the time that this process computes, so that others do not; only for work of
    one thread.
    """

    warmup: int = 3
    rounds: int = 30
    seconds: float = 3.0
    least: int = 3
    cpu_time: bool = False

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds of a CPU's clock."""
        return time.process_time if self.cpu_time else time.perf_counter


FEW_REPEATS = Repeats(warmup=1, rounds=3, seconds=0.5, least=1)
Run = Callable[[], object]


def time_variants(variants: Mapping[str, Run], device: torch.device, repeats: Repeats) -> dict[str, Timing]:
    """Seconds of every variant, measured A B C A B C ... after a warm-up of each."""
    for _ in range(repeats.warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start = repeats.clock()
    for done in range(repeats.rounds):
        if done >= repeats.least and repeats.clock() - start > repeats.seconds * len(variants):
            break
        for name, run in variants.items():
            seconds[name].append(time_once(run, device, repeats.clock))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def time_once(run: Run, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call: CUDA events on a GPU, `clock` elsewhere."""
    if device.type != "cuda":
        start = clock()
        run()
        return clock() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes at the peak of one call above those held before it; None on a CPU, whose allocator keeps no account."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation can take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_ceilings(device: torch.device, quick: bool = False, cpu_time: bool = False) -> Ceilings:
    """Matrix product (bf16 on a GPU, fp32 elsewhere) and copy, on random data, in this run."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 256 if quick else 1024
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if cuda else 2**20 if quick else 2**24, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    timings = time_variants(runs, device, Repeats(cpu_time=cpu_time))
    copied = 2 * source.numel() * source.element_size()
    return Ceilings(gemm_flops=2 * side**3 / timings["gemm"].median, copy_bytes=copied / timings["copy"].median)


# Reports.


@dataclass
class Report:
    """What a benchmark found and where; `not_run` names everything that was planned and left out."""

    benchmark: str
    device: torch.device
    config: Mapping[str, object]
    attention_backend: str | None = None
    ceilings: Ceilings | None = None
    rows: list[dict[str, object]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The content of the result file."""
        return {
            "benchmark": self.benchmark,
            "config": dict(self.config),
            "machine": describe_machine(self.device),
            "attention_backend": self.attention_backend,
            "code": describe_code(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
            "rows": self.rows,
            "not_run": self.not_run,
            "notes": self.notes,
            "complete": self.complete,
        }

    def publish(self, folder: Path | None, notes: Iterable[str] = ()) -> None:
        """Print the table; with a folder, also write `<benchmark>-<device>.json` there.

        Args:
            folder: of the result file, made when it is missing; None for none.
            notes: what a reader of this run should know besides the benchmark's own notes.
        """
        self.notes += notes
        print(markdown_table(self.rows) if self.rows else "not run")
        for text in (*(f"not run: {case}" for case in self.not_run), *self.notes):
            print(text)
        if folder:
            path = folder / result_name(self.benchmark, self.device)
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
            print(f"written: {path}")


def result_name(benchmark: str, device: torch.device) -> str:
    """File name of a benchmark's result on a device."""
    slug = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", _card(device).lower()).strip("-")
    return f"{benchmark}-{slug}.json"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, card, and the versions that decide speed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = importlib.metadata.version("transformers")
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "driver": _driver()}
    return {"device": device.type, "card": _card(device), "threads": torch.get_num_threads(), "versions": versions}


def _card(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def _driver() -> str:
    return _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def describe_code() -> dict[str, Any]:
    """The commit, whether the checkout differs from it, and a digest of the sources that were run."""
    commit = os.environ.get(COMMIT) or _output_of("git", "rev-parse", "HEAD")
    changes = _output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if changes is None else bool(changes), "sources": source_digest()}


def source_digest(root: Path = ROOT) -> str:
    """A digest of all sources that decide a result; it works without git and changes with every edit."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


# Command lines.


def argument_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes and few repeats: seconds on a laptop")
    parser.add_argument("--few", action="store_true", help="few repeats, for a slow or busy machine")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy CPU, with one thread: time of this process")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=RESULTS, help="write a result file into this folder (default: results/)"
    )
    parser.add_argument("--note", action="append", default=[], help="a remark on this run, kept in the result")
    return parser


def parse_device(args: argparse.Namespace) -> torch.device:
    """The device that a parsed command line names."""
    return torch.device(args.device)


def chosen_repeats(args: argparse.Namespace) -> Repeats:
    """How often a parsed command line wants things repeated."""
    return replace(FEW_REPEATS if args.tiny or args.few else Repeats(), cpu_time=args.cpu_time)


def chosen_attention() -> str:
    """The attention backend that the model takes in this process."""
    from g2vlm.model.attention import registry

    return os.environ.get(registry.ENVIRONMENT) or registry.AUTOMATIC


def milliseconds(timing: Timing) -> dict[str, object]:
    """The columns of one timing."""
    return {"ms": round(1e3 * timing.median, 3), "spread %": round(100 * timing.spread), "repeats": len(timing.seconds)}


def gigabytes(count: int | None) -> float | None:
    """Bytes as GB with three digits after the point."""
    return None if count is None else round(count / 1e9, 3)
