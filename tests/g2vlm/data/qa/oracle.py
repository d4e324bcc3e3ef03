"""Answers by brute force, from the words of a question and the state of the scene: no code of the generators.

Distances come from a general convex solver, directions from complex numbers, depths from tracing a ray, cameras from
the inverse of their poses.
"""

import re

import numpy as np
from scipy.optimize import lsq_linear

from g2vlm.data.qa.facts import Frame, SceneFacts
from g2vlm.data.qa.question import Question


def between(first, second) -> float:
    """Smallest |(c1 + R1 x) - (c2 + R2 y)| over |x| <= s1 / 2, |y| <= s2 / 2."""
    matrix = np.hstack([first.rotation, -second.rotation])
    bound = np.concatenate([first.size, second.size]) / 2
    solved = lsq_linear(matrix, second.centre - first.centre, (-bound, bound), method="bvls", tol=1e-14)
    return float(np.sqrt(2 * solved.cost))


def from_point(point: np.ndarray, box) -> float:
    """Smallest |c + R x - p|."""
    solved = lsq_linear(box.rotation, point - box.centre, (-box.size / 2, box.size / 2), method="bvls", tol=1e-14)
    return float(np.sqrt(2 * solved.cost))


def things(facts: SceneFacts, category: str) -> list:
    return [thing.box for thing in facts.objects if thing.category == category]


def named(facts: SceneFacts, category: str):
    (box,) = things(facts, category)
    return box


def nearest_between(facts: SceneFacts, first: str, second: str) -> float:
    return min(between(a, b) for a in things(facts, first) for b in things(facts, second))


def frame_of(facts: SceneFacts, words: str) -> Frame:
    number, total = map(int, re.fullmatch(r"frame (\d+) of (\d+)", words).groups())
    assert total == len(facts.frames)
    return facts.frames[number - 1]


def in_frame(facts: SceneFacts, frame: Frame, category: str):
    shown = {sighting.instance for sighting in frame.sightings}
    (box,) = [thing.box for thing in facts.objects if thing.category == category and thing.instance in shown]
    return box


def in_camera(frame: Frame, points: np.ndarray) -> np.ndarray:
    world_to_cam = np.linalg.inv(frame.cam_to_world)
    return (np.hstack([points, np.ones((len(points), 1))]) @ world_to_cam.T)[:, :3]


def position(frame: Frame) -> np.ndarray:
    """Where a camera is: the point that its inverse pose takes to the origin."""
    world_to_cam = np.linalg.inv(frame.cam_to_world)
    return np.linalg.solve(world_to_cam[:3, :3], -world_to_cam[:3, 3])


def corners(box) -> np.ndarray:
    steps = np.stack(np.meshgrid(*[(-1, 1)] * 3), -1).reshape(-1, 3)
    return box.centre + (steps * box.size / 2) @ box.rotation.T


# One answer per task: the text of the right option, or a number before rounding.


def object_counting(facts, question: Question):
    (category,) = re.fullmatch(r"How many (.+)\(s\) are in this room\?", question.question).groups()
    return sum(thing.category == category for thing in facts.objects)


def object_size_estimation(facts, question: Question):
    (category,) = re.search(r"of the (\w+), measured in centimeters", question.question).groups()
    points = corners(named(facts, category))
    edges = np.unique(np.linalg.norm(points[:, None] - points[None], axis=-1).round(9))
    lengths = [edge for edge in edges if any(abs(edge - size) < 1e-6 for size in named(facts, category).size)]
    return 100 * max(lengths)


def room_size_estimation(facts, question: Question):
    return facts.room_area


def object_abs_distance(facts, question: Question):
    first, second = re.search(r"between the (\w+) and the (\w+) \(in meters\)", question.question).groups()
    return between(named(facts, first), named(facts, second))


def object_rel_distance(facts, question: Question):
    listed, primary = re.search(r"objects \((.+)\) is the closest to the (\w+)\?", question.question).groups()
    return min(listed.split(", "), key=lambda name: nearest_between(facts, primary, name))


def object_rel_direction(facts, question: Question):
    stand, facing, query = re.search(r"by the (\w+) and facing the (\w+), is the (\w+) to", question.question).groups()
    a, b, c = (complex(*named(facts, name).centre[:2]) for name in (stand, facing, query))
    turn = (c - a) / (b - a)  # counter-clockwise from the way one faces
    left = turn.imag > 0
    if "quadrants" in question.question:
        return f"{'front' if turn.real > 0 else 'back'}-{'left' if left else 'right'}"
    behind = turn.real < 0 and abs(turn.imag) < -turn.real
    return "back" if behind else "left" if left else "right"


def obj_appearance_order(facts, question: Question):
    listed = re.search(r"in the video: (.+)\?", question.question).group(1).split(", ")
    first = {}
    for number, frame in enumerate(facts.frames):
        for sighting in frame.sightings:
            for thing in facts.objects:
                if thing.instance == sighting.instance:
                    first.setdefault(thing.category, number)
    return ", ".join(sorted(listed, key=first.__getitem__))


def camera_obj_abs_dist(facts, question: Question):
    category, words = re.search(r"nearest point of the (\w+) in (.+)\?", question.question).groups()
    frame = frame_of(facts, words)
    return from_point(position(frame), in_frame(facts, frame, category))


def camera_obj_rel_dist(facts, question: Question):
    listed, words = re.search(r"objects \((.+)\) is the closest to the camera in (.+)\?", question.question).groups()
    frame = frame_of(facts, words)
    return min(listed.split(", "), key=lambda name: from_point(position(frame), in_frame(facts, frame, name)))


def camera_displacement(facts, question: Question):
    frames = [frame_of(facts, words) for words in re.findall(r"frame \d+ of \d+", question.question)]
    return float(np.linalg.norm(position(frames[0]) - position(frames[1])))


def camera_movement_direction(facts, question: Question):
    start, end = (frame_of(facts, words) for words in re.findall(r"frame \d+ of \d+", question.question))
    x, _, z = in_camera(start, position(end)[None])[0]
    options = {"Forward": z, "Backward": -z, "Right": x, "Left": -x}
    return max(options, key=options.__getitem__)


def obj_obj_relative_pos(facts, question: Question):
    frame = frame_of(facts, re.match(r"In (frame \d+ of \d+),", question.question).group(1))
    if "compared to" in question.question:
        a, b = re.search(r"is (\w+) \[Near/Far\] compared to (\w+)\?", question.question).groups()
        axis, names = 2, ("Near", "Far")
    else:
        b, a, sides = re.search(r"relative to (\w+), is (\w+) to the \[(.+)\]", question.question).groups()
        axis, names = ("Left/Right", "Up/Down").index(sides), tuple(sides.split("/"))
    middles = [in_camera(frame, in_frame(facts, frame, name).centre[None])[0, axis] for name in (a, b)]
    return names[0] if middles[0] < middles[1] else names[1]
