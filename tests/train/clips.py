"""A small source of clips for tests: views of the box room as semantic images, with a question or without."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from g2vlm.data.chat.batch import ChatBatch, Filling, chat_inputs, collate_chats
from g2vlm.data.chat.types import ChatSample, ChatShape, ImageAt
from g2vlm.data.types import ViewRequest
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import ClipShape
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.gasp import GASPHeads
from g2vlm.supervision.geovr import GeoVRHeads
from g2vlm.supervision.spatialsv import SpatialSVHeads
from g2vlm.supervision.teachers.base import targets_of
from geometry.correspondence import TrackRule
from tests.train.chats import CE, chat_run, layout
from tests.train.scenes import BoxRooms
from train.config import ChatSourceConfig, LanguageConfig, ObjectivesConfig, RunConfig
from train.objectives.gasp import GASPConfig
from train.objectives.geovr import AlignmentTerm, CameraTerm, DepthTerm, GeoVRConfig
from train.objectives.spatialsv import SpatialSVConfig
from train.objectives.supervision import SupervisionParts
from train.step import StepResult, Trainer

SMALL_HEADS = GeoVRHeads(dpt_levels=(4, 4, 8, 8), dpt_dim=8, camera_dim=16, scale_dim=16)
LIFTING = SpatialSVHeads(output_dim=16, widths=DPTWidths((4, 4, 8, 8), 8), distill=False)
GASP = GASPConfig(GASPHeads(embed_dim=16), tracks=TrackRule(grids=((6, 6),)))
SPATIALSV = SpatialSVConfig(LIFTING)
GEOVR = GeoVRConfig(CameraTerm(), DepthTerm(min_pixels=1), alignment=AlignmentTerm(weight=0.0), heads=SMALL_HEADS)


@dataclass(frozen=True)
class BoxClips:
    """Which of the sizes is the room?

    Args:
        views: of a clip; 0: the question stands alone.
        asked: whether there is a question.
        depth: whether the depth is known.
    """

    views: int = 2
    asked: bool = True
    depth: bool = True
    num_samples: int = 40
    size: tuple[int, int] = (56, 56)
    name: str = field(default="box_clips")

    def __len__(self) -> int:
        return self.num_samples

    def shape(self, index: int, seed: int) -> ChatShape:
        return self.load(index, seed).shape

    def load(self, index: int, seed: int) -> ChatSample:
        number, answer = index % 8, str(index % 8) if self.asked else None
        parts = (*(ImageAt(i) for i in range(self.views)), "What size?")
        if not self.views:
            return ChatSample(parts, answer, name=f"{self.name}/{index}", task="size")
        scene = BoxRooms().load(number, ViewRequest(self.views, self.size, seed))
        scene = scene if self.depth else replace(scene, depth=None, valid=None)
        images = tuple(image.permute(1, 2, 0).numpy() for image in scene.images)
        return ChatSample(parts, answer, images, None, f"{self.name}/{index}", "size", (), scene)


def clip_run(
    steps: int = 4, trainable: dict[str, float] = CE, language: bool = True, every: bool = False, **runtime: Any
) -> RunConfig:
    """As `chat_run`, with GeoVR, or with every supervision."""
    plain = chat_run(steps, trainable, **runtime)
    chat = plain.data.chat
    assert chat is not None
    others = {"gasp": GASP, "spatialsv": SPATIALSV} if every else {}
    objectives = ObjectivesConfig(None, LanguageConfig() if language else None, GEOVR, **others)
    sources = (ChatSourceConfig("box_clips"),)
    return replace(plain, objectives=objectives, data=replace(plain.data, chat=replace(chat, sources=sources)))


def clip_pack(
    samples: Sequence[ChatSample], supervision: SupervisionParts, filling: Filling | None = None
) -> ChatBatch:
    """As the loop makes it."""
    camera, scale = supervision.probes
    batch = collate_chats(samples, layout(camera_probes=camera, scale_probe=scale), filling)
    targets = tuple(scene and targets_of(supervision.teachers, Clip.of(scene)) for scene in batch.clips)
    return replace(batch, targets=targets)


def clip_inputs(batch: ChatBatch, geometry: bool = False) -> dict[str, Any]:
    shapes = [None if own is None else ClipShape.of(own) for own in batch.targets]
    return chat_inputs(batch, geometry, geometry) | {"shapes": shapes}


def clip_steps(trainer: Trainer, batches: Sequence[ChatBatch], **options: Any) -> list[StepResult]:
    """One step per batch."""
    return [trainer.step(clip_inputs(batch), batch, **options) for batch in batches]
