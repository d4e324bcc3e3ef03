"""Questions about single frames and about the camera's movement (VSTI-Bench), and the depth of a marked point (SPAR).

The camera's centre is the translation of camera-to-world; frames count from 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise

import numpy as np

from g2vlm.data.qa.boxes import point_distance
from g2vlm.data.qa.drafts import Draft, Generator
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject
from g2vlm.data.qa.question import Mark, frame_name
from g2vlm.data.qa.rules import Rules
from g2vlm.data.rooms.draws import Draws

DISTANCES = (0.2, 10.0)  # metres that are asked for
LEAST_CANDIDATE = 0.5  # metres from the camera to an option
LEAST_DIFFERENCE = 0.15  # metres between the distances of two options
SEPARATION = 0.15  # metres between the extents of two objects along an axis
DIRECTIONS = ("Forward", "Backward", "Left", "Right")
DEPTHS = (0.5, 10.0)  # metres of a marked point
BORDER = 4  # pixels between a marked point and the image's border
PATCH = 2  # pixels around a marked point over which its depth must not change
FLAT = 0.05  # by more than this share
POINT_TRIES = 64


def at(facts: SceneFacts, number: int) -> str:
    """How a question names a frame (from 0)."""
    return frame_name(number, len(facts.frames))


def _shuffled_frames(facts: SceneFacts, draws: Draws) -> list[int]:
    return draws.shuffled(range(len(facts.frames)))


def _camera_distance(frame: Frame, thing: SceneObject) -> float:
    return float(point_distance(frame.centre[None], thing.box)[0])


def camera_obj_abs_dist(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """Distance from the camera to a box, metres to one decimal."""
    shown = [(k, thing) for k, frame in enumerate(facts.frames) for thing in facts.named_in_frame(frame, rules)]
    for k, thing in draws.shuffled(shown):
        distance = _camera_distance(facts.frames[k], thing)
        if DISTANCES[0] <= distance <= DISTANCES[1]:
            question = (
                "What is the approximate distance (in meters) between the camera (or the person filming) and the "
                f"nearest point of the {thing.category} in {at(facts, k)}?"
            )
            yield Draft(question, f"{distance:.1f}", categories=(thing.category,))


def camera_obj_rel_dist(count: int, facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """Which of so many objects in a frame is nearest to the camera."""
    for k in _shuffled_frames(facts, draws):
        distances = {
            thing.category: distance
            for thing in facts.named_in_frame(facts.frames[k], rules)
            if (distance := _camera_distance(facts.frames[k], thing)) >= LEAST_CANDIDATE
        }
        for chosen in draws.shuffled(list(combinations(distances, count))):
            ranked = sorted(chosen, key=distances.__getitem__)
            if any(distances[b] - distances[a] < LEAST_DIFFERENCE for a, b in pairwise(ranked)):
                continue
            named = draws.shuffled(chosen)
            question = (
                f"Measuring from the closest point of each object, which of these objects ({', '.join(named)}) is the "
                f"closest to the camera in {at(facts, k)}?"
            )
            yield Draft(question, ranked[0], tuple(ranked[1:]), tuple(named))


def _frame_pairs(facts: SceneFacts, draws: Draws) -> list[tuple[int, int]]:
    return draws.shuffled(list(combinations(range(len(facts.frames)), 2)))


def camera_displacement(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """How far two frames were taken from each other, metres to one decimal."""
    least, most = rules.frame_gap
    for i, j in _frame_pairs(facts, draws):
        distance = float(np.linalg.norm(facts.frames[j].centre - facts.frames[i].centre))
        if least <= j - i <= most and DISTANCES[0] <= distance <= DISTANCES[1]:
            question = (
                f"Approximately how far (in meters) did the camera move between {at(facts, i)} and {at(facts, j)}?"
            )
            yield Draft(question, f"{distance:.1f}")


def camera_movement_direction(
    count: int, least: float, facts: SceneFacts, rules: Rules, draws: Draws
) -> Iterator[Draft]:
    """The camera's main direction of movement in its first frame, one of so many options; vertical motion is ignored.

    The movement in the first camera's frame is d = R' (t_end - t_start); the larger of |d_x| and |d_z| counts, z in a
    tie, and must exceed `least` metres.
    """
    for i, j in _frame_pairs(facts, draws):
        answer = movement(facts.frames[i], facts.frames[j], least, rules.dominance)
        if answer is None:
            continue
        wrong = draws.shuffled([name for name in DIRECTIONS if name != answer])[: count - 1]
        *listed, last = draws.shuffled([answer, *wrong])
        joined = ", ".join(listed) + (f", and {last}" if len(listed) > 1 else f" and {last}")
        question = (
            f"During the sequence between {at(facts, i)} and {at(facts, j)}, what was the primary consistent direction "
            f"of the camera's movement relative to its orientation at the start? The options are {joined}."
        )
        yield Draft(question, answer, tuple(wrong))


def movement(start: Frame, end: Frame, least: float, dominance: float) -> str | None:
    """The direction from one camera to another, or None where it is too short or between two directions."""
    x, _, z = start.to_camera(end.centre[None])[0]
    major, minor = max(abs(x), abs(z)), min(abs(x), abs(z))
    if major <= least or major < dominance * minor:
        return None
    if abs(z) >= abs(x):
        return "Forward" if z > 0 else "Backward"
    return "Right" if x > 0 else "Left"


def obj_obj_relative_pos(
    axis: int, names: tuple[str, str], wording: str, facts: SceneFacts, rules: Rules, draws: Draws
) -> Iterator[Draft]:
    """On which side of another an object is, along an axis of the camera along which the boxes are apart.

    `names` are the answers for the smaller and the larger coordinate.
    """
    shown = [
        (k, pair)
        for k, frame in enumerate(facts.frames)
        for pair in combinations(facts.named_in_frame(frame, rules), 2)
    ]
    for k, pair in draws.shuffled(shown):
        a, b = draws.shuffled(pair)
        first, second = (facts.frames[k].to_camera(thing.box.corners)[:, axis] for thing in (a, b))
        if second.min() - first.max() > SEPARATION:
            answer, other = names
        elif first.min() - second.max() > SEPARATION:
            other, answer = names
        else:
            continue
        question = f"In {at(facts, k)}, {wording.format(a=a.category, b=b.category)}"
        yield Draft(question, answer, (other,), (a.category, b.category))


@dataclass(frozen=True)
class Point:
    """A pixel and its depth in metres."""

    row: int
    column: int
    depth: float


def flat_point(frame: Frame, draws: Draws) -> Point | None:
    """A random pixel away from the border around which the depth does not jump; None where one try finds none."""
    if frame.depth is None:
        return None
    height, width = frame.size
    row, column = draws.integer(BORDER, height - 1 - BORDER), draws.integer(BORDER, width - 1 - BORDER)
    around = frame.depth[row - PATCH : row + PATCH + 1, column - PATCH : column + PATCH + 1]
    depth = float(frame.depth[row, column])
    flat = float(around.max() - around.min()) <= FLAT * depth
    return Point(row, column, depth) if DEPTHS[0] <= depth <= DEPTHS[1] and flat else None


def mark_at(view: int, frame: Frame, point: Point) -> Mark:
    """The dot on a pixel."""
    height, width = frame.size
    return Mark(view, (point.column + 0.5) / width, (point.row + 0.5) / height)


def point_depth(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """Depth of a red dot along the optical axis, metres to one decimal; not where the depth jumps nearby."""
    frames = [k for k, frame in enumerate(facts.frames) if frame.depth is not None]
    for _ in range(POINT_TRIES if frames else 0):
        k = draws.choice(frames)
        point = flat_point(facts.frames[k], draws)
        if point is None:
            continue
        question = (
            f"What is the depth of the point marked in red in {at(facts, k)}, measured along the viewing direction of "
            "the camera (in meters)?"
        )
        yield Draft(question, f"{point.depth:.1f}", marks=(mark_at(k, facts.frames[k], point),))


CAMERA_TASKS: dict[str, Generator] = {
    "camera_obj_abs_dist": camera_obj_abs_dist,
    "camera_obj_rel_dist_v1": partial(camera_obj_rel_dist, 4),
    "camera_obj_rel_dist_v2": partial(camera_obj_rel_dist, 3),
    "camera_obj_rel_dist_v3": partial(camera_obj_rel_dist, 2),
    "camera_displacement": camera_displacement,
    "camera_movement_direction_v1": partial(camera_movement_direction, 4, 1.0),
    "camera_movement_direction_v2": partial(camera_movement_direction, 3, 0.5),
    "camera_movement_direction_v3": partial(camera_movement_direction, 2, 0.5),
    "obj_obj_relative_pos_nf": partial(
        obj_obj_relative_pos, 2, ("Near", "Far"), "relative to the camera, is {a} [Near/Far] compared to {b}?"
    ),
    "obj_obj_relative_pos_lr": partial(
        obj_obj_relative_pos, 0, ("Left", "Right"), "relative to {b}, is {a} to the [Left/Right]?"
    ),
    "obj_obj_relative_pos_ud": partial(
        obj_obj_relative_pos, 1, ("Up", "Down"), "relative to {b}, is {a} to the [Up/Down]?"
    ),
    "point_depth": point_depth,
}
