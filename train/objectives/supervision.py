"""From a run's config to its geometric supervision: teachers, objectives, and whether the data have what they need."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from g2vlm.data.chat.batch import shown_clip
from g2vlm.data.chat.types import ChatSample, ChatSource
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.backbones import Backbone
from g2vlm.supervision.base import Supervision, TeacherFeatures
from g2vlm.supervision.teachers.base import Teacher, targets_of
from g2vlm.supervision.teachers.registry import build_teacher
from train.config import ObjectivesConfig, RunConfig
from train.objectives.base import SupervisionObjective

log = logging.getLogger(__name__)

OBJECTIVES = {
    "geovr": "train.objectives.geovr:GeoVRObjective",
    "gasp": "train.objectives.gasp:GASPObjective",
    "spatialsv": "train.objectives.spatialsv:SpatialSVObjective",
}
"""Field of `ObjectivesConfig` -> its objective."""

_TRIED = 20
"""Samples of a source that are looked at for a clip before the run starts."""


@dataclass(frozen=True)
class SupervisionParts:
    """The geometric supervision of a run.

    Args:
        objectives: by name, at least one.
        teachers: asked in order.
    """

    objectives: Mapping[str, SupervisionObjective]
    teachers: Sequence[Teacher]

    @property
    def modules(self) -> dict[str, Supervision]:
        """What trains with the model, by name."""
        return {name: objective.module for name, objective in self.objectives.items()}

    @property
    def probes(self) -> tuple[bool, bool]:
        """Whether sequences have camera tokens, and a scale token."""
        aux = [own.aux for own in self.modules.values() if own.aux is not None]
        return any(own.camera is not None for own in aux), any(own.scale is not None for own in aux)

    @property
    def offline(self) -> tuple[Teacher, ...]:
        """Teachers whom loader workers ask: all before the first that computes on the training device."""
        return tuple(self.teachers[: self._first_online])

    @property
    def online(self) -> tuple[Teacher, ...]:
        """The others, asked in the training process."""
        return tuple(self.teachers[self._first_online :])

    @property
    def _first_online(self) -> int:
        return next((i for i, own in enumerate(self.teachers) if own.online), len(self.teachers))


def supervision_of(config: RunConfig, backbone: Backbone) -> SupervisionParts | None:
    """The supervision that is on, its heads made for a backbone and the features of the first teacher with any.

    Raises:
        InputError: unknown teachers or options, or data that are not questions.
    """
    on = wanted(config.objectives)
    if not on:
        return None
    if config.data.chat is None:
        raise InputError(
            f"objectives.{next(iter(on))} without data.chat", "it supervises what the semantic expert knows of images",
            "give data.chat.sources, such as scene_clips",
        )  # fmt: skip
    teachers = [build_teacher(own.name, own.root and Path(own.root), **own.options) for own in config.teachers]
    features = next((own.features for own in teachers if own.features is not None), None)
    return SupervisionParts({name: _objective(name, own, backbone, features) for name, own in on.items()}, teachers)


def wanted(config: ObjectivesConfig) -> dict[str, Any]:
    """Name -> config of the supervision that is on."""
    return {name: own for name in OBJECTIVES if (own := getattr(config, name)) is not None}


def _objective(name: str, config: Any, backbone: Backbone, features: TeacherFeatures | None) -> SupervisionObjective:
    module, class_name = OBJECTIVES[name].split(":")
    try:
        return getattr(import_module(module), class_name).build(config, backbone, features)
    except ValueError as error:
        fix = f"see configs/extensions/{name}.yaml"
        raise InputError(f"unusable objectives.{name}", str(error), fix) from None


def check_needs(sources: Sequence[ChatSource], supervision: SupervisionParts, device: torch.device) -> None:
    """Look at a sample of every source before anything is trained; a source without clips teaches language alone.

    Raises:
        InputError: a source shows clips, and neither it nor the teachers know something that an objective needs; or no
            source shows any.
    """
    found = False
    for source in sources:
        sample = first_clip(source)
        scene = None if sample is None else shown_clip(sample)
        if sample is None or scene is None:
            log.info("%s shows no clips: it teaches language alone", source.name)
            continue
        targets = targets_of(supervision.teachers, Clip.of(scene).to(device))
        for name, objective in supervision.objectives.items():
            lacking = ["everything"] if targets is None else objective.needs.missing(targets)
            if lacking:
                raise InputError(
                    f"objectives.{name} cannot learn from {source.name}",
                    f"{', '.join(lacking)} of {sample.name} is known neither to the data nor to "
                    f"{', '.join(own.name for own in supervision.teachers) or 'any teacher'}",
                    "add a teacher that gives it to `teachers`, or set the weight of its term to 0",
                )
        found = True
    if not found:
        names = ", ".join(source.name for source in sources)
        raise InputError(
            f"objectives.{next(iter(supervision.objectives))} has nothing to learn from",
            f"no source of data.chat shows clips of scenes: {names}",
            "add one that does, such as scene_clips or rooms_qa",
        )


def first_clip(source: ChatSource) -> ChatSample | None:
    """The first that shows a clip among some samples from all over a source; None if none of them does."""
    tried = min(len(source), _TRIED)
    for place in range(tried):
        try:
            sample = source.load(place * len(source) // tried, 0)
        except InputError:
            continue
        if shown_clip(sample) is not None:
            return sample
    return None
