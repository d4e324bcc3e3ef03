"""Files in VLM-3R's schema: what is read, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from g2vlm.data.qa.metadata import read_metadata
from g2vlm.errors import InputError

TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])  # box -> world


def scene() -> dict:
    box = {
        "centroid": [1, 2, 3],
        "axesLengths": [2, 1, 0.5],
        "normalizedAxes": TURN.T.flatten().tolist(),
        "instance_id": 4,
    }
    return {"dataset": "scannet", "room_size": 12.5, "object_bboxes": {"table": [box]}}


def views() -> dict:
    frame = {
        "frame_id": 48,
        "camera_pose_camera_to_world": np.eye(4).tolist(),
        "bboxes_2d": [{"instance_id": 4, "bbox_2d": [0, 0, 63, 23]}],
    }
    camera = {"fx": 50.0, "fy": 60.0, "cx": 31.5, "cy": 23.5}
    return {"camera_intrinsics": camera, "img_width": 64, "img_height": 48, "frames": [frame]}


def write(folder: Path, scenes: object, frames: object) -> tuple[Path, Path]:
    paths = folder / "scene_metadata.json", folder / "frame_metadata.json"
    for path, content in zip(paths, (scenes, frames), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_what_is_read(tmp_path: Path) -> None:
    (facts,) = read_metadata(*write(tmp_path, {"a": scene(), "b": scene()}, {"a": views()}))
    (thing,), (frame,) = facts.objects, facts.frames
    assert (facts.name, facts.room_area, thing.category, thing.instance) == ("a", 12.5, "table", 4)
    assert np.allclose(thing.box.rotation, TURN)
    longest = thing.box.corners[4] - thing.box.corners[0]  # from -x to +x of the box
    assert np.allclose(longest, 2 * TURN[:, 0])
    assert frame.time == 2.0
    assert frame.size == (48, 64)
    assert frame.intrinsics.tolist() == [[50, 0, 31.5], [0, 60, 23.5], [0, 0, 1]]
    assert frame.sightings[0].share == pytest.approx(0.5)


@pytest.mark.parametrize("field", ["dataset", "room_size", "object_bboxes"])
def test_a_scene_that_lacks_a_field_is_named(tmp_path: Path, field: str) -> None:
    broken = {key: value for key, value in scene().items() if key != field}
    with pytest.raises(InputError, match="scene a"):
        read_metadata(*write(tmp_path, {"a": broken}, {"a": views()}))


def test_frames_with_names_for_numbers_are_refused(tmp_path: Path) -> None:
    broken = views()
    broken["frames"][0]["frame_id"] = "DSC01752"
    with pytest.raises(InputError, match="scene a"):
        read_metadata(*write(tmp_path, {"a": scene()}, {"a": broken}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an object"):
        read_metadata(*write(tmp_path, [], {}))
    with pytest.raises(InputError, match="cannot read"):
        read_metadata(tmp_path / "none.json", tmp_path / "none.json")
