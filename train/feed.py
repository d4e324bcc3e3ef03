"""What a run learns from, scenes or questions, behind one interface: batches in order and the model's inputs."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor
from torch.utils.data import Dataset

from g2vlm.chat_model import processor_of
from g2vlm.companions import PROCESSOR
from g2vlm.config import G2VLMConfig
from g2vlm.data.batch import SceneBatch
from g2vlm.data.chat.batch import ChatBatch, chat_inputs, collate_chats
from g2vlm.data.chat.jsonl import JsonlChats
from g2vlm.data.chat.layout import ChatLayout
from g2vlm.data.chat.types import ChatSample
from g2vlm.data.frames import FrameSource
from g2vlm.data.transforms import augment_colours
from g2vlm.data.types import SceneSource
from g2vlm.errors import InputError, TooManyBadFiles
from g2vlm.geometry_tokens import Clip
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.semantic_images import SemanticRule, semantic_grid
from g2vlm.sequence import GeometryAttention
from g2vlm.supervision.base import ClipShape
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.base import Teacher, targets_of
from g2vlm.weights import read_json
from train.config import DataConfig, RunConfig
from train.engine import Engine
from train.loader import BadSample, Batches, LoadedBatch, StepDataset, batches
from train.objectives.geometry import recon_batch_inputs
from train.objectives.supervision import SupervisionParts
from train.packing import ChatMixture, Item, PackStream, StepPlan
from train.sampler import Sampler
from train.tokens import GivenTokens

VALIDATION_SEED = 1_000_003


class Feed(Protocol):
    """Batches of one process, and what the model's forward takes for each."""

    @property
    def unit(self) -> str:
        """What `LoadedBatch.work` counts."""
        ...

    def batches(self, steps: range, start: int, workers: int) -> Iterator[LoadedBatch]:
        """The batches of consecutive steps; `start` is the `end` of the batch before, 0 for the first of a run."""
        ...

    def taught(self, batch: Any) -> Any:
        """A batch on the model's device with all that it is compared with."""
        ...

    def inputs(self, batch: Any, step: int) -> dict[str, Any]:
        """Keyword arguments of the model's forward for a batch on the model's device."""
        ...

    def given(self, batch: Any) -> Sequence[Tensor | None] | None:
        """The geometry tokens that each image of a batch reads; None where they are not given."""
        ...

    def scenes(self, batch: Any) -> SceneBatch | None:
        """The truth of the model's first scene, for a picture; None without any."""
        ...

    def write_files(self, folder: Path) -> None:
        """Complete the folder of a model with what it learned to expect."""
        ...


@dataclass(frozen=True)
class SceneFeed:
    """Scenes alone.

    Args:
        dataset: one batch per step.
        config: of the model.
        global_points: whether they are predicted.
        mixed: whether the sampler's coin chooses the attention where it is mixed; else it is global.
    """

    dataset: StepDataset
    config: G2VLMConfig
    global_points: bool
    mixed: bool
    unit: str = "views"

    def batches(self, steps: range, start: int, workers: int) -> Iterator[LoadedBatch]:
        """The step's number says everything."""
        return batches(self.dataset, steps, workers)

    def taught(self, batch: SceneBatch) -> SceneBatch:
        """As it is: scenes hold their truth."""
        return batch

    def inputs(self, batch: SceneBatch, step: int) -> dict[str, Any]:
        """The released reconstruction sequence for every scene."""
        coin = self.mixed and self.dataset.sampler.coin(step)
        return recon_batch_inputs(batch, self.config, coin, self.global_points)

    def given(self, batch: SceneBatch) -> None:
        """None: there are no images."""

    def scenes(self, batch: SceneBatch) -> SceneBatch | None:
        """All of them."""
        return batch

    def write_files(self, folder: Path) -> None:
        """Nothing."""


@dataclass(frozen=True)
class QuestionDataset(Dataset[LoadedBatch], ABC):
    """Maps the plan of a step to this rank's pack.

    Args:
        stream: that made the plan.
        teachers: asked here about every clip; None: nobody asks.
        tokens: of the images, made here; None: not here.
        clips: whether batches keep them, for who asks later.
        augment: change the views' colours at random.
    """

    stream: PackStream[Any]
    teachers: tuple[Teacher, ...] | None = None
    tokens: GivenTokens | None = None
    clips: bool = False
    augment: bool = False
    frame_sources: tuple[FrameSource, ...] = ()

    @abstractmethod
    def collated(self, samples: Sequence[ChatSample], plan: StepPlan) -> Any:
        """The batch of a plan's readable samples."""

    def __getitem__(self, plan: StepPlan) -> LoadedBatch:
        """The pack; questions whose pictures cannot be read, or taken by the heads, after all are left out of it."""
        bad = [*plan.bad]
        samples = [sample for item in plan.items if (sample := self._readable(item, bad)) is not None]
        batch = self.collated(samples, plan)
        batch = batch if self.tokens is None else self.tokens.complete(batch)
        batch = replace(batch, targets=self._taught(batch), clips=batch.clips if self.clips else ())
        facts = plan.facts
        return LoadedBatch(batch, tuple(bad), plan.step, facts["samples"], facts["tokens"], facts, plan.end)

    def _taught(self, batch: Any) -> tuple[TeacherTargets | None, ...]:
        if self.teachers is None:
            return ()
        return tuple(scene and targets_of(self.teachers, Clip.of(scene)) for scene in batch.clips)

    def _readable(self, item: Item, bad: list[BadSample]) -> ChatSample | None:
        try:
            sample = self.stream.mixture.sources[item.source].load(item.index, item.seed)
            if self.teachers is not None:
                require_one_grid(sample, self.stream.layout.rule)
        except TooManyBadFiles:
            raise
        except InputError as error:
            bad.append(BadSample(self.stream.name(item), str(error)))
            return None
        if sample.scene is None or not self.augment:
            return sample
        return replace(sample, scene=replace(sample.scene, images=augment_colours(sample.scene.images, item.seed)))


def require_one_grid(sample: ChatSample, rule: SemanticRule) -> None:
    """Refuse a clip that heads cannot take.

    Raises:
        InputError: its images have different numbers of rows or columns of patches.
    """
    if sample.clip is None:
        return
    sizes = dict.fromkeys(sample.shape.image_sizes[place] for place in sample.shape.image_order)
    if len({semantic_grid(size, rule) for size in sizes}) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise InputError(
            f"a clip of images of several sizes: {shown}", "heads compare frames of one grid",
            "give its images one size, or leave its source's `clips` off",
        )  # fmt: skip


@dataclass(frozen=True)
class PackDataset(QuestionDataset):
    """Packs of our own model: one sequence each.

    Args:
        mixed: whether the stream's coin chooses the attention.
    """

    mixed: bool = False

    def collated(self, samples: Sequence[ChatSample], plan: StepPlan) -> ChatBatch:
        """What the plan says is missing is filled in."""
        attention = ("frame" if self.stream.coin(plan.step) else "global") if self.mixed else None
        return collate_chats(samples, self.stream.layout, plan.filling, cast(GeometryAttention | None, attention))


@dataclass(frozen=True)
class QuestionFeed:
    """Packed questions, whatever the model.

    Args:
        dataset: of packs.
        rank, world: of the process.
        teachers: asked before a step, in the training process; None without supervision.
        tokens: of the images, made before a step; None: not here.
    """

    dataset: QuestionDataset
    rank: int
    world: int
    teachers: tuple[Teacher, ...] | None = None
    tokens: GivenTokens | None = None
    unit: str = "tokens"

    def batches(self, steps: range, start: int, workers: int) -> Iterator[LoadedBatch]:
        """Planned here, in order; workers only load."""
        plans = self.dataset.stream.plans(steps, start, self.rank, self.world)
        loader: Batches = self.dataset
        return batches(loader, plans, workers)

    def taught(self, batch: Any) -> Any:
        """With the geometry tokens that are made here, and what the teachers say that are asked here."""
        batch = batch if self.tokens is None else self.tokens.complete(batch)
        if not self.teachers:
            return batch
        device = batch.label_ids.device
        asked = zip(batch.clips, batch.targets, strict=True)
        targets = [scene and targets_of(self.teachers, Clip.of(scene).to(device), known) for scene, known in asked]
        return replace(batch, targets=tuple(own and own.to(device) for own in targets))


@dataclass(frozen=True)
class ChatFeed(QuestionFeed):
    """Packed questions to our own model.

    Args:
        geometry, global_points: what the geometry heads predict.
    """

    geometry: bool = False
    global_points: bool = False

    def inputs(self, batch: ChatBatch, step: int) -> dict[str, Any]:
        """Logits of the answers, geometry if it is learned, and the sizes of what heads are compared with."""
        inputs = chat_inputs(batch, self.geometry, self.global_points)
        if self.teachers is None:
            return inputs
        return inputs | {"shapes": [None if own is None else ClipShape.of(own) for own in batch.targets]}

    def given(self, batch: ChatBatch) -> Sequence[Tensor | None] | None:
        """Those of the batch."""
        return batch.tokens

    def scenes(self, batch: ChatBatch) -> SceneBatch | None:
        """The first, if its depth is known."""
        first = batch.scenes[0] if batch.scenes else None
        return first if first is not None and bool(first.valid.any()) else None

    def write_files(self, folder: Path) -> None:
        """The processor as the model was trained: image sizes, the sentence before the views, prompts of videos."""
        stream = self.dataset.stream
        trained = {
            "semantic_rule": stream.layout.rule.plain(),
            "views_prompt": stream.layout.views_prompt,
            "view_width": stream.view_size[1],
        }
        if prompts := {own.video_prompt for own in stream.mixture.sources if isinstance(own, JsonlChats)}:
            trained["trained_video_prompts"] = sorted(prompts)
        values = read_json(folder / PROCESSOR) | trained
        (folder / PROCESSOR).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_feed(
    config: RunConfig,
    source: SceneSource | ChatMixture,
    model: G2VLMForConditionalGeneration,
    engine: Engine,
    seed: int,
    varied: bool = True,
    supervision: SupervisionParts | None = None,
    tokens: GivenTokens | None = None,
) -> Feed:
    """What a run trains or validates on.

    Args:
        config: of the run.
        source: of scenes or questions.
        model: the model itself, not what the engine's `wrap` returned.
        engine: of the run.
        seed: of what is drawn.
        varied: change colours, and draw the attention where it is mixed; without it, it is global.
        supervision: whose targets and probe tokens the batches have.
        tokens: that the model's fusion is given.

    Raises:
        InputError: the data do not fit the model.
        CheckpointError: questions are asked, and the model has no tokenizer.
    """
    geometry = config.objectives.geometry
    augment = varied and config.data.color_augmentation
    mixed = varied and model.config.geometry_attention == "mixed"
    global_points = geometry is not None and bool(geometry.global_points)
    if isinstance(source, ChatMixture):
        offline, online = (None, None) if supervision is None else (supervision.offline, supervision.online)
        early, late = (None, tokens) if tokens is not None and tokens.source.online else (tokens, None)
        stream = build_stream(config, source, model, seed, supervision)
        asked_later = bool(online) or late is not None
        dataset = PackDataset(stream, offline, early, asked_later, augment, mixed=mixed)
        shown, points = geometry is not None, global_points and model.config.heads.global_points
        return ChatFeed(dataset, engine.rank, engine.world, online, late, geometry=shown, global_points=points)
    sampler = build_sampler(config.data, source, seed, model.config)
    return SceneFeed(StepDataset(sampler, engine.rank, engine.world, augment), model.config, global_points, mixed)


def build_sampler(config: DataConfig, source: SceneSource, seed: int, model: G2VLMConfig) -> Sampler:
    """The sampler of a run; the single encoder needs sides that its patch merger divides."""
    patch = model.geometry_encoder.patch_size
    return Sampler(
        sources=(source,),
        seed=seed,
        views=config.views,
        width=config.width,
        aspect=config.aspect,
        images_per_step=config.images_per_step,
        scenes_multiple_of=config.scenes_multiple_of,
        side_multiple_of=patch * model.semantic_encoder.merge_size if model.encoders == "single" else patch,
    )


def build_stream(
    config: RunConfig,
    mixture: ChatMixture,
    model: G2VLMForConditionalGeneration,
    seed: int,
    supervision: SupervisionParts | None = None,
) -> PackStream:
    """The stream of packs of a run; errors as in `build_feed`."""
    chat = config.data.chat
    assert chat is not None
    processor = processor_of(model.config)
    rule = processor.rule if chat.images is None else chat.images
    prompt = processor.views_prompt if chat.views_prompt is None else chat.views_prompt
    probes = (False, False) if supervision is None else supervision.probes
    layout = ChatLayout(processor.chat, model.config, rule, prompt, *probes)
    layout.views(1, chat.view_size)
    apart = model.geometry_encoder.keeps_images_apart
    return PackStream(
        mixture, layout, seed, chat.tokens_per_pack, chat.view_size,
        scenes_alone=not apart, always_image=supervision is not None,
    )  # fmt: skip
