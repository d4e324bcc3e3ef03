"""What a step trains, put together from a config: the model, its supervision, the optimizer and the objectives."""

from typing import Any, NamedTuple

from torch import nn

from g2vlm.errors import InputError
from g2vlm.supervision.backbones import backbone_of
from g2vlm.supervision.base import SupervisedModel
from train.config import RunConfig
from train.engine import Engine
from train.objectives.geometry import GeometryObjective
from train.objectives.language import LanguageObjective
from train.objectives.report import Objective
from train.objectives.supervision import SupervisionParts, supervision_of, wanted
from train.optim import HeadGroup, build_optimizer
from train.start import starting_student
from train.step import Trainer
from train.student import Student
from train.trainable import set_trainable


class Assembled(NamedTuple):
    """A run's parts.

    Args:
        student: the model, and what a run needs of its kind.
        heads: modules of geometric supervision by name, which train with it; None without any.
        supervision: what they are compared with, and how.
        trainer: of all of them.
    """

    student: Student
    heads: nn.ModuleDict | None
    supervision: SupervisionParts | None
    trainer: Trainer

    @property
    def model(self) -> Any:
        """The plain model, as it is saved and exported."""
        return self.student.model


def assemble(config: RunConfig, engine: Engine) -> Assembled:
    """Build everything that trains.

    Raises:
        InputError: the config cannot be carried out.
        CheckpointError: the folder of the model is unusable.
        MissingExtra: something optional is not installed.
    """
    student = starting_student(config)
    model = student.model
    trained = set_trainable(model, config.trainable, student.groups)
    backbone = backbone_of(model)
    supervision = supervision_of(config, backbone)
    if config.runtime.gradient_checkpointing:
        student.recompute()
    whole = student.whole(backbone, supervision.modules if supervision else {})
    heads = whole.supervisions if supervision and isinstance(whole, SupervisedModel) else None
    wrapped = engine.wrap(whole)
    optimizer = build_optimizer(model, trained, config.trainable, config.optim, head_groups(config, supervision))
    objectives = [*build_objectives(config), *(supervision.objectives.values() if supervision else ())]
    return Assembled(student, heads, supervision, Trainer(engine, wrapped, optimizer, objectives, config.optim.clip))


def head_groups(config: RunConfig, supervision: SupervisionParts | None) -> list[HeadGroup]:
    """The modules of every supervision, with the multiplier of its learning rate."""
    if supervision is None:
        return []
    return [HeadGroup(name, own, getattr(config.objectives, name).lr) for name, own in supervision.modules.items()]


def build_objectives(config: RunConfig) -> list[Objective]:
    """The objectives that are on, geometric supervision left out.

    Raises:
        InputError: none is, or one has no data.
    """
    chosen, chat, supervised = config.objectives, config.data.chat, bool(wanted(config.objectives))
    idle = chat is not None and chosen.language is None and not supervised
    if idle or (chosen.language is not None and chat is None):
        given, lacking = ("data.chat", "objectives.language") if chat else ("objectives.language", "data.chat")
        fix = "give both, or a geometric supervision such as objectives.geovr" if chat else "give data.chat.sources"
        raise InputError(f"{given} without {lacking}", "questions and the loss of their answers go together", fix)
    objectives: list[Objective] = []
    if chosen.language is not None:
        objectives.append(LanguageObjective(chosen.language))
    if chosen.geometry is not None:
        objectives.append(GeometryObjective(chosen.geometry))
    if not objectives and not supervised:
        raise InputError(
            "nothing to minimise",
            "every objective is null",
            "give objectives.geometry, or questions and objectives.language",
        )
    return objectives
