import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.numpy import load_file, save_file

from g2vlm import export as export_module
from g2vlm.errors import CheckFailed, InputError, ResourceError
from g2vlm.images import SourceImage
from g2vlm.scene import ARRAYS, Scene
from geometry import io
from geometry.cameras import project
from tests.g2vlm.rooms import box_room

ALL_FILES = {
    "scene.safetensors", "scene.json", "points.ply", "points.glb", "cameras.json", "preview.png",
    "depth/0000.png", "depth/0001.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def room() -> Scene:
    confidence = np.linspace(-1, 1, 2 * 28 * 42, dtype=np.float32).reshape(2, 28, 42)
    valid = np.ones((2, 28, 42), bool)
    valid[:, :3] = False
    return box_room(2, (28, 42), confidence=confidence, valid=valid)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


# ---------------------------------------------------------------------------------------------- the class


def test_derived_fields_agree(room):
    local, pose = room.local_points[1, 20, 30], room.cam_to_world[1]
    np.testing.assert_allclose(room.world_points[1, 20, 30], pose[:3, :3] @ local + pose[:3, 3], atol=1e-6)
    np.testing.assert_allclose(room.world_to_cam @ room.cam_to_world, np.tile(np.eye(4), (2, 1, 1)), atol=1e-6)
    assert room.depth[1, 20, 30] == local[2]
    assert (room.num_views, room.resized_to) == (2, (28, 42))
    for name in ("world_points", "world_to_cam"):
        assert getattr(room, name).dtype == np.float32


def test_intrinsics_belong_to_the_original_image(room):
    """Pixel (v, u) of the model's 28 x 42 image shows the same ray as (v + 0.5) * 480 / 28 - 0.5 of the original."""
    points = torch.tensor(room.local_points[1]).double()
    for size in ((480, 640), (28, 42), (96, 64)):
        uv, _ = project(points, torch.tensor(room.intrinsics_at(size)[1]).double())
        u = (np.arange(42) + 0.5) * size[1] / 42 - 0.5
        v = (np.arange(28) + 0.5) * size[0] / 28 - 0.5
        np.testing.assert_allclose(uv.numpy(), np.stack(np.meshgrid(u, v), -1), atol=1e-3)
    np.testing.assert_array_equal(room.intrinsics_at((480, 640)), room.intrinsics)


def test_views_may_have_different_originals():
    sources = [SourceImage(np.zeros((*size, 3), np.uint8)) for size in ((480, 640), (60, 30))]
    scene = box_room(2, (28, 42), sources=sources)
    assert scene.original_sizes == ((480, 640), (60, 30))
    assert scene.image_paths == (None, None)
    np.testing.assert_allclose(scene.intrinsics_at((28, 42)), box_room(2, (28, 42)).intrinsics_at((28, 42)), atol=1e-4)
    assert scene.intrinsics[1, 0, 2] == pytest.approx(14.5)
    assert scene.intrinsics[1, 1, 2] == pytest.approx(29.5)


def test_images_keep_their_values():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.float64).reshape(2, 3, 4, 5)
    scene = box_room(2, (4, 5), images=(images / 255).astype(np.float32) - np.float32(1e-6))  # just below the integers
    np.testing.assert_array_equal(scene.images, images.transpose(0, 2, 3, 1))


def test_by_default_pixels_in_front_of_the_camera_are_valid():
    points = box_room(1, (4, 5)).local_points.copy()
    points[0, 1, 2, 2] = -1
    valid = box_room(1, (4, 5), local_points=points).valid
    assert not valid[0, 1, 2]
    assert valid.sum() == 19


@pytest.mark.parametrize("name", ["local_points", "cam_to_world", "normals", "intrinsics", "confidence"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(room, name, value):
    array = getattr(room, name).copy()
    array[1].flat[5] = value
    with pytest.raises(CheckFailed, match=f"1 values of {name} are not finite") as caught:
        dataclasses.replace(room, **{name: array})
    assert "view 1 of 2" in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("local_points", np.zeros((2, 28, 42, 4), np.float32)),
        ("local_points", np.zeros((0, 28, 42, 3), np.float32)),
        ("local_points", np.zeros((28, 42, 3), np.float32)),
        ("normals", np.zeros((2, 28, 42, 3))),
        ("cam_to_world", np.zeros((2, 3, 4), np.float32)),
        ("intrinsics", np.zeros((3, 3, 3), np.float32)),
        ("images", np.zeros((2, 28, 42, 3), np.float32)),
        ("valid", np.ones((2, 28, 42), np.uint8)),
        ("confidence", np.ones((2, 28, 41), np.float32)),
        ("original_sizes", ((1, 1),)),
        ("image_paths", (None,) * 3),
        ("units", "feet"),
    ],
)
def test_what_does_not_fit_is_an_error(room, name, wrong):
    with pytest.raises(InputError, match=name):
        dataclasses.replace(room, **{name: wrong})


def test_counts_must_agree():
    with pytest.raises(InputError, match="sources"):
        box_room(2, (4, 5), sources=[SourceImage(np.zeros((4, 5, 3), np.uint8))])


# ---------------------------------------------------------------------------------------------- save and load


def assert_equal(one: Scene, other: Scene) -> None:
    for field in dataclasses.fields(Scene):
        if field.name == "sources":  # of a scene in memory alone
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


@pytest.mark.parametrize("num_views", [1, 3, 24])
def test_save_and_load_restore_everything(tmp_path, num_views):
    scene = box_room(num_views, (14, 28), units="relative", model="tiny \u00e9\n2")
    assert {path.name for path in scene.save(tmp_path / "a" / "b")} == {"scene.safetensors", "scene.json"}
    loaded = Scene.load(tmp_path / "a" / "b")
    assert_equal(loaded, scene)
    assert (len(scene.sources or ()), loaded.sources) == (num_views, None)


def test_confidence_and_missing_paths_survive(tmp_path, room):
    scene = dataclasses.replace(room, image_paths=(None, Path("/x/\udcff.png")))  # a name that is not UTF-8
    scene.save(tmp_path)
    assert_equal(Scene.load(tmp_path), scene)


def break_version(folder: Path) -> None:
    record = json.loads((folder / "scene.json").read_text())
    (folder / "scene.json").write_text(json.dumps({**record, "version": 2}))


def break_arrays(folder: Path) -> None:
    arrays = load_file(folder / "scene.safetensors")
    save_file({**arrays, "local_points": arrays["local_points"] * np.nan}, folder / "scene.safetensors")


def drop_array(folder: Path) -> None:
    arrays = load_file(folder / "scene.safetensors")
    save_file({name: arrays[name] for name in ARRAYS if name != "valid"}, folder / "scene.safetensors")


DAMAGES = {
    "no json": lambda folder: (folder / "scene.json").unlink(),
    "no arrays": lambda folder: (folder / "scene.safetensors").unlink(),
    "bad json": lambda folder: (folder / "scene.json").write_text("{"),
    "list": lambda folder: (folder / "scene.json").write_text("[]"),
    "empty object": lambda folder: (folder / "scene.json").write_text("{}"),
    "truncated arrays": lambda folder: os.truncate(folder / "scene.safetensors", 1000),
    "version": break_version,
    "not finite": break_arrays,
    "array missing": drop_array,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_scene_is_refused(tmp_path, room, damage):
    room.save(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(InputError, match="cannot load a scene") as caught:
        Scene.load(tmp_path)
    assert str(tmp_path) in caught.value.what


# ---------------------------------------------------------------------------------------------- export


def test_export_writes_all_formats_and_nothing_else(tmp_path, room):
    written = room.export(tmp_path / "in" / "out")
    assert files(tmp_path) == {f"in/out/{name}" for name in ALL_FILES}
    assert {path.relative_to(tmp_path / "in" / "out").as_posix() for path in written} == ALL_FILES


def test_ply_holds_the_valid_world_points(tmp_path, room):
    room.export(tmp_path / "room.ply")
    cloud = io.read_ply(tmp_path / "room.ply")
    np.testing.assert_array_equal(cloud.points, room.world_points[room.valid])
    np.testing.assert_array_equal(cloud.colors, room.images[room.valid])
    np.testing.assert_array_equal(cloud.confidence, room.confidence[room.valid])
    np.testing.assert_array_equal(trimesh.load(tmp_path / "room.ply").vertices, cloud.points)


def test_points_can_be_filtered_and_thinned(tmp_path, room):
    room.export(tmp_path / "sure.ply", min_confidence=0.5)
    assert len(io.read_ply(tmp_path / "sure.ply").points) == (room.valid & (room.confidence >= 0.5)).sum()
    for name in ("a.ply", "b.ply"):
        room.export(tmp_path / name, max_points=100)
    assert len(io.read_ply(tmp_path / "a.ply").points) == 100
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()


def test_no_points_is_an_error_before_anything_is_written(tmp_path, room):
    with pytest.raises(InputError, match="no points to write"):
        room.export(tmp_path / "out", min_confidence=2.0)
    with pytest.raises(InputError, match="confidence"):
        dataclasses.replace(room, confidence=None).export(tmp_path / "out", min_confidence=0.5)
    assert not (tmp_path / "out").exists()


def test_depth_and_cameras_reproduce_the_points(tmp_path, room):
    """An independent reading of depth PNG and cameras.json gives the world points again."""
    room.export(tmp_path / "out", ["depth", "cameras"])
    record = json.loads((tmp_path / "out" / "cameras.json").read_text())
    for view, camera in enumerate(record["views"]):
        stored = np.asarray(Image.open(tmp_path / "out" / "depth" / f"{view:04d}.png"))
        assert stored.dtype == np.uint16
        np.testing.assert_array_equal(stored > 0, room.valid[view])
        depth = stored / record["depth_scale"]
        v, u = np.mgrid[:28, :42]
        v, u = (v + 0.5) * camera["height"] / 28 - 0.5, (u + 0.5) * camera["width"] / 42 - 0.5
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(camera["intrinsics"]).T
        pose = np.array(camera["cam_to_world"])
        points = (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
        error = np.abs(points - room.world_points[view])[room.valid[view]]
        assert error.max() < 2 / record["depth_scale"] + 1e-5
    assert io.read_cameras(tmp_path / "out" / "cameras.json").is_metric


def test_glb_has_points_and_cameras(tmp_path, room):
    room.export(tmp_path / "room.glb")
    scene = trimesh.load_scene(tmp_path / "room.glb")
    assert {"points", "camera_0000", "camera_0001"} <= set(scene.graph.nodes)
    transform, name = scene.graph["points"]
    points = trimesh.transform_points(scene.geometry[name].vertices, transform)
    np.testing.assert_allclose(points, room.world_points[room.valid] * (1, -1, -1), atol=1e-5)


def test_an_unusable_camera_is_named_before_anything_is_written(tmp_path, room):
    intrinsics = room.intrinsics.copy()
    intrinsics[1, 0, 0] = -3
    broken = dataclasses.replace(room, intrinsics=intrinsics)
    with pytest.raises(CheckFailed, match="camera of view 1"):
        broken.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    broken.export(tmp_path / "out", ["scene", "ply", "depth", "preview"])


def test_image_names_are_relative_to_their_common_folder():
    names = export_module.image_names
    assert names([Path("/a/b/1.png"), Path("/a/b/2.png")]) == ["1.png", "2.png"]
    assert names([Path("/a/b/1.png"), Path("/a/c/../d/1.png"), None]) == ["b/1.png", "d/1.png", "view_0002"]
    assert names([Path("x\\y.png")]) == ["x_y.png"]
    assert names([None]) == ["view_0000"]


def test_unknown_formats_are_refused(tmp_path, room):
    with pytest.raises(InputError, match="unknown format obj") as caught:
        room.export(tmp_path / "out", ["ply", "obj"])
    assert "ply, glb" in caught.value.fix
    with pytest.raises(InputError, match="one file cannot hold"):
        room.export(tmp_path / "a.ply", ["ply", "glb"])
    assert files(tmp_path) == set()


# ---------------------------------------------------------------------------------------------- never overwrite


def test_a_folder_with_content_needs_overwrite(tmp_path, room):
    (tmp_path / "notes.txt").write_text("mine")
    before = bytes_of(tmp_path)
    for write in (room.export, room.save):
        with pytest.raises(InputError, match="will not overwrite"):
            write(tmp_path)
    assert bytes_of(tmp_path) == before
    room.export(tmp_path, overwrite=True)
    assert files(tmp_path) == {*ALL_FILES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_leaves_no_depth_of_an_earlier_run(tmp_path, room):
    box_room(5, (14, 14)).export(tmp_path, ["depth"])
    (tmp_path / "depth" / "own.png").write_bytes(b"mine")
    room.export(tmp_path, ["depth"], overwrite=True)
    assert files(tmp_path) == {"depth/0000.png", "depth/0001.png", "depth/own.png"}


def test_a_file_needs_overwrite(tmp_path, room):
    target = tmp_path / "room.ply"
    target.write_text("mine")
    with pytest.raises(InputError, match="the file exists"):
        room.export(target)
    assert target.read_text() == "mine"
    room.export(target, overwrite=True)
    assert io.read_ply(target).points.shape[1] == 3


def test_links_do_not_lead_out_of_the_folder(tmp_path, room):
    outside, out = tmp_path / "outside", tmp_path / "out"
    for folder in (outside, out):
        folder.mkdir()
    (outside / "victim").write_text("mine")
    (outside / "0000.png").write_text("mine")
    for name in ("points.ply", "scene.json", "preview.png"):
        (out / name).symlink_to(outside / "victim")
    (out / "depth").symlink_to(outside)
    with pytest.raises(InputError, match="will not follow the link"):
        room.export(out, ["depth"], overwrite=True)
    room.export(out, ["scene", "ply", "preview"], overwrite=True)
    assert bytes_of(outside) == {"victim": b"mine", "0000.png": b"mine"}


def test_hostile_image_names_stay_data(tmp_path, room):
    scene = dataclasses.replace(room, image_paths=(Path("../../evil.png"), Path("/etc/passwd")))
    scene.export(tmp_path / "out")
    assert files(tmp_path) == {f"out/{name}" for name in ALL_FILES}


def test_a_file_in_the_way_is_an_input_error(tmp_path, room):
    (tmp_path / "out").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "out" / "deeper", tmp_path / "out" / "a.ply"):
        with pytest.raises(InputError):
            room.export(target)
    assert files(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(errno.ENOSPC, ResourceError, 4), (errno.EDQUOT, ResourceError, 4), (errno.EACCES, InputError, 2)],
)
def test_what_the_disk_refuses_becomes_a_clear_error(tmp_path, room, monkeypatch, number, error, code):
    def refuse(*_args, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(error) as caught:
        room.export(tmp_path / "out")
    assert caught.value.code == code
    assert str(tmp_path / "out") in caught.value.what
    assert caught.value.why == os.strerror(number)
    assert files(tmp_path) == set()
