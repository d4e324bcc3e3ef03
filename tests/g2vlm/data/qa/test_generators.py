"""Every generator against an oracle that reads the question; margins, order of objects, seeds, letters."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from g2vlm.data.qa.facts import SceneFacts
from g2vlm.data.qa.question import Question, option_text
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.rules import STILLS, Rules
from g2vlm.data.qa.tasks import TASKS, generate, group
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError
from tests.g2vlm.data.qa import oracle
from tests.g2vlm.data.qa.random_scenes import random_facts, shuffled
from tests.g2vlm.data.rooms_oracle import trace

LIMIT = 12
DECIMALS = {"object_counting": 0, "object_size_estimation": 0}


@pytest.fixture(scope="module")
def rooms() -> list[tuple]:
    """Rooms with their facts."""
    source = RoomsSource("any_size", cameras="inquiring", seed=5)
    samples = [source.load(k, ViewRequest(4, (84, 84), 0)) for k in range(10)]
    return [(source.scene(k), sample, room_facts(source.scene(k), sample)) for k, sample in enumerate(samples)]


def all_facts(rooms: list[tuple]) -> list[SceneFacts]:
    return [facts for _, _, facts in rooms] + [random_facts(seed) for seed in range(12)]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "point_depth"])
def test_answers_are_the_oracle_s(rooms, task: str) -> None:
    answer_of, seen = getattr(oracle, group(task)), 0
    for facts in all_facts(rooms):
        for question in generate(facts, task, STILLS, limit=LIMIT):
            expected, seen = answer_of(facts, question), seen + 1
            if question.kind == "choice":
                assert question.answer_text == expected, question
            else:
                step = 10.0 ** -DECIMALS.get(task, 1)
                assert abs(float(question.answer) - expected) <= 0.5 * step + 1e-6, question
                assert re.fullmatch(r"\d+" if task in DECIMALS else r"\d+\.\d", question.answer)
    assert seen >= 8


def test_marked_depths_are_those_of_a_traced_ray(rooms) -> None:
    for scene, sample, facts in rooms:
        for question in generate(facts, "point_depth", STILLS, limit=LIMIT):
            (mark,) = question.marks
            assert f"in frame {mark.view + 1} of 4," in question.question
            height, width = sample.size
            pixel = np.array([mark.x * width - 0.5, mark.y * height - 0.5, 1.0])
            frame = facts.frames[mark.view]
            ray = frame.cam_to_world[:3, :3] @ np.linalg.inv(frame.intrinsics) @ pixel  # z = 1 in the camera
            depth = trace(scene, frame.cam_to_world[:3, 3], ray[None]).depth[0]
            assert abs(float(question.answer) - depth) <= 0.05 + 1e-3, question


def test_marks_keep_clear_of_jumps_in_depth(rooms) -> None:
    for _, sample, facts in rooms:
        for question in generate(facts, "point_depth", STILLS, limit=LIMIT):
            mark = question.marks[0]
            row, column = int(mark.y * 84), int(mark.x * 84)
            assert 4 <= row < 80
            assert 4 <= column < 80
            around = sample.depth[mark.view, row - 2 : row + 3, column - 2 : column + 3]
            assert float(around.max() / around.min()) < 1.06


# Margins.


def test_relative_distances_differ_by_the_margin(rooms) -> None:
    for facts in all_facts(rooms):
        margin = 0.3 if facts.room_area > 40 else 0.15
        for question in generate(facts, "object_rel_distance_v2", STILLS, limit=LIMIT):
            primary, *others = question.categories
            distances = sorted(oracle.nearest_between(facts, primary, other) for other in others)
            assert distances[0] >= 0.15 - 1e-6
            assert min(np.diff(distances)) > margin - 1e-6


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_directions_keep_clear_of_borders_on_both_sides(rooms, level: str) -> None:
    borders = (0, 90, 180, 270) if level == "hard" else (0, 135, 225)
    for facts in all_facts(rooms):
        for question in generate(facts, f"object_rel_direction_{level}", STILLS, limit=LIMIT):
            a, b, c = (complex(*oracle.named(facts, name).centre[:2]) for name in question.categories)
            angle = np.degrees(np.angle((c - a) / (b - a)))
            assert min(abs((angle - border + 180) % 360 - 180) for border in borders) >= 10 - 1e-6
            distances = [oracle.nearest_between(facts, *pair) for pair in combinations(question.categories, 2)]
            assert min(distances) >= 0.3 - 1e-6
            assert max(distances) <= 5 + 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_relative_positions_are_fully_apart(rooms, axis: int) -> None:
    for facts in all_facts(rooms):
        for question in generate(facts, f"obj_obj_relative_pos_{('lr', 'ud', 'nf')[axis]}", STILLS, limit=LIMIT):
            frame = oracle.frame_of(facts, re.match(r"In (frame \d+ of \d+)", question.question).group(1))
            extents = [
                oracle.in_camera(frame, oracle.corners(oracle.in_frame(facts, frame, name)))[:, axis]
                for name in question.categories
            ]
            low, high = sorted(extents, key=np.mean)
            assert high.min() - low.max() > 0.15 - 1e-6


def test_movements_are_long_and_mainly_along_one_direction(rooms) -> None:
    for task, least in (("camera_movement_direction_v1", 1.0), ("camera_movement_direction_v3", 0.5)):
        for facts in all_facts(rooms):
            for question in generate(facts, task, STILLS):
                start, end = re.findall(r"frame \d+ of \d+", question.question)
                place = oracle.position(oracle.frame_of(facts, end))
                x, _, z = np.abs(oracle.in_camera(oracle.frame_of(facts, start), place[None])[0])
                assert max(x, z) > least
                assert max(x, z) >= 1.5 * min(x, z)


def test_camera_distances_differ_by_the_margin(rooms) -> None:
    for facts in all_facts(rooms):
        for question in generate(facts, "camera_obj_rel_dist_v2", STILLS, limit=LIMIT):
            frame = oracle.frame_of(facts, re.search(r"frame \d+ of \d+", question.question).group())
            place = oracle.position(frame)
            distances = sorted(
                oracle.from_point(place, oracle.in_frame(facts, frame, name)) for name in question.categories
            )
            assert distances[0] >= 0.5 - 1e-6
            assert min(np.diff(distances)) >= 0.15 - 1e-6


# What is named.


def test_named_objects_are_unique_and_seen(rooms) -> None:
    """Half a percent of an image: 36 of 84 x 84 pixels."""
    for _, sample, facts in rooms:
        pixels = {k: max(int((view == k).sum()) for view in sample.instances) for k in facts.by_instance}
        for task in TASKS:
            for question in generate(facts, task, STILLS, limit=LIMIT):
                for category in question.categories:
                    counts = [pixels[thing.instance] for thing in facts.by_category[category]]
                    frame_level = group(task) in ("camera_obj_abs_dist", "camera_obj_rel_dist", "obj_obj_relative_pos")
                    assert (max if frame_level or task == "obj_appearance_order" else min)(counts) >= 36
                    assert category not in facts.unclear


def test_a_frame_s_objects_are_seen_there_alone_of_their_category(rooms) -> None:
    for _, sample, facts in rooms:
        for question in generate(facts, "camera_obj_abs_dist", STILLS, limit=LIMIT):
            number = int(re.search(r"in frame (\d+) of", question.question).group(1)) - 1
            (category,) = question.categories
            pixels = [int((sample.instances[number] == t.instance).sum()) for t in facts.by_category[category]]
            assert max(pixels) >= 36
            assert sum(count > 0 for count in pixels) == 1


def test_order_is_asked_only_of_what_appears_clearly(rooms) -> None:
    for _, sample, facts in rooms:
        for question in generate(facts, "obj_appearance_order", STILLS, limit=LIMIT):
            for category in question.categories:
                instances = [thing.instance for thing in facts.by_category[category]]
                most = [max(int((view == k).sum()) for k in instances) for view in sample.instances]
                assert next(count for count in most if count > 0) >= 36


def test_sizes_are_asked_of_exactly_what_a_view_shows_whole(rooms) -> None:
    """Its pixels keep clear of all four borders of a view that shows enough of it."""
    borders = Counter()
    for _, sample, facts in rooms:
        questions = generate(facts, "object_size_estimation", STILLS)
        asked = {category for question in questions for category in question.categories}
        for thing in facts.unique(STILLS):
            masks = [(view == thing.instance).numpy() for view in sample.instances]
            masks = [mask for mask in masks if mask.sum() >= 36]
            edges = [(mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any()) for mask in masks]
            assert (thing.category in asked) == any(not any(touched) for touched in edges), thing
            borders.update(touched.index(True) for touched in edges if sum(touched) == 1)
    assert set(borders) == {0, 1, 2, 3}, "objects cut by each border alone"


def test_the_lamp_on_a_nightstand_makes_lamps_unclear(rooms) -> None:
    present = [{c.category for c in scene.composites} for scene, _, _ in rooms]
    assert any("nightstand" in categories or "desk" in categories for categories in present)
    for categories, (_, _, facts) in zip(present, rooms, strict=True):
        assert ("lamp" in facts.unclear) == ("nightstand" in categories)
        assert ("tv" in facts.unclear) == ("desk" in categories)


# Determinism.


@pytest.mark.parametrize("task", sorted(TASKS))
def test_order_of_objects_does_not_matter(task: str) -> None:
    for seed in range(4):
        facts = random_facts(seed)
        assert generate(shuffled(facts, seed), task, STILLS, limit=LIMIT) == generate(facts, task, STILLS, limit=LIMIT)


def test_equal_seeds_give_equal_questions_whatever_came_before(rooms) -> None:
    facts = rooms[0][2]
    alone = {task: generate(facts, task, STILLS, 3, LIMIT) for task in TASKS}
    again = {task: generate(facts, task, STILLS, 3, LIMIT) for task in reversed(TASKS)}
    assert alone == again
    assert any(generate(facts, task, STILLS, 4, LIMIT) != alone[task] for task in TASKS)
    shorter = generate(facts, "camera_obj_abs_dist", STILLS, 3, 2)
    assert shorter == alone["camera_obj_abs_dist"][:2]


def test_letters_are_even() -> None:
    for task in ("obj_obj_relative_pos_lr", "object_rel_direction_medium", "camera_obj_rel_dist_v1"):
        questions = [q for seed in range(40) for q in generate(random_facts(seed), task, Rules(), limit=8)]
        counts = Counter(question.answer for question in questions)
        share = len(questions) / len(questions[0].options)
        assert len(counts) == len(questions[0].options)
        assert max(counts.values()) < 1.35 * share


def test_options_are_different_and_one_is_right() -> None:
    for task in TASKS:
        for question in generate(random_facts(1), task, STILLS, limit=LIMIT):
            texts = [option_text(option) for option in question.options]
            assert len(set(texts)) == len(texts)
            assert question.kind == ("choice" if texts else "number")
            assert not texts or question.answer_text in texts


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(InputError, match="object_counting"):
        generate(random_facts(0), "counting", STILLS)


def test_the_rules_of_videos_name_what_no_frame_shows() -> None:
    facts = random_facts(2)
    unseen = SceneFacts(facts.name, facts.objects, (), facts.room_area)
    assert generate(unseen, "object_abs_distance", Rules())
    assert not generate(unseen, "object_abs_distance", STILLS)


def ids(questions: list[Question]) -> list[str]:
    return [question.id for question in questions]


def test_ids_are_unique(rooms) -> None:
    found = [q for task in TASKS for q in generate(rooms[1][2], task, STILLS, limit=LIMIT)]
    assert len(set(ids(found))) == len(found)
