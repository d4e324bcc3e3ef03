"""All tasks by name, and the questions of a scene."""

from itertools import islice

from g2vlm.data.qa.camera_tasks import CAMERA_TASKS
from g2vlm.data.qa.direction import DIRECTION_TASKS
from g2vlm.data.qa.drafts import Generator, Letters, finish, stream
from g2vlm.data.qa.facts import SceneFacts
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.room_tasks import ROOM_TASKS
from g2vlm.data.qa.rules import Rules
from g2vlm.errors import InputError

TASKS: dict[str, Generator] = {**ROOM_TASKS, **DIRECTION_TASKS, **CAMERA_TASKS}


def generate(facts: SceneFacts, task: str, rules: Rules, seed: int = 0, limit: int | None = None) -> list[Question]:
    """Questions of one task about a scene; the same whatever else is generated.

    Args:
        facts: of the scene.
        task: a key of `TASKS`.
        rules: what may be asked.
        seed: another seed gives other questions, or others first.
        limit: at most so many; None gives all.

    Raises:
        InputError: there is no such task.
    """
    if task not in TASKS:
        raise InputError(f"unknown task  {task}", "it has no generator", f"use one of {', '.join(TASKS)}")
    places = Letters(stream("letters", seed, facts.name, task))
    drafts = islice(TASKS[task](facts, rules, stream("items", seed, facts.name, task)), limit)
    return [finish(draft, facts.name, task, index, places) for index, draft in enumerate(drafts)]


def group(task: str) -> str:
    """The task without its variant: levels and numbers of options are averaged before tasks are."""
    for name in ("object_rel_distance", "object_rel_direction", "camera_movement_direction", "camera_obj_rel_dist",
                 "obj_obj_relative_pos"):  # fmt: skip
        if task.startswith(name):
            return name
    return task
