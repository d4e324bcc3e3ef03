"""How fast rooms are rendered: whole samples of new scenes, and the rendering alone.

`load` builds a scene, finds cameras and renders its views, a new scene every time; `render` renders scenes that are
there already. `processes` load side by side, as the workers of a data loader do, each with the threads of this process.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.common import (
    Repeats,
    Report,
    Run,
    argument_parser,
    milliseconds,
    parse_device,
    require_equal,
    time_variants,
)
from g2vlm.data.rooms import LAWS, PackedScene, Rendering, RoomsSource, SceneLaw, pack, render
from g2vlm.data.types import ViewRequest

FULL = replace(LAWS["standard"], width=(7.0, 8.0), depth=(6.0, 7.0), furniture=(25, 25))
"""The law of rooms with 25 pieces of furniture."""
TOLERANCE = 1e-5
"""Largest relative error of depth and normals between one batch on the device and single views on the CPU."""
SCENES_PER_TASK = 8


@dataclass(frozen=True)
class Case:
    """A law, a view size and a number of views per scene."""

    name: str
    law: SceneLaw
    side: int
    num_views: int

    @property
    def request(self) -> ViewRequest:
        """What is asked of the source."""
        return ViewRequest(self.num_views, (self.side, self.side), 0)


TINY_CASES = (Case("tiny", LAWS["tiny"], 28, 2),)
CPU_CASES = (
    Case("tiny", LAWS["tiny"], 84, 4),
    Case("tiny", LAWS["tiny"], 84, 24),
    Case("standard", LAWS["standard"], 112, 4),
    Case("25 pieces", FULL, 112, 4),
    Case("25 pieces", FULL, 112, 24),
)
GPU_CASES = (*CPU_CASES, Case("25 pieces", FULL, 224, 24))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scene on the device with its cameras."""

    scene: PackedScene
    poses: Tensor
    intrinsics: Tensor
    size: tuple[int, int]

    def render(self) -> Rendering:
        """Its views."""
        return render(self.scene, self.poses, self.intrinsics, self.size)


def prepare(source: RoomsSource, scene: int, request: ViewRequest, device: torch.device) -> Prepared:
    """A scene that needs nothing but rendering."""
    cameras = source.excerpt(scene, request)
    K = cameras.intrinsics(request.size)
    return Prepared(pack(source.scene(scene), device), cameras.poses().to(device), K.to(device), request.size)


def check(case: Case, device: torch.device) -> float:
    """Relative error of depth and normals of a batch on the device against single views on the CPU.

    Raises:
        OutputsDiffer: it exceeds the tolerance.
    """
    source = RoomsSource(case.law)
    batch = prepare(source, 0, case.request, device).render()
    cpu = prepare(source, 0, case.request, torch.device("cpu"))
    single = [render(cpu.scene, cpu.poses[[i]], cpu.intrinsics[[i]], cpu.size) for i in range(case.num_views)]
    expected = [torch.cat([view.depth for view in single]), torch.cat([view.normals for view in single])]
    return require_equal(f"{case.name}: batch against single views", (batch.depth, batch.normals), expected, TOLERANCE)


def load(case: Case, scenes: Sequence[int], device: torch.device | str = "cpu") -> None:
    """Samples of some scenes; runs in this or another process."""
    source = RoomsSource(case.law, device=device)
    for scene in scenes:
        source.load(scene, case.request)


def measure(case: Case, device: torch.device, repeats: Repeats, pool: Executor | None, processes: int) -> list[dict]:
    """One row for each variant."""
    error = check(case, device)
    ready = [prepare(RoomsSource(case.law), scene, case.request, device) for scene in range(SCENES_PER_TASK)]
    count = itertools.count(1)

    def some_scenes() -> Sequence[int]:
        first = SCENES_PER_TASK * next(count)
        return range(first, first + SCENES_PER_TASK)

    def together(pool: Executor) -> None:
        for done in [pool.submit(load, case, some_scenes()) for _ in range(processes)]:
            done.result()

    runs: dict[str, Run] = {
        "render": lambda: [scene.render() for scene in ready],
        "load": lambda: load(case, some_scenes(), device),
    }
    side_by_side: dict[str, tuple[Callable[[], object], int]] = {name: (run, 1) for name, run in runs.items()}
    if pool is not None:
        side_by_side[f"load, {processes} processes"] = (partial(together, pool), processes)
    timings = time_variants({name: run for name, (run, _) in side_by_side.items()}, device, repeats)
    views = SCENES_PER_TASK * case.num_views
    return [
        {
            "law": case.name,
            "size": f"{case.side}x{case.side}",
            "views per scene": case.num_views,
            "variant": name,
            "views/s": round(views * side_by_side[name][1] / timing.median, 1),
            "ms per view": round(1e3 * timing.median / (views * side_by_side[name][1]), 3),
            **milliseconds(timing),
            "batch error": f"{error:.1e}",
        }
        for name, timing in timings.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and publish."""
    parser = argument_parser("data", __doc__)
    parser.add_argument("--processes", type=int, default=1, help="also load in this many processes (CPU only)")
    args = parser.parse_args(arguments)
    device = parse_device(args)
    cases = TINY_CASES if args.tiny else GPU_CASES if device.type == "cuda" else CPU_CASES
    repeats = Repeats(warmup=1, rounds=3, seconds=0.5) if args.tiny else Repeats()
    report = Report("data", device, {"processes": args.processes, "scenes per repeat": SCENES_PER_TASK})
    with ExitStack() as stack:
        pool = None
        if args.processes > 1 and device.type == "cpu":
            pool = stack.enter_context(ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")))
        for case in cases:
            report.rows += measure(case, device, repeats, pool, args.processes)
    if device.type == "cpu":
        report.not_run.append("rendering on a GPU: no device was asked for")
    report.publish(args.output, args.note)


if __name__ == "__main__":
    main()
