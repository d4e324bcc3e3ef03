"""Training steps of both stages: tokens a second, model-FLOP utilisation, memory; and what a frozen expert saves.

The steps are those of the training configs (`tiny_*` for the preset tiny, else those of the paper): what is trained,
objectives, clipping, engine, recomputation, sizes of views and images, tokens or views of one process. Weights and
data are random, and the learning rate is 0, so that all steps compute the same. A step is forward, losses, backward,
clipping and AdamW; its batch is already on the device.

`no_grad` is the model's way with a frozen geometric expert: nothing of its stream is kept for backward.
`differentiated` lets the gradient through that stream, on the same weights and batch. Their answers are equal, their
gradients are not: the second also reaches the text before the views.

`MFU %` is the FLOPs of the model's way (`benchmarks.training_model`) at the rate of a large matrix product measured in
this process (bf16 on a GPU, fp32 on a CPU), over the measured time.
"""

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    Repeats,
    Report,
    Run,
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
from benchmarks.models import add_preset_option, chosen_preset, random_model, random_views
from benchmarks.training_model import training_flops
from benchmarks.work_model import Ceilings, Workload, attention_plan
from g2vlm.companions import preset_rule
from g2vlm.config import PRESETS
from g2vlm.data.batch import SceneBatch, collate
from g2vlm.data.chat.batch import ChatBatch, chat_inputs
from g2vlm.data.types import SceneSample
from g2vlm.model.decoder import MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import sequence_builder
from g2vlm.semantic_images import semantic_grid
from g2vlm.sequence import IGNORED, GeometryViews, Segment, SemanticImage, Text
from train.assemble import build_objectives
from train.config import RunConfig, load_config
from train.engine import Engine, engine
from train.objectives.geometry import recon_batch_inputs
from train.optim import build_optimizer
from train.step import Trainer
from train.trainable import checkpoint_activations, set_trainable

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STEPS = {"stage 1": "stage1_518", "CE": "stage2_g2vlm", "CE + CE": "stage2_g2vlm_sr", "VG + CE": "stage2_vg_ce"}
TINY_STEPS = {
    "stage 1": "tiny_stage1",
    "CE": "tiny_stage2",
    "CE + CE": "tiny_stage2_sr",
    "VG + CE": "tiny_stage2_vg_ce",
}
QA_VIEWS = 8
"""Views and semantic images of a question."""
HEADER, QUESTION, ANSWER = 30, 240, 30
"""Tokens of a question's text: before the views, after the images, and of the answer without its end."""
PHOTO = (1024, 1024)
TOLERANCES = {"cpu": 1e-3, "cuda": 1e-1}
"""Largest relative error of the logits between two variants."""


Variant = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Case:
    """A trainer and its batch.

    Args:
        name: of the step.
        config: of the run.
        trainer, model: over random weights.
        work, count: a sample of the batch, and how many there are.
        batch, inputs: of the step, on the device.
    """

    name: str
    config: RunConfig
    trainer: Trainer
    model: G2VLMForConditionalGeneration
    work: Workload
    count: int
    batch: SceneBatch | ChatBatch
    inputs: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        """Of the decoder."""
        return self.count * attention_plan(self.model.config, self.work).num_queries

    def flops(self, cut: bool = True) -> int:
        """Of the step; see `training_flops`."""
        return self.count * training_flops(self.model.config, self.work, self.config.trainable, cut).total

    def step(self, variant: Variant) -> None:
        """One step."""
        with variant():
            result = self.trainer.step(self.inputs, self.batch)
        assert result.dropped is None, "a loss or a gradient is not finite"

    def logits(self, variant: Variant) -> list[Tensor]:
        """Of the answers, if any."""
        with variant():
            output = self.trainer.model(**self.inputs)
        return [] if output.logits is None else [output.logits.detach()]


# Random data.


def scene_of(num_views: int, height: int, width: int) -> SceneSample:
    """Views whose depth is smooth, from cameras that see the same."""
    images = random_views(num_views, height, width, torch.device("cpu"))
    focal = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    return SceneSample(
        images=(255 * images).to(torch.uint8),
        depth=1 + images[:, 0],
        intrinsics=focal.expand(num_views, 3, 3),
        cam_to_world=torch.eye(4).expand(num_views, 4, 4),
    )


def scene_work(config: RunConfig, model: G2VLMForConditionalGeneration, tiny: bool) -> tuple[Workload, int]:
    """The scenes of one process: as many as its share of a step holds, each with the most views."""
    data, geometry = config.data, config.objectives.geometry
    views, side = (2, 28) if tiny else (data.views[1], data.width)
    count = 1 if tiny else max(data.images_per_step // data.scenes_multiple_of // views, 1)
    points = geometry is not None and bool(geometry.global_points)
    return Workload(views, side, side, 1 + len(model.config.tokens.recon_prompt), global_points=points), count


def scene_batch(model: G2VLMForConditionalGeneration, work: Workload, count: int) -> tuple[SceneBatch, Any]:
    """Scenes, and the model's inputs given a batch."""
    batch = collate([scene_of(work.num_views, work.height, work.width)] * count)
    return batch, lambda moved: recon_batch_inputs(moved, model.config, False, work.global_points)


def chat_work(config: RunConfig, model: G2VLMForConditionalGeneration, tiny: bool) -> tuple[Workload, int]:
    """The questions of one process: as many as a pack holds."""
    chat, geometry = config.data.chat, config.objectives.geometry
    assert chat is not None
    views, size = (1, (28, 28)) if tiny else (QA_VIEWS, chat.view_size)
    grid = (4, 4) if tiny else semantic_grid(PHOTO, chat.images or preset_rule(model.config))
    work = Workload(
        views, *size, HEADER, images=(grid,) * views, question_tokens=QUESTION + ANSWER + 1, num_logits=ANSWER,
        geometry=geometry is not None, global_points=geometry is not None and bool(geometry.global_points),
    )  # fmt: skip
    fits = chat.tokens_per_pack // attention_plan(model.config, work).num_queries
    return work, 1 if tiny else max(fits, 1)


def chat_batch(model: G2VLMForConditionalGeneration, work: Workload, count: int) -> tuple[ChatBatch, Any]:
    """A pack of equal questions, and the model's inputs given a batch."""
    tower = model.config.semantic_encoder
    views = GeometryViews((work.grid(model.config.geometry_encoder.patch_size),) * work.num_views)
    images = [SemanticImage(grid, tower.merge_size) for grid in work.images]
    texts = [Text((5,) * HEADER), Text((6,) * QUESTION), Text((7,) * ANSWER, supervised=True)]
    segments: list[Segment] = [texts[0], views, *images, *texts[1:]]
    sequence = sequence_builder(model.config).build([segments] * count)
    grids = torch.tensor([[1, *grid] for grid in work.images] * count)
    values = 3 * tower.temporal_patch_size * tower.patch_size**2
    patches = torch.randn(count * sum(map(math.prod, work.images)), values, generator=torch.Generator().manual_seed(0))
    batch = ChatBatch(
        sequence=sequence,
        scenes=tuple(collate([scene_of(work.num_views, work.height, work.width)]) for _ in range(count)),
        pixel_values=patches,
        image_grid_thw=grids,
        supervised=(sequence.labels != IGNORED).nonzero().flatten(),
        names=("random",) * count,
        tasks=("random",) * count,
    )
    return batch, lambda moved: chat_inputs(moved, work.geometry, work.global_points)


# The benchmark.


def make_case(name: str, file: Path, preset: str, alone: Engine, tiny: bool) -> Case:
    """A step of a config, with the preset's model in place of the config's."""
    config = load_config(file)
    torch.manual_seed(0)
    model = random_model(PRESETS[preset](), alone.device, torch.float32).train()
    trained = set_trainable(model, config.trainable)
    if config.runtime.gradient_checkpointing:
        checkpoint_activations(model)
    wrapped = alone.wrap(model)
    optimizer = build_optimizer(model, trained, config.trainable, replace(config.optim, lr=0.0))
    trainer = Trainer(alone, wrapped, optimizer, build_objectives(config), config.optim.clip)
    chat = config.data.chat is not None
    work, count = (chat_work if chat else scene_work)(config, model, tiny)
    batch, inputs_of = (chat_batch if chat else scene_batch)(model, work, count)
    batch = batch.to(alone.device)
    return Case(name, config, trainer, model, work, count, batch, inputs_of(batch))


@contextmanager
def differentiated() -> Iterator[None]:
    """Let the gradient through the stream of a frozen geometric expert."""
    cuts = MoTLayer._is_frozen
    MoTLayer._is_frozen = lambda self, geometry: False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        MoTLayer._is_frozen = cuts


def variants(case: Case) -> dict[str, Variant]:
    """One, or two where the geometric expert is frozen."""
    frozen = {"geometry_encoder", "projection", "geometric_expert"}.isdisjoint(case.config.trainable)
    return {"no_grad": nullcontext, "differentiated": differentiated} if frozen else {"trained": nullcontext}


def kept_bytes(case: Case, variant: Variant) -> int:
    """Bytes that a forward keeps for backward besides the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in case.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with variant(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = case.trainer.model(**case.inputs)
        reports = [objective(output, case.batch) for objective in case.trainer.objectives]
    assert reports
    return sum(kept.values())


def measure(case: Case, ceilings: Ceilings, repeats: Repeats) -> list[dict[str, object]]:
    """The rows of one step."""
    device, ways = case.trainer.engine.device, variants(case)
    runs: dict[str, Run] = {name: partial(case.step, variant) for name, variant in ways.items()}
    if len(ways) > 1:
        expected, given = (case.logits(variant) for variant in ways.values())
        require_equal("a differentiated frozen expert", given, expected, TOLERANCES[device.type])
    timings = time_variants(runs, device, repeats)
    first, rows = next(iter(timings.values())), []
    for name, variant in ways.items():
        timing = timings[name]
        rows.append(
            {
                "step": case.name,
                "variant": name,
                "time / first": round(timing.median / first.median, 3),
                "MFU %": round(100 * case.flops() / ceilings.gemm_flops / timing.median, 1),
                "tokens/s": round(case.num_tokens / timing.median, 1),
                **milliseconds(timing),
                "samples": case.count,
                "tokens": case.num_tokens,
                "TFLOP": round(case.flops(cut=name != "differentiated") / 1e12, 4),
                "peak GB": gigabytes(peak_memory(runs[name], device)),
                "kept GB": gigabytes(kept_bytes(case, variant)) if device.type == "cpu" else None,
            }
        )
    return rows


def run(args: argparse.Namespace) -> Report:
    """All steps, one model after the other."""
    device = parse_device(args)
    preset = chosen_preset(args, device)
    files = TINY_STEPS if preset == "tiny" else STEPS
    repeats = chosen_repeats(args)
    ceilings = measure_ceilings(device, args.tiny, args.cpu_time)
    settings = {"preset": preset, "compute": "bfloat16" if device.type == "cuda" else "float32", "weights": "random"}
    settings |= {"tolerance": TOLERANCES[device.type], "CPU time": args.cpu_time}
    report = Report("train_step", device, settings, chosen_attention(), ceilings)
    with engine("auto", device.type) as alone:
        for name in args.steps or files:
            case = make_case(name, CONFIGS / f"{files[name]}.yaml", preset, alone, args.tiny)
            report.rows += measure(case, ceilings, repeats)
            del case
            gc.collect()
    report.notes.append("MFU %: the denominator is a matrix product of this process; recomputation is no work")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, time and report."""
    parser = argument_parser("train_step", __doc__)
    add_preset_option(parser)
    parser.add_argument("--steps", choices=STEPS, nargs="+", help="default: all")
    args = parser.parse_args(arguments)
    run(args).publish(args.output, args.note)


if __name__ == "__main__":
    main()
