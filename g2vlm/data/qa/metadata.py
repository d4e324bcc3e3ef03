"""Reads VLM-3R's `scene_metadata.json` and `frame_metadata.json`: world in metres, z up; OpenCV camera-to-world.

Box axes are stored as rows: `normalizedAxes` is the transpose of box -> world. 2-D boxes are inclusive pixels.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from g2vlm.data.qa.boxes import Box
from g2vlm.data.qa.facts import Frame, SceneFacts, SceneObject, Sighting
from g2vlm.errors import InputError

FRAMES_PER_SECOND = {"scannet": 24.0, "scannetpp": 30.0, "arkitscenes": 10.0}


def read_metadata(scene_file: Path, frame_file: Path) -> list[SceneFacts]:
    """Facts of all scenes that both files describe, in the order of the scenes' file.

    Raises:
        InputError: a file cannot be read, or a scene lacks what the schema has; the message names file and scene.
    """
    scenes, frames = _read(scene_file), _read(frame_file)
    return [_facts(scene_file, name, scenes[name], frames[name]) for name in scenes if name in frames]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read metadata  {path}", str(error), "check the path") from error
    if not isinstance(content, dict):
        raise InputError(f"bad metadata  {path}", "it is not an object of scenes", "check the path")
    return content


def _facts(path: Path, name: str, scene: dict[str, Any], views: dict[str, Any]) -> SceneFacts:
    try:
        rate = FRAMES_PER_SECOND[scene["dataset"]]
        objects = [
            SceneObject(int(box["instance_id"]), category, _box(box))
            for category, boxes in scene["object_bboxes"].items()
            for box in boxes
        ]
        frames = [_frame(frame, views, rate) for frame in views["frames"]]
        return SceneFacts(name, tuple(objects), tuple(frames), float(scene["room_size"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"bad metadata  {path}, scene {name}"
        raise InputError(what, f"{type(error).__name__}: {error}", "see the schema in docs/data.md") from error


def _box(record: dict[str, Any]) -> Box:
    axes = np.array(record["normalizedAxes"], dtype=np.float64).reshape(3, 3)
    centre, size = (np.array(record[key], dtype=np.float64) for key in ("centroid", "axesLengths"))
    if centre.shape != (3,) or size.shape != (3,):
        raise ValueError("a box's centroid and axesLengths have three numbers")
    return Box(centre, size, axes.T)


def _frame(record: dict[str, Any], views: dict[str, Any], rate: float) -> Frame:
    camera, size = views["camera_intrinsics"], (int(views["img_height"]), int(views["img_width"]))
    K = [[camera["fx"], 0, camera["cx"]], [0, camera["fy"], camera["cy"]], [0, 0, 1]]
    pose = np.array(record["camera_pose_camera_to_world"], dtype=np.float64)
    if pose.shape != (4, 4):
        raise ValueError(f"a pose of shape {pose.shape}")
    return Frame(
        time=int(record["frame_id"]) / rate,
        cam_to_world=pose,
        intrinsics=np.array(K, dtype=np.float64),
        size=size,
        sightings=tuple(_sighting(box, size) for box in record["bboxes_2d"]),
    )


def _sighting(record: dict[str, Any], size: tuple[int, int]) -> Sighting:
    x_min, y_min, x_max, y_max = (int(value) for value in record["bbox_2d"])
    share = (x_max - x_min + 1) * (y_max - y_min + 1) / (size[0] * size[1])
    return Sighting(int(record["instance_id"]), (x_min, y_min, x_max, y_max), share)
