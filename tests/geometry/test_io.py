"""Round trips through every file format, independent readers, and files that must be refused."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from geometry.io import (
    CameraFile,
    CameraView,
    depth_png_scale,
    read_cameras,
    read_depth_png,
    read_npz,
    read_ply,
    write_cameras,
    write_depth_png,
    write_glb,
    write_npz,
    write_ply,
)
from geometry.io.common import atomic_file

HEIGHT, WIDTH = 24, 32


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def points(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(50, 3))


@pytest.fixture
def colors(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(50, 3), dtype=np.uint8)


def make_view(rng: np.random.Generator, name: str) -> CameraView:
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    pose = np.eye(4)
    pose[:3, :3] = rotation * np.sign(np.linalg.det(rotation))
    pose[:3, 3] = rng.normal(size=3)
    K = np.array([[30.5, 0, 15.25], [0, 31.5, 11.75], [0, 0, 1]])
    return CameraView(name, WIDTH, HEIGHT, K, pose)


@pytest.fixture
def views(rng: np.random.Generator) -> tuple[CameraView, ...]:
    return make_view(rng, "a/0.png"), make_view(rng, "b 1.jpg")


@pytest.fixture
def camera_json(tmp_path: Path, views: tuple[CameraView, ...]) -> Path:
    write_cameras(tmp_path / "cameras.json", CameraFile(views, is_metric=True, depth_scale=1000))
    return tmp_path / "cameras.json"


# Atomic writing


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(target) as file:
        file.write("text")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_target_appears_only_when_complete(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out.bin") as file:
        file.write(b"new")
        assert not (tmp_path / "out.bin").exists()
    assert (tmp_path / "out.bin").read_bytes() == b"new"


# PLY


def test_ply_header_states_order_units_and_convention(tmp_path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    write_ply(tmp_path / "p.ply", points, colors, np.ones(len(points)), is_metric=False)
    header = (tmp_path / "p.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    properties = [line.removeprefix("property ") for line in header if line.startswith("property ")]
    scalars = ["float x", "float y", "float z", "uchar red", "uchar green", "uchar blue", "float confidence"]
    assert properties == scalars
    assert "comment version 1" in header
    assert "comment units up to scale" in header
    assert any(line.startswith("comment convention OpenCV") for line in header)


def test_ply_round_trip(tmp_path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    confidence = torch.linspace(0, 1, len(points), dtype=torch.bfloat16)
    write_ply(tmp_path / "p.ply", torch.from_numpy(points), colors, confidence, is_metric=True)
    cloud = read_ply(tmp_path / "p.ply")
    np.testing.assert_array_equal(cloud.points, points.astype(np.float32))
    np.testing.assert_array_equal(cloud.colors, colors)
    np.testing.assert_array_equal(cloud.confidence, confidence.float().numpy())
    assert "units metres" in cloud.comments


def test_ply_without_colors_and_confidence(tmp_path: Path, points: np.ndarray) -> None:
    write_ply(tmp_path / "p.ply", points, is_metric=True)
    cloud = read_ply(tmp_path / "p.ply")
    assert cloud.colors is None
    assert cloud.confidence is None
    np.testing.assert_array_equal(cloud.points, points.astype(np.float32))


def test_ply_in_an_independent_reader(tmp_path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    write_ply(tmp_path / "p.ply", points, colors, np.ones(len(points)), is_metric=True)
    cloud = trimesh.load(tmp_path / "p.ply")
    np.testing.assert_array_equal(cloud.vertices, points.astype(np.float32))
    np.testing.assert_array_equal(cloud.colors[:, :3], colors)


def test_ply_of_an_independent_writer(tmp_path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    trimesh.PointCloud(points, colors).export(tmp_path / "p.ply")
    cloud = read_ply(tmp_path / "p.ply")
    np.testing.assert_array_equal(cloud.points, points.astype(np.float32))
    np.testing.assert_array_equal(cloud.colors, colors)


HEADER = (
    "ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("nothing", "header"),
        (HEADER, "header"),
        (HEADER.replace("binary_little_endian", "ascii") + "end_header\n", "format"),
        (HEADER.replace("vertex 1", "vertex -1") + "end_header\n", "element vertex"),
        (HEADER.replace("vertex 1", "vertex 999999999") + "end_header\n", "element vertex"),
        (HEADER.replace("vertex 1", "face 1") + "end_header\n", "element vertex"),
        (HEADER.replace("property float z\n", "") + "end_header\n", "no property z"),
        (HEADER.replace("property float z", "property list uchar int z") + "end_header\n", "property list uchar int z"),
        (HEADER + "property float x\nend_header\n", "property float x"),
        (HEADER + "property float red\nend_header\n", "red"),
    ],
)
def test_damaged_ply_is_refused(tmp_path: Path, header: str, field: str) -> None:
    path = tmp_path / "bad.ply"
    path.write_bytes(header.encode() + bytes(12))
    with pytest.raises(ValueError, match=field) as caught:
        read_ply(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"points": np.full((2, 3), np.nan)}, "points"),
        ({"points": np.zeros((2, 2))}, "points"),
        ({"points": np.zeros((2, 3)), "colors": np.zeros((2, 3))}, "colors"),
        ({"points": np.zeros((2, 3)), "colors": np.zeros((3, 3), np.uint8)}, "colors"),
        ({"points": np.zeros((2, 3)), "confidence": np.zeros(3)}, "confidence"),
    ],
)
def test_bad_arrays_are_not_written(tmp_path: Path, given: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        write_ply(tmp_path / "p.ply", **given, is_metric=True)
    assert not list(tmp_path.iterdir())


# NPZ


def test_npz_round_trip(tmp_path: Path, points: np.ndarray) -> None:
    arrays = {"file": points, "valid": np.array([True, False]), "half": torch.ones(2, dtype=torch.float16)}
    write_npz(tmp_path / "a.npz", arrays)
    read = read_npz(tmp_path / "a.npz")
    assert set(read) == set(arrays)
    np.testing.assert_array_equal(read["file"], points)
    assert read["valid"].dtype == np.bool_
    assert read["half"].dtype == np.float16


def test_npz_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", evil=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz: evil"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="evil"):
        write_npz(tmp_path / "b.npz", {"evil": np.array([None])})


def test_npz_limits_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path, {"zeros": np.zeros(100_000)})
    with pytest.raises(ValueError, match="limit"):
        read_npz(path, max_bytes=1000)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_npz(path)
    path.write_bytes(pickle.dumps(1))
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_npz(path)


def test_npz_with_a_lying_shape(tmp_path: Path) -> None:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (1 << 55,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", member.getvalue())
    with pytest.raises(ValueError, match=r"a\.npz: x"):
        read_npz(tmp_path / "a.npz")


# Depth PNG


def test_depth_png_round_trip(tmp_path: Path, rng: np.random.Generator) -> None:
    depth = rng.uniform(0.5, 9, size=(HEIGHT, WIDTH))
    depth[0, :4] = [np.nan, np.inf, -1, 0]
    scale = depth_png_scale(depth)
    write_depth_png(tmp_path / "d.png", depth, scale)
    read = read_depth_png(tmp_path / "d.png", scale)
    np.testing.assert_array_equal(read[0, :4], 0)
    np.testing.assert_allclose(read[1:], depth[1:], atol=0.51 / scale)
    stored = np.asarray(Image.open(tmp_path / "d.png"))
    assert stored.dtype == np.uint16
    assert stored.max() == 65535


def test_tiny_valid_depth_stays_valid(tmp_path: Path) -> None:
    write_depth_png(tmp_path / "d.png", np.array([[1e-9, 1.0]]), 1000)
    assert read_depth_png(tmp_path / "d.png", 1000)[0, 0] > 0


def test_depth_without_valid_pixel(tmp_path: Path) -> None:
    depth = np.full((2, 2), np.nan)
    write_depth_png(tmp_path / "d.png", depth, depth_png_scale(depth))
    assert not read_depth_png(tmp_path / "d.png", 1).any()


def test_depth_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale"):
        write_depth_png(tmp_path / "d.png", np.array([[100.0]]), 1000)
    with pytest.raises(ValueError, match="scale"):
        write_depth_png(tmp_path / "d.png", np.array([[100.0]]), 0)


def test_other_images_are_no_depth(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    Image.new("L", (4, 4)).save(tmp_path / "fake.jpg")
    write_depth_png(tmp_path / "cut.png", np.ones((64, 64)) * np.arange(1, 65), 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:80])
    for name in ("rgb.png", "fake.jpg", "cut.png"):
        with pytest.raises(ValueError, match=name):
            read_depth_png(tmp_path / name, 1000)


# Cameras


def test_cameras_round_trip(camera_json: Path, views: tuple[CameraView, ...]) -> None:
    read = read_cameras(camera_json)
    assert read.is_metric
    assert read.depth_scale == 1000
    for given, expected in zip(read.views, views, strict=True):
        assert (given.image, given.width, given.height) == (expected.image, expected.width, expected.height)
        np.testing.assert_array_equal(given.intrinsics, expected.intrinsics)
        np.testing.assert_array_equal(given.cam_to_world, expected.cam_to_world)


def replaced(document: dict, dotted: str, value: object) -> dict:
    """A copy with the field at e.g. `views.0.width` set to `value`, or removed if that is `...`."""
    copy = json.loads(json.dumps(document))
    *parents, last = dotted.split(".")
    place = copy
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "version"),
        ("version", True, "version"),
        ("convention", "OpenGL", "convention"),
        ("units", "feet", "units"),
        ("units", ..., "units"),
        ("depth_scale", -1, "depth_scale"),
        ("depth_scale", "1000", "depth_scale"),
        ("depth_scale", float("nan"), "depth_scale"),
        ("views", {}, "views"),
        ("views", [1], r"views\[0\]"),
        ("views.1.image", ..., r"views\[1\]: image"),
        ("views.1.image", "../../etc/passwd", r"views\[1\]: image"),
        ("views.1.image", "/etc/passwd", r"views\[1\]: image"),
        ("views.0.width", 0, r"views\[0\]: width"),
        ("views.0.width", 10.5, r"views\[0\]: width"),
        ("views.0.intrinsics", [[1, 0], [0, 1]], r"views\[0\]: intrinsics"),
        ("views.0.intrinsics", [["1", 0, 0], [0, 1, 0], [0, 0, 1]], r"views\[0\]: intrinsics"),
        ("views.0.intrinsics", [[10**400, 0, 0], [0, 1, 0], [0, 0, 1]], "integer of 401 digits"),
        ("views.0.intrinsics", [[1, 0, float("nan")], [0, 1, 0], [0, 0, 1]], r"views\[0\]: intrinsics"),
        ("views.0.intrinsics", [[-1, 0, 0], [0, 1, 0], [0, 0, 1]], r"views\[0\]: intrinsics"),
        ("views.0.intrinsics", [[1, 0, 0], [0, 1, 0], [0, 0, 2]], r"views\[0\]: intrinsics"),
        ("views.1.cam_to_world", np.diag([1, 1, -1, 1]).tolist(), r"views\[1\]: cam_to_world"),
        ("views.1.cam_to_world", np.diag([2, 2, 2, 1]).tolist(), r"views\[1\]: cam_to_world"),
        ("views.1.cam_to_world", np.ones((4, 4)).tolist(), r"views\[1\]: cam_to_world"),
    ],
)
def test_wrong_field_is_named(camera_json: Path, field: str, value: object, message: str) -> None:
    document = json.loads(camera_json.read_text())
    camera_json.write_text(json.dumps(replaced(document, field, value)))
    with pytest.raises(ValueError, match=message) as caught:
        read_cameras(camera_json)
    assert str(camera_json) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": NaN}', '{"version": ' + "9" * 5000 + "}", "[" * 100_000, "\xff"]
)
def test_text_that_is_no_camera_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cameras.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cameras\.json"):
        read_cameras(path)


def test_camera_file_size_is_bounded(camera_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geometry.io.cameras.MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_cameras(camera_json)


def test_reprojection_through_exported_files(tmp_path: Path, rng: np.random.Generator) -> None:
    """Depth -> world points -> PLY and cameras.json -> back to the pixels they came from."""
    view = make_view(rng, "0.png")
    v, u = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    depth = rng.uniform(1, 6, size=(HEIGHT, WIDTH))
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(view.intrinsics).T
    world = (depth[..., None] * rays) @ view.cam_to_world[:3, :3].T + view.cam_to_world[:3, 3]
    write_ply(tmp_path / "p.ply", world.reshape(-1, 3), is_metric=True)
    write_cameras(tmp_path / "cameras.json", CameraFile((view,), is_metric=True))

    read = read_cameras(tmp_path / "cameras.json").views[0]
    cloud = np.asarray(trimesh.load(tmp_path / "p.ply").vertices)
    local = (cloud - read.cam_to_world[:3, 3]) @ read.cam_to_world[:3, :3]
    pixels = local @ read.intrinsics.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    assert np.abs(pixels - np.stack([u, v], axis=-1).reshape(-1, 2)).max() < 0.01


# GLB

YZ_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def test_glb_points_in_an_independent_reader(tmp_path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    write_glb(tmp_path / "s.glb", points, colors, is_metric=True)
    scene = trimesh.load_scene(tmp_path / "s.glb")
    assert list(scene.graph.nodes_geometry) == ["points"]
    transform, geometry = scene.graph["points"]
    np.testing.assert_array_equal(transform, YZ_FLIP)
    np.testing.assert_array_equal(scene.geometry[geometry].vertices, points.astype(np.float32))
    np.testing.assert_array_equal(scene.geometry[geometry].colors[:, :3], colors)


def test_glb_cameras_are_named_nodes_with_their_poses(
    tmp_path: Path, points: np.ndarray, views: tuple[CameraView, ...]
) -> None:
    write_glb(tmp_path / "s.glb", points, cameras=views, is_metric=True)
    scene = trimesh.load_scene(tmp_path / "s.glb")
    assert set(scene.graph.nodes_geometry) == {"points", "camera_0000", "camera_0001"}
    for k, view in enumerate(views):
        np.testing.assert_allclose(scene.graph[f"camera_{k:04d}"][0], YZ_FLIP @ view.cam_to_world, atol=1e-12)


def test_glb_frusta_end_at_the_image_corners(tmp_path: Path, points: np.ndarray, views: tuple[CameraView, ...]) -> None:
    write_glb(tmp_path / "s.glb", points, cameras=views, is_metric=True)
    scene = trimesh.load_scene(tmp_path / "s.glb")
    vertices = np.unique(np.asarray(scene.geometry["camera_0000"].vertices), axis=0)
    corners = vertices[np.linalg.norm(vertices, axis=-1) > 0] @ views[0].intrinsics.T
    pixels = np.unique(np.round(corners[:, :2] / corners[:, 2:], 3), axis=0)
    left, top, right, bottom = -0.5, -0.5, WIDTH - 0.5, HEIGHT - 0.5
    np.testing.assert_allclose(pixels, [[left, top], [left, bottom], [right, top], [right, bottom]])


def test_glb_states_units(tmp_path: Path, points: np.ndarray) -> None:
    write_glb(tmp_path / "s.glb", points, is_metric=False)
    assert b"up to scale" in (tmp_path / "s.glb").read_bytes()


@pytest.mark.parametrize(("limit", "expected"), [(7, 7), (50, 50), (None, 50)])
def test_glb_thins_large_clouds(
    tmp_path: Path, points: np.ndarray, colors: np.ndarray, limit: int | None, expected: int
) -> None:
    write_glb(tmp_path / "s.glb", points, colors, is_metric=True, max_points=limit)
    cloud = trimesh.load_scene(tmp_path / "s.glb").geometry["points"]
    assert len(cloud.vertices) == expected
    index = {tuple(point): k for k, point in enumerate(points.astype(np.float32).tolist())}
    kept = [index[tuple(point)] for point in np.asarray(cloud.vertices).tolist()]
    np.testing.assert_array_equal(cloud.colors[:, :3], colors[kept])


def test_glb_needs_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="points"):
        write_glb(tmp_path / "s.glb", np.zeros((0, 3)), is_metric=True)
