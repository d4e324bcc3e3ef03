"""Questions about the room as a whole: count, size, distance, order of appearance (VSI-Bench).

Boxes stand for objects: distances are exact between boxes, where the released generator samples them on a grid.
"""

from collections.abc import Iterator
from functools import partial
from itertools import combinations, pairwise, permutations

from g2vlm.data.qa.drafts import Draft, Generator
from g2vlm.data.qa.facts import SceneFacts, SceneObject
from g2vlm.data.qa.rules import Rules
from g2vlm.data.rooms.draws import Draws

LEAST_DISTANCE = 0.2  # metres, of a distance that is asked for, after rounding
LEAST_NEAREST = 0.15  # metres, of the nearest option
LARGE_ROOM = 40.0  # square metres, beyond which distances must differ by more
MARGINS = (0.15, 0.30)  # metres between any two options, in small and large rooms


def object_counting(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """How many of a category there are; two at least, each of them seen."""
    for category in draws.shuffled(facts.seen_categories(rules)):
        count = len(facts.by_category[category])
        if count >= 2:
            yield Draft(f"How many {category}(s) are in this room?", str(count), categories=(category,))


def object_size_estimation(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """The longest extent of a box, in whole centimetres."""
    for thing in draws.shuffled(facts.unique(rules)):
        if rules.uncut and not _seen_uncut(facts, thing, rules):
            continue
        question = (
            "What is the length of the longest dimension (length, width, or height) of the "
            f"{thing.category}, measured in centimeters?"
        )
        yield Draft(question, str(round(100 * thing.box.longest)), categories=(thing.category,))


def _seen_uncut(facts: SceneFacts, thing: SceneObject, rules: Rules) -> bool:
    return any(
        sighting.instance == thing.instance and sighting.share >= rules.min_share and frame.uncut(sighting)
        for frame in facts.frames
        for sighting in frame.sightings
    )


def room_size_estimation(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """The area of the floor, square metres to one decimal."""
    question = (
        "What is the size of this room (in square meters)? \n"
        "If multiple rooms are shown, estimate the size of the combined space."
    )
    yield Draft(question, f"{facts.room_area:.1f}")


def object_abs_distance(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """Distance between two boxes, metres to one decimal; not of objects that nearly touch."""
    names = [thing.category for thing in facts.unique(rules)]
    for pair in draws.shuffled(list(combinations(names, 2))):
        first, second = draws.shuffled(pair)
        distance = round(facts.category_distance[first, second], 1)
        if distance >= LEAST_DISTANCE:
            question = (
                "Measuring from the closest point of each object, what is the direct distance between the "
                f"{first} and the {second} (in meters)?"
            )
            yield Draft(question, f"{distance:.1f}", categories=(first, second))


def object_rel_distance(count: int, facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """Which of so many categories is nearest to an object; no two of them are about equally far."""
    margin = MARGINS[facts.room_area > LARGE_ROOM]
    seen = facts.seen_categories(rules)
    sets = [
        (thing.category, others)
        for thing in facts.unique(rules)
        for others in combinations([name for name in seen if name != thing.category], count)
    ]
    for primary, others in draws.shuffled(sets):
        ranked = sorted(others, key=lambda name: facts.category_distance[primary, name])
        distances = [facts.category_distance[primary, name] for name in ranked]
        gaps = [b - a for a, b in pairwise(distances)]
        if distances[0] < LEAST_NEAREST or min(gaps) <= margin:
            continue
        named = draws.shuffled(others)
        question = (
            f"Measuring from the closest point of each object, which of these objects ({', '.join(named)}) is the "
            f"closest to the {primary}?\nIf there are multiple instances of an object category, measure to the closest."
        )
        yield Draft(question, ranked[0], tuple(ranked[1:]), (primary, *named))


def obj_appearance_order(facts: SceneFacts, rules: Rules, draws: Draws) -> Iterator[Draft]:
    """In which order some categories are first seen."""
    first = first_seen(facts, rules)
    for chosen in draws.shuffled(list(combinations(first, rules.num_ordered))):
        ranked = sorted(chosen, key=lambda name: first[name])
        times = [first[name] for name in ranked]
        if any(b - a <= rules.order_gap for a, b in pairwise(times)):
            continue
        named = draws.shuffled(chosen)
        others = [order for order in permutations(ranked) if order != tuple(ranked)]
        wrong = tuple(", ".join(order) for order in draws.shuffled(others)[:3])
        question = (
            "What will be the first-time appearance order of the following categories in the video: "
            f"{', '.join(named)}?"
        )
        yield Draft(question, ", ".join(ranked), wrong, tuple(named))


def first_seen(facts: SceneFacts, rules: Rules) -> dict[str, float]:
    """When each category is first seen; without those that are hardly seen before they are seen well."""
    first: dict[str, float] = {}
    unclear = set(facts.unclear)
    for frame in facts.frames:
        shares: dict[str, float] = {}
        for sighting in frame.sightings:
            if thing := facts.by_instance.get(sighting.instance):
                shares[thing.category] = max(shares.get(thing.category, 0.0), sighting.share)
        for category, share in shares.items():
            if category not in first and share < rules.min_share:
                unclear.add(category)
            first.setdefault(category, float(round(frame.time)))
    return {category: first[category] for category in sorted(first) if category not in unclear}


ROOM_TASKS: dict[str, Generator] = {
    "object_counting": object_counting,
    "object_size_estimation": object_size_estimation,
    "room_size_estimation": room_size_estimation,
    "object_abs_distance": object_abs_distance,
    "object_rel_distance_v1": partial(object_rel_distance, 4),
    "object_rel_distance_v2": partial(object_rel_distance, 3),
    "object_rel_distance_v3": partial(object_rel_distance, 2),
    "obj_appearance_order": obj_appearance_order,
}
