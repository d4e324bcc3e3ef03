"""Facts of a rendered room: boxes from its exact state, visibility from the instance map."""

import math

import numpy as np
from numpy.typing import NDArray

from g2vlm.data.qa.boxes import Box
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject, Sighting
from g2vlm.data.rooms import OrientedBox, Scene
from g2vlm.data.rooms.scene import STRUCTURE
from g2vlm.data.types import SceneSample

LOOKALIKES = {"lamp": "nightstand", "tv": "desk"}
"""Categories that the lamp on a nightstand and the screen on a desk could be taken for."""


def room_facts(scene: Scene, sample: SceneSample) -> SceneFacts:
    """What is known about a room and its rendered views; walls, floor and ceiling are no objects.

    Args:
        scene: the exact state.
        sample: views rendered from it; their number counts as their time.
    """
    objects = [
        SceneObject(instance.index, instance.category, _box(instance.box))
        for instance in scene.instances
        if instance.category not in STRUCTURE
    ]
    known = {thing.instance for thing in objects}
    frames = [_frame(sample, view, known) for view in range(sample.num_views)]
    present = {thing.category for thing in objects}
    unclear = frozenset(category for category, other in LOOKALIKES.items() if other in present)
    return SceneFacts(scene.name, tuple(objects), tuple(frames), scene.room.area, unclear)


def _box(box: OrientedBox) -> Box:
    cos, sin = math.cos(box.yaw), math.sin(box.yaw)
    return Box(np.array(box.centre), np.array(box.size), np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]))


def _frame(sample: SceneSample, view: int, known: set[int]) -> Frame:
    assert sample.cam_to_world is not None
    assert sample.intrinsics is not None
    assert sample.depth is not None
    assert sample.instances is not None
    return Frame(
        time=float(view),
        cam_to_world=sample.cam_to_world[view].double().cpu().numpy(),
        intrinsics=sample.intrinsics[view].double().cpu().numpy(),
        size=sample.size,
        sightings=sightings(sample.instances[view].cpu().numpy(), known),
        depth=sample.depth[view].cpu().numpy(),
    )


def sightings(instances: NDArray[np.int32], known: set[int]) -> tuple[Sighting, ...]:
    """The known instances in a map (H, W), with their pixels' box and share."""
    found = []
    for index in np.unique(instances).tolist():
        if index not in known:
            continue
        rows, columns = np.nonzero(instances == index)
        box = (int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max()))
        found.append(Sighting(index, box, len(rows) / instances.size))
    return tuple(found)
