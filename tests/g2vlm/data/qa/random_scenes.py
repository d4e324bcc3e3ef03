"""Made-up scenes with boxes at any angle and cameras anywhere, without images."""

import numpy as np
from scipy.spatial.transform import Rotation

from g2vlm.data.qa.boxes import Box
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject, Sighting

NAMES = ("bed", "bench", "chair", "desk", "lamp", "plant", "shelf", "sofa", "stool", "table")


def random_box(generator: np.random.Generator, spread: float = 3.0) -> Box:
    rotation = Rotation.random(random_state=generator).as_matrix()
    return Box(generator.uniform(-spread, spread, 3), generator.uniform(0.02, 1.2, 3), rotation)


def random_facts(seed: int, num_objects: int = 9, num_frames: int = 5) -> SceneFacts:
    """Two objects at least share a category; every frame shows about half of the objects."""
    generator = np.random.default_rng(seed)
    categories = [*generator.choice(NAMES, num_objects - 1, replace=False)[: num_objects - 2], "chair", "chair"]
    objects = [SceneObject(7 * k + 3, str(name), random_box(generator)) for k, name in enumerate(categories)]
    frames = [random_frame(generator, k, objects) for k in range(num_frames)]
    return SceneFacts(f"made-up-{seed}", tuple(objects), tuple(frames), float(generator.uniform(8, 60)))


def random_frame(generator: np.random.Generator, number: int, objects: list[SceneObject]) -> Frame:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(random_state=generator).as_matrix()
    pose[:3, 3] = generator.uniform(-4, 4, 3)
    shown = [thing for thing in objects if generator.random() < 0.5]
    seen = tuple(
        Sighting(thing.instance, (2, 2, 20, 20), float(generator.choice([0.002, 0.01, 0.05]))) for thing in shown
    )
    return Frame(float(number), pose, np.eye(3), (84, 84), seen)


def shuffled(facts: SceneFacts, seed: int) -> SceneFacts:
    """The same scene with objects and sightings listed in another order."""
    generator = np.random.default_rng(seed)
    objects = [facts.objects[k] for k in generator.permutation(len(facts.objects))]
    frames = [
        Frame(f.time, f.cam_to_world, f.intrinsics, f.size, tuple(reversed(f.sightings)), f.depth) for f in facts.frames
    ]
    return SceneFacts(facts.name, tuple(objects), tuple(frames), facts.room_area, facts.unclear)
