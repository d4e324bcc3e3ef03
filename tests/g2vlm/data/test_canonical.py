import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from g2vlm.data.canonical import CanonicalSource, read_frame, read_scene
from g2vlm.data.frames import Frame
from g2vlm.data.types import ViewRequest
from g2vlm.errors import InputError
from tests.g2vlm.data.scenes import changed, room_frames, write_canonical


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "scene_meta.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"depth_encoding": "uint16_mm"}, 0.5e-3),
        ({"depth_encoding": "uint16", "depth_scale": 5000.0}, 0.1e-3),
        ({"depth_encoding": "npz"}, 0.0),
    ],
)
def test_round_trip(tmp_path: Path, options: dict[str, Any], tolerance: float) -> None:
    frames = room_frames()
    scene = read_scene(write_canonical(tmp_path / "room", **options))
    assert scene.facts.is_metric
    assert scene.facts.license_class == "permissive"
    for i, expected in enumerate(frames):
        frame = read_frame(scene, i)
        assert frame.name == expected.name
        for field in ("image", "intrinsics", "cam_to_world"):
            np.testing.assert_array_equal(getattr(frame, field), getattr(expected, field))
        assert frame.depth is not None
        assert np.abs(frame.depth - expected.depth).max() <= tolerance + 1e-6  # float32


def test_sample_fits_the_request(tmp_path: Path) -> None:
    write_canonical(tmp_path / "a" / "room")
    sample = CanonicalSource(tmp_path).load(0, ViewRequest(3, (56, 70), 1))
    assert sample.images.shape == (3, 3, 56, 70)
    assert sample.valid is not None
    assert sample.valid.all()
    assert set(sample.view_ids) <= {frame.name for frame in room_frames()}


def test_what_a_scene_lacks_is_absent(tmp_path: Path) -> None:
    frames = [Frame(f.name, f.image, cam_to_world=f.cam_to_world) for f in room_frames()]
    sample = CanonicalSource(write_canonical(tmp_path, frames)).load(0, ViewRequest(2, (56, 56), 0))
    assert sample.depth is None
    assert sample.intrinsics is None
    assert sample.cam_to_world is not None


def test_intrinsics_may_be_shared_and_on_the_half_pixel_rule(tmp_path: Path) -> None:
    def share(content: dict[str, Any]) -> None:
        for frame in content["frames"]:
            camera = {key: frame.pop(key) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}
        content |= {**camera, "pixel_rule": "half"}

    edit(write_canonical(tmp_path), share)
    K = read_scene(tmp_path).frames[2].intrinsics
    expected = room_frames()[2].intrinsics
    assert K is not None
    assert expected is not None
    np.testing.assert_allclose(K - expected, [[0, 0, -0.5], [0, 0, -0.5], [0, 0, 0]])


def test_invalid_codes_and_mask(tmp_path: Path) -> None:
    frame = room_frames()[0]
    write_canonical(tmp_path, [frame])
    path = tmp_path / "depth" / f"{frame.name}.png"
    stored = np.array(Image.open(path))
    stored[0, 0], stored[0, 1] = 0, 65535
    Image.fromarray(stored).save(path)
    mask = np.full(stored.shape, 255, np.uint8)
    mask[1] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit(tmp_path, lambda content: content["frames"][0].update(mask="mask.png"))
    depth = read_frame(read_scene(tmp_path), 0).depth
    assert depth is not None
    assert not depth[0, :2].any()
    assert not depth[1].any()
    assert (depth[0, 2:] > 0).all()


def frame0(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["frames"][0].update(values)


POSE = np.eye(4).tolist()
REFUSED = [
    (lambda c: c.update(is_metrical=True), "is_metrical.*did you mean is_metric"),
    (frame0(transfrom_matrix=POSE), r"frames\[0\].transfrom_matrix.*did you mean transform_matrix"),
    (lambda c: c.pop("is_metric"), "is_metric.*missing"),
    (lambda c: c.update(is_metric=1), "is_metric"),
    (lambda c: c.update(version=2), "version"),
    (lambda c: c.update(camera_convention="opengl"), "camera_convention"),
    (lambda c: c.update(camera_model="OPENCV_FISHEYE"), "camera_model"),
    (lambda c: c.update(depth_encoding="float"), "depth_encoding"),
    (lambda c: c.update(depth_encoding="uint16"), "depth_scale"),
    (lambda c: c.update(depth_scale=5000), "depth_scale.*no meaning"),
    (lambda c: c.update(license_class="free"), "license_class"),
    (lambda c: c.update(frames=[]), "frames"),
    (lambda c: c.update(frames={"a": 1}), "frames"),
    (lambda c: c["frames"].append("frame"), r"frames\[4\].*not an object"),
    (lambda c: c["frames"].append(c["frames"][0]), "occurs twice"),
    (frame0(image=None), r"frames\[0\].image"),
    (frame0(image="../secret.png"), "outside the scene folder"),
    (frame0(depth="/etc/passwd"), "outside the scene folder"),
    (frame0(transform_matrix=np.eye(3).tolist()), r"transform_matrix.*shape is \(3, 3\)"),
    (frame0(transform_matrix=[[1, 2], [3]]), "transform_matrix"),
    (frame0(transform_matrix=(np.eye(4) * float("nan")).tolist()), "transform_matrix.*not finite"),
    (frame0(transform_matrix=np.diag([1, 1, 1.1, 1]).tolist()), "transform_matrix.*rotation"),
    (frame0(transform_matrix=np.diag([1, 1, -1, 1]).tolist()), "transform_matrix.*determinant"),
    (frame0(transform_matrix=np.diag([1, 1, 1, 2]).tolist()), "transform_matrix.*last row"),
    (frame0(transform_matrix=[*np.eye(4).tolist(), ["x"]]), "transform_matrix"),
    (frame0(fl_x=-1), "fl_x"),
    (frame0(fl_x=float("inf")), "fl_x"),
    (frame0(cx="320"), "cx"),
    (frame0(w=112.5), "w"),
    (frame0(timestamp="now"), "timestamp"),
    (frame0(mask="m.png", depth=None), "mask"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_metadata_is_refused_by_file_and_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit(write_canonical(tmp_path), change)
    with pytest.raises(InputError, match=f"(?s)scene_meta.json.*{message}") as error:
        read_scene(tmp_path)
    assert error.value.code == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ud800", "[" * 100_000, '{"version": ' + "9" * 5000 + "}"])
def test_files_that_are_no_scene(tmp_path: Path, content: str) -> None:
    (tmp_path / "scene_meta.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"scene_meta\.json"):
        read_scene(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = write_canonical(tmp_path / "room")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    edit(folder, frame0(image="link.png"))
    with pytest.raises(InputError, match="outside"):
        read_scene(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_depth_that_means_nothing_is_refused(tmp_path: Path, value: float) -> None:
    write_canonical(tmp_path, depth_encoding="npz")
    path = tmp_path / "depth" / "view-00.npz"
    depth = np.array(room_frames()[0].depth)
    depth[3, 5] = value
    np.savez(path, depth=depth)
    with pytest.raises(InputError, match=r"(?s)view-00.npz.*1 values.*row 3, column 5"):
        read_frame(read_scene(tmp_path), 0)


def damage(folder: Path, kind: str) -> None:
    image, depth = folder / "images" / "view-00.png", folder / "depth" / "view-00.png"
    if kind == "missing image":
        image.unlink()
    elif kind == "missing depth":
        depth.unlink()
    elif kind == "torn depth":
        depth.write_bytes(depth.read_bytes()[:-500])
    elif kind == "8-bit depth":
        Image.fromarray(np.zeros((84, 112), np.uint8)).save(depth)
    elif kind == "small depth":
        Image.fromarray(np.ones((84, 100), np.uint16)).save(depth)
    elif kind == "small image":
        Image.fromarray(np.zeros((84, 100, 3), np.uint8)).save(image)


@pytest.mark.parametrize(
    "kind", ["missing image", "missing depth", "torn depth", "8-bit depth", "small depth", "small image"]
)
def test_bad_files_are_named(tmp_path: Path, kind: str) -> None:
    damage(write_canonical(tmp_path), kind)
    with pytest.raises(InputError, match=r"view-00\.png"):
        read_frame(read_scene(tmp_path), 0)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", "wrong name", "pickle", "integers"])
def test_bad_npz_is_named(tmp_path: Path, content: bytes | str) -> None:
    write_canonical(tmp_path, depth_encoding="npz")
    path = tmp_path / "depth" / "view-00.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        arrays: dict[str, Any] = {
            "wrong name": {"z": np.ones((84, 112))},
            "pickle": {"depth": np.array([[{}]], dtype=object)},
            "integers": {"depth": np.ones((84, 112), int)},
        }[content]
        np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"view-00\.npz"):
        read_frame(read_scene(tmp_path), 0)


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    far = changed(room_frames(), depth=lambda depth: depth * 100)
    with pytest.raises(InputError, match="beyond 16 bits"):
        write_canonical(tmp_path, far)
    for name in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(InputError, match="cannot write frame"):
            write_canonical(tmp_path, [Frame(name, room_frames()[0].image)])
    with pytest.raises(InputError, match="occurs twice"):
        write_canonical(tmp_path, [room_frames()[0], room_frames()[0]])


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing data folder"):
        CanonicalSource(tmp_path / "nothing")
    with pytest.raises(InputError, match="no scenes"):
        CanonicalSource(tmp_path)
