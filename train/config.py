"""A training run as data: frozen dataclasses, read from one YAML file and dotted overrides, checked strictly.

The defaults are those of configs/tiny_stage1.yaml: a run without any file trains the tiny preset on a CPU.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from g2vlm.errors import InputError
from g2vlm.semantic_images import SemanticRule
from geometry import GeometryLossWeights
from train.objectives.gasp import GASPConfig
from train.objectives.geovr import GeoVRConfig
from train.objectives.spatialsv import SpatialSVConfig

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/tiny_stage1.yaml"


@dataclass(frozen=True)
class GeometryConfig(GeometryLossWeights):
    """The stage-1 objective: `weight` times the geometry loss with these weights of its terms."""

    normal_head: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class LanguageConfig:
    """The cross-entropy of the answers (G2VLM stage 2).

    Args:
        weight: of it in the loss.
        reduction: `token`: the mean over all tokens of answers (the released trainer's default); `sample_sqrt`: the
            tokens of an answer of n tokens weigh 1 / sqrt(n).
    """

    weight: float = 1.0
    reduction: Literal["token", "sample_sqrt"] = "token"


@dataclass(frozen=True)
class ObjectivesConfig:
    """What the model is trained for; an absent objective is off.

    Args:
        geometry: points, normals and cameras (G2VLM eq. 2).
        language: answers to questions; needs data.chat.
        geovr: camera, depth, metric scale and features of a teacher, from probe tokens and layers (GeoVR).
        gasp: correspondences between frames, in every layer (GASP).
        spatialsv: depth, rays, points and features of a teacher, lifted from four layers (SpatialSV).
    """

    geometry: GeometryConfig | None = field(default_factory=GeometryConfig)
    language: LanguageConfig | None = None
    geovr: GeoVRConfig | None = None
    gasp: GASPConfig | None = None
    spatialsv: SpatialSVConfig | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: experts learn through small matrices added to their projections (extra `lora`).

    Args:
        experts: semantic, geometric, or both. The expert's own weights stay as they are, its norms too; `trainable`
            must name its group, whose multiplier is that of the adapters.
        rank: inner width of an adapter.
        alpha: an adapter counts alpha / rank times.
        dropout: of an adapter's input.
        modules: projections that get one.
    """

    experts: tuple[str, ...] = ("semantic",)
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SourceConfig:
    """Where scenes come from.

    Args:
        name: of a source in g2vlm.data.registry.
        root: its folder; none for `rooms`.
        options: further arguments of the source.
    """

    name: str = "rooms"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherConfig:
    """What geometric supervision compares with.

    Args:
        name: of a teacher in g2vlm.supervision.teachers.registry.
        root: of its files, for one that has any.
        options: further arguments of the teacher.
    """

    name: str
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSourceConfig:
    """Where the geometry tokens come from that the model's fusion is given.

    Args:
        name: of a source in g2vlm.token_sources: `cache`, `geometric_expert` or `teacher`.
        root: of the cache, of the model whose expert it is, or of the teacher's files.
        options: further arguments of the source.
    """

    name: str = "cache"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatSourceConfig:
    """Where questions come from.

    Args:
        name: of a source in g2vlm.data.chat.registry.
        root: its file or folder; none for what is rendered.
        weight: share of the questions that come from it, relative to the others' weights.
        options: further arguments of the source.
    """

    name: str
    root: str | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatConfig:
    """Questions and answers, packed.

    Args:
        sources: of the training questions.
        validation: of the validation questions; none validates nothing.
        tokens_per_pack: most tokens of a process in a step; what stands in for absent images comes on top.
        view_size: height and width of all views of the geometry encoder, multiples of 14.
        images: how large the semantic encoder sees an image: squash: side of the square that it is first stretched to
            (768 in the release; null keeps the aspect ratio); min_pixels and max_pixels: limits of its area. By default
            as the processor of the model says.
        views_prompt: the sentence before the views; by default the processor's. What is given here is written into the
            processor of the trained model.
    """

    sources: tuple[ChatSourceConfig, ...]
    validation: tuple[ChatSourceConfig, ...] = ()
    tokens_per_pack: int = 40_960
    view_size: tuple[int, int] = (518, 518)
    images: SemanticRule | None = None
    views_prompt: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """What a step sees: scenes, or packed questions when `chat` is given.

    Args:
        source: of the training scenes.
        validation: of the validation scenes; null validates nothing. By default rooms seen as in rooms-heldout-v1, of
            another seed, so that none of its scenes is among them.
        views: fewest and most views of a scene, one number per step.
        width: of every view in pixels.
        aspect: lowest and highest height / width, one per step.
        images_per_step: views in a step over all processes; a step takes as many whole scenes as fit.
        scenes_multiple_of: the number of processes, or a multiple of it.
        color_augmentation: vary brightness, contrast, saturation, hue of the geometry encoder's views, and drop the
            colour now and then.
        chat: questions to train on in place of scenes; all other keys but color_augmentation are then without effect.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    validation: SourceConfig | None = field(
        default_factory=lambda: SourceConfig(options={"split": "heldout", "seed": 1, "cameras": "wide"})
    )
    views: tuple[int, int] = (2, 4)
    width: int = 84
    aspect: tuple[float, float] = (1.0, 1.0)
    images_per_step: int = 12
    scenes_multiple_of: int = 1
    color_augmentation: bool = True
    chat: ChatConfig | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up to the peak, then down to `final_lr`.

    Args:
        kind: `cosine`: half a cosine from the warm-up to the end; `constant`: the peak, then a straight line down over
            the last `decay` steps, so that a longer run only lengthens the level part.
        warmup: steps.
        decay: steps of the straight line of `constant`.
        final_lr: at the last step, before multipliers.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    warmup: int = 50
    decay: int = 0
    final_lr: float = 1e-6


@dataclass(frozen=True)
class OptimConfig:
    """AdamW.

    Args:
        lr: peak learning rate of a group with multiplier 1.
        betas, eps, weight_decay: AdamW's.
        clip: largest gradient norm.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class GuardConfig:
    """What is done about bad steps.

    Args:
        spike: after the warm-up, a batch whose loss exceeds this contributes zero (G2VLM appendix); null: never.
        window, max_dropped_share: the run stops when more than this share of the last `window` steps was dropped.
        max_dropped_in_a_row: the run stops after more dropped steps than this without a good one.
        max_bad_scenes_share: the run stops when more than this share of the scenes asked for was unreadable.
    """

    spike: float | None = 10.0
    window: int = 200
    max_dropped_share: float = 0.2
    max_dropped_in_a_row: int = 20
    max_bad_scenes_share: float = 0.1


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is carried out.

    Args:
        steps: length of the run.
        seed: of weights, data and everything else random.
        output: folder of the run; by default runs/<name of the config file>.
        resume: `auto`: go on from the newest checkpoint of `output` that verifies; null: start anew.
        changes: keys such as optim.lr whose values may differ from the checkpoint's that a run goes on from. Without
            it only a longer `steps` and what does not change the training may differ.
        engine: `auto`: DDP, or fsdp2 on GPUs; `ddp`: float32 replicas; `fsdp2`: sharded, bfloat16 on GPUs.
        device: cpu, cuda; by default a GPU when there is one.
        workers: loader processes per training process.
        gradient_checkpointing: recompute activations in backward.
        log_every, checkpoint_every, validate_every: intervals in steps; 0 = never.
        validation_steps: batches of a validation.
        keep: checkpoints to keep.
        tensorboard: also write TensorBoard events (extra `log`).
    """

    steps: int = 1700
    seed: int = 0
    output: str | None = None
    resume: Literal["auto"] | None = None
    changes: tuple[str, ...] = ()
    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 1
    gradient_checkpointing: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    validate_every: int = 250
    validation_steps: int = 8
    keep: int = 2
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run.

    Args:
        model: a preset, a checkpoint folder, a mapping {preset: name, key: value, part: {key: value}}, or a checkpoint
            folder that gets a fusion: {checkpoint: folder, fusion: {key: value}}; or the folder of a Qwen2-VL,
            Qwen2.5-VL or Qwen3-VL of transformers.
        trainable: group of parameters -> multiplier of its learning rate; an absent group is frozen. Groups:
            geometry_encoder, projection, geometric_expert, semantic_expert, embeddings, lm_head, geometry_heads,
            semantic_encoder, fusion; and merger, the part of the semantic encoder behind its tower. Of a stock model:
            language_model, embeddings, lm_head, vision_encoder, merger, deepstack_mergers.
        lora: adapters in place of the weights of the experts that it names; null: none.
        objectives: what is minimised.
        teachers: of the geometric supervision among the objectives, asked in order: each adds what those before it do
            not know about a clip.
        geometry_tokens: what the model's fusion is given, if `fusion.source` is `given`.
        data: what a step sees.
        schedule: learning rate over the run.
        optim: optimizer.
        guards: what is done about bad steps.
        runtime: how the run is carried out.
    """

    model: str | dict[str, Any] = "tiny"
    trainable: dict[str, float] = field(
        default_factory=lambda: {
            "geometry_encoder": 1.0,
            "projection": 1.0,
            "geometric_expert": 1.0,
            "geometry_heads": 1.0,
        }
    )
    lora: AdapterConfig | None = None
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    teachers: tuple[TeacherConfig, ...] = (TeacherConfig("ground_truth"),)
    geometry_tokens: TokenSourceConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def build_parser() -> ArgumentParser:
    """The command line: `--config FILE` and one dotted option for every field."""
    parser = ArgumentParser(
        prog="train.run",
        description="Train a model.\n\nexample: bash train/stage1_geometry.sh --optim.lr 1e-4 --runtime.steps 200",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_class_arguments(RunConfig, as_group=True)
    return parser


def parse(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    """The run that a command line asks for, and whether it wants tracebacks.

    Raises:
        InputError: an unknown key (the nearest valid one is named) or a value of the wrong type.
    """
    parser = build_parser()
    try:
        values = parser.parse_args([*arguments])
        made = parser.instantiate(values)
    except (ArgumentError, TypeError) as error:
        raise _readable(error) from None
    given = {f.name: made[f.name] for f in fields(RunConfig)}
    return RunConfig(**{**given, "model": _numbers(given["model"])}), bool(values.debug)


def _numbers(model: Any) -> Any:
    """The values of a model as YAML reads them; options such as --model.heads.depth 2 arrive as text."""
    if isinstance(model, dict):
        return {key: _numbers(value) if isinstance(value, dict) else _number(value) for key, value in model.items()}
    return model


def _number(value: Any) -> Any:
    read = yaml.safe_load(value) if isinstance(value, str) else value
    return read if isinstance(read, bool | int | float) else value


def load_config(file: Path) -> RunConfig:
    """The run that a YAML file describes; errors as in `parse`."""
    return parse(["--config", str(file)])[0]


def save_config(config: RunConfig, file: Path) -> None:
    """Write the resolved run as YAML that `load_config` reads back."""
    file.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON types."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def known_keys(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a run."""
    keys = []
    for entry in fields(kind):
        keys.append(prefix + entry.name)
        hint = get_type_hints(kind)[entry.name]
        for part in (hint, *getattr(hint, "__args__", ())):
            if is_dataclass(part) and isinstance(part, type):
                keys += known_keys(part, f"{prefix}{entry.name}.")
    return keys


def _readable(error: Exception) -> InputError:
    """jsonargparse's message as what, why and fix."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    unknown = re.search(r"(?:unrecognized arguments: --|[Oo]ption '|[Kk]ey ')([\w.]+)", text)
    place = re.search(r"Group '([\w.]+)'|Parser key \"([\w.]+)\"", text)
    if unknown:
        key = unknown[1] if place is None else f"{place[1] or place[2]}.{unknown[1]}"
        near = nearest_key(key)
        return InputError(
            f"unknown config key {key}",
            "no such option exists",
            f"did you mean {near}?" if near else "bash train/stage1_geometry.sh --help lists the options",
        )
    return InputError("unusable config", text, "bash train/stage1_geometry.sh --help lists the options and their types")


def nearest_key(key: str) -> str | None:
    """The known dotted key most like a wrong one, or None when nothing is like it."""
    keys = known_keys()
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    if near:
        return near[0]
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.6)
    return by_leaf[leaf[0]] if leaf else None
