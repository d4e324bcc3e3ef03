"""SPAR rows in parquet files that the tests write; they are skipped without pyarrow (extra `data`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from g2vlm.data.chat.marks import COLOURS, Mark, draw_marks, read_marks
from g2vlm.errors import InputError
from geometry.io import write_depth_png

K = [[20.0, 0, 13.5], [0, 20.0, 13.5], [0, 0, 1]]
POSE = np.eye(4).tolist()


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "question": "How far is the red point?",
        "answer": "2.0",
        "scene_name": "scene0000_00",
        "dataset_name": "scannet",
        "image_list": ["a.png", "b.png"],
        "depth_list": ["a_depth.png", "b_depth.png"],
        "poses": [POSE, POSE],
        "intrinsic": [[40.0, 0, 27.5], [0, 40.0, 27.5], [0, 0, 1]],
        "depth_intrinsic": K,
        "metadata": json.dumps({"type": "depth_prediction_oc_mv", "red_point": [[500, 500]], "point_img_idx": [[1]]}),
    }
    return {**plain, **changes}


@pytest.fixture
def write(tmp_path: Path):
    """Parquet files of two-row groups; images of 56 x 56 and depth maps of 28 x 28 lie beside them."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from g2vlm.data.chat.spar import SparChats

    for name in ("a", "b"):
        Image.new("RGB", (56, 56), (10, 120, 10)).save(tmp_path / f"{name}.png")
        write_depth_png(tmp_path / f"{name}_depth.png", np.full((28, 28), 2.0, np.float32), 1000.0)

    def write(*rows: dict[str, Any], **options: Any) -> SparChats:
        for number, part in enumerate((rows[:3], rows[3:])):
            if part:
                table = arrow.Table.from_pylist(list(part))
                parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
        return SparChats(tmp_path, **{"view_size": (28, 28), **options})

    return write


def test_rows_of_all_files(write) -> None:
    source = write(*(row(answer=str(i)) for i in range(5)))
    assert len(source) == 5
    for index in (4, 0, 3, 2, 1):
        sample = source.load(index, 0)
        assert sample.answer == str(index)
        assert sample.shape == source.shape(index, 0)
        assert sample.task == "depth_prediction_oc_mv"


def test_a_row_is_a_scene_with_depth(write) -> None:
    scene = write(row()).load(0, 0).scene
    assert scene.images.shape == (2, 3, 28, 28)
    assert (scene.depth == 2).all()
    assert scene.valid.all()
    np.testing.assert_allclose(scene.intrinsics[0].numpy(), K, atol=1e-5)
    assert (scene.dataset, scene.scene, scene.is_metric) == ("scannet", "scene0000_00", True)
    flat = write(row(depth_intrinsic=None, poses=[np.eye(4).flatten().tolist()] * 2)).load(0, 0).scene
    np.testing.assert_allclose(flat.intrinsics[0].numpy(), K, atol=1e-5)
    half = write(row(dataset_name="matterport3d")).load(0, 0).scene
    assert (half.depth == 0.5).all()


def test_what_is_unknown_stays_absent(write) -> None:
    bare = row(depth_list=None, poses=None, intrinsic=None, depth_intrinsic=None, metadata=None)
    scene = write(bare).load(0, 0).scene
    assert scene.depth is scene.cam_to_world is scene.intrinsics is None
    assert write(bare, geometry=False).load(0, 0).scene is None


def test_marks_are_on_the_semantic_copy_alone(write) -> None:
    sample = write(row()).load(0, 0)
    first, second = sample.images
    assert (first == (10, 120, 10)).all()
    assert (second == COLOURS["red"]).all(-1).any()
    assert not (sample.scene.images[1].permute(1, 2, 0).numpy() == COLOURS["red"]).all(-1).any()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"image_list": []}, "no images"),
        ({"image_list": ["a.png", "absent.png"]}, "absent.png"),
        ({"question": None}, "not a text"),
        ({"metadata": "{"}, "Expecting"),
        ({"metadata": json.dumps({"red_point": [[1, 2, 3]]})}, "red_point is"),
        ({"metadata": json.dumps({"red_bbox": [[1, 2, 3, 4]], "bbox_img_idx": [[7]]})}, "image 7 of 2"),
    ],
)
def test_bad_rows_are_refused_before_they_are_packed(write, changes: dict[str, Any], why: str) -> None:
    source = write(row(), row(**changes))
    with pytest.raises(InputError, match=why):
        source.shape(1, 0)


def test_bad_scenes_are_refused(write) -> None:
    for changes in ({"depth_list": ["a_depth.png", "absent.png"]}, {"poses": [POSE, (np.eye(4) * 2).tolist()]}):
        with pytest.raises(InputError):
            write(row(**changes)).load(0, 0)


def test_bad_files(write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no parquet files"):
        write()
    with pytest.raises(InputError, match="no column image_list"):
        write({"question": "a", "answer": "b"})
    (tmp_path / "0.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"0\.parquet"):
        write()


def test_marks() -> None:
    record = {
        "red_point": [[100, 200]], "blue_point": [[500, 500]], "point_img_idx": [[0, 1]],
        "green_bbox": [[900, 900, 100, 300]], "bbox_img_idx": [[1]], "img_idx": 3,
    }  # fmt: skip
    marks = read_marks(record, 2)
    assert marks == [
        Mark(0, "red", (100.0, 200.0)),
        Mark(1, "blue", (500.0, 500.0)),
        Mark(1, "green", (900.0, 900.0, 100.0, 300.0)),
    ]
    black = np.zeros((200, 400, 3), np.uint8)
    first, second = draw_marks([black, black], marks)
    assert not black.any()
    assert tuple(first[40, 40]) == COLOURS["red"]
    assert tuple(second[100, 200]) == COLOURS["blue"]
    assert tuple(second[62, 45]) == COLOURS["green"]
    assert not second[150, 300].any()
