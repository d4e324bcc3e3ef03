"""Questions over procedural rooms: a scene's views are rendered once, and its questions asked about them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from g2vlm.data.qa.balance import Balance
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.rules import STILLS, Rules
from g2vlm.data.qa.tasks import TASKS, generate
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.rooms.scene import FIXTURES
from g2vlm.data.rooms.source import Split
from g2vlm.data.types import SceneSample, ViewRequest

CANDIDATES = 6  # questions of each task that a scene offers
TOLD_BY_CATEGORY = ("object_size_estimation", "obj_obj_relative_pos_ud")


@dataclass(frozen=True, eq=False)
class AskedScene:
    """Views of a room and questions about them."""

    sample: SceneSample
    questions: tuple[Question, ...]


class RoomsQA:
    """A source of questions; equal requests give equal questions, and no held-out room is ever trained on.

    Args:
        split, seed, device: as of `RoomsSource`.
        law: the scenes; the default's sizes cannot be guessed from what a thing is.
        cameras: the views; the default moves and turns enough for every task.
        rules: what may be asked.
    """

    name = "rooms_qa"

    def __init__(
        self,
        split: Split = "train",
        seed: int = 0,
        law: str = "any_size",
        cameras: str = "inquiring",
        rules: Rules = STILLS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rooms = RoomsSource(law, split, seed, cameras, device)
        self.rules = rules

    def __len__(self) -> int:
        return len(self.rooms)

    def load(self, scene: int, request: ViewRequest, count: int = 1) -> AskedScene:
        """Views and at most `count` questions, of different tasks.

        Tasks that can rarely be asked go first where they can, and answers that occur often are kept less often, so
        that both come out nearly even over many scenes.

        Raises:
            InputError: as `RoomsSource.load`.
        """
        sample, candidates = self.candidates(scene, request)
        balance, draws = Balance.standard(), stream("choice", request.seed, sample.scene)
        kept = {task: q for task, items in candidates.items() if (q := balance.pick(items, draws)) is not None}
        chosen = balance.tasks(list(kept), count, draws)
        return AskedScene(sample, tuple(kept[task] for task in chosen))

    def candidates(self, scene: int, request: ViewRequest) -> tuple[SceneSample, dict[str, list[Question]]]:
        """Views and some questions of every task that they allow, whatever their answers."""
        sample = self.rooms.load(scene, request)
        facts = room_facts(self.rooms.scene(scene), sample)
        found = {}
        for task in TASKS:
            limit = None if task in TOLD_BY_CATEGORY else CANDIDATES
            questions = generate(facts, task, self.rules, request.seed, limit)
            if kept := [question for question in questions if not is_told(question)][:CANDIDATES]:
                found[task] = kept
        return sample, found


def is_told(question: Question) -> bool:
    """Whether naming a thing nearly tells the answer: doors, windows and pictures have real sizes and heights."""
    return question.task in TOLD_BY_CATEGORY and any(category in FIXTURES for category in question.categories)


def sweep(source: RoomsQA, request: ViewRequest, scenes: range) -> Iterator[tuple[int, dict[str, list[Question]]]]:
    """Each scene's number and candidates."""
    for scene in scenes:
        yield scene, source.candidates(scene, request)[1]
