import dataclasses

import numpy as np
import pytest

from g2vlm import preview as page
from g2vlm import splat
from g2vlm.preview import preview
from g2vlm.scene import Scene
from tests.g2vlm.rooms import box_room

DARK = np.array(splat.BACKGROUND)


def lower_part(scene: Scene) -> np.ndarray:
    """The rendered pictures, without their captions."""
    return np.asarray(page.overviews(scene))[32:]


def random_scene() -> Scene:
    """What untrained weights give: noise, and poses that look anywhere."""
    rng = np.random.default_rng(0)
    local = np.exp(rng.normal(size=(4, 28, 42, 3)))
    local[..., :2] *= rng.choice([-1, 1], (4, 28, 42, 2))
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, :3, :3] = np.linalg.qr(rng.normal(size=(4, 3, 3)))[0]
    poses[:, :3, 3] = rng.normal(size=(4, 3))
    intrinsics = rng.normal(size=(4, 3, 3))
    return box_room(4, (28, 42), local_points=local, cam_to_world=poses, intrinsics=intrinsics, units="relative")


def one_place() -> Scene:
    return box_room(2, (14, 14), local_points=np.broadcast_to(np.array([0, 0, 2.0]), (2, 14, 14, 3)))


def flat_at_origin() -> Scene:
    return box_room(1, (14, 14), local_points=np.zeros((1, 14, 14, 3)), valid=np.ones((1, 14, 14), bool))


def huge() -> Scene:
    points = box_room(2, (28, 42)).local_points.copy()
    points[0, 3, 4] = 1e30
    return box_room(2, (28, 42), local_points=points)


SCENES = {
    "one view": lambda: box_room(1, (28, 42)),
    "two views": lambda: box_room(2, (28, 42)),
    "24 views": lambda: box_room(24, (14, 28)),
    "portrait": lambda: box_room(3, (56, 14)),
    "panorama": lambda: box_room(9, (14, 140)),
    "smallest": lambda: box_room(1, (14, 14)),
    "random weights": random_scene,
    "one place": one_place,
    "at the camera": flat_at_origin,
    "an outlier": huge,
    "nothing valid": lambda: box_room(2, (28, 42), valid=np.zeros((2, 28, 42), bool)),
    "no normals": lambda: box_room(2, (28, 42), normals=np.zeros((2, 28, 42, 3))),
    "looking down": lambda: box_room(1, (28, 42), cam_to_world=np.eye(4)[None, [0, 2, 1, 3]] * (1, 1, -1, 1)),
    "long name": lambda: box_room(2, (28, 42), model="line\nline " * 40),
}


@pytest.mark.parametrize("name", SCENES)
def test_every_scene_has_a_picture(name):
    picture = preview(SCENES[name]())
    assert picture.mode == "RGB"
    assert picture.width == page.WIDTH
    assert 700 < picture.height < 2500


@pytest.mark.parametrize("num_views", [1, 4, 24])
def test_points_fill_the_rendered_pictures_and_cameras_are_in_them(num_views):
    scene = box_room(num_views, (56, 70))
    rendered = lower_part(scene)
    for half in np.array_split(rendered, 2, axis=1):
        assert (half != DARK).any(-1).mean() > 0.12
        for colour in page.camera_colours(num_views)[[0, -1]]:
            assert (np.abs(half.astype(int) - colour).sum(-1) < 40).sum() > 20


def test_the_picture_does_not_depend_on_the_scale_or_frame_of_the_scene():
    scene = box_room(3, (56, 70))
    turn = np.eye(4)
    turn[:3, :3] = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    turn[:3, 3] = 5, -2, 9
    poses = scene.cam_to_world.astype(np.float64).copy()
    poses[:, :3, 3] *= 100
    other = dataclasses.replace(
        scene, local_points=scene.local_points * 100, cam_to_world=(turn @ poses).astype(np.float32)
    )
    difference = np.abs(lower_part(scene).astype(int) - lower_part(other)).max(-1) > 30
    assert difference.mean() < 0.03


def test_an_outlier_does_not_shrink_the_scene():
    assert (lower_part(huge()) != DARK).any(-1).mean() > 0.15


def test_title_states_what_is_shown(monkeypatch):
    texts, draw = [], page.ImageDraw.ImageDraw.text

    def record(self, position, text, *args, **options):
        texts.append(text)
        draw(self, position, text, *args, **options)

    monkeypatch.setattr(page.ImageDraw.ImageDraw, "text", record)
    preview(box_room(24, (14, 28), units="relative", model="tiny"))
    line = " ".join(texts)
    facts = ["24 views", "shown: 0, 3, 7, 10, 13, 16, 20, 23", "28 x 14 pixels", "model: tiny", "units: relative"]
    assert [fact for fact in [*facts, "view 23", "depth (relative)"] if fact not in line] == []


def test_depth_range_is_shared_and_robust():
    values = np.concatenate([np.linspace(1, 2, 1000), [1e9]])
    low, high = page.percentile_range(values)
    assert 1 <= low < 1.03
    assert 1.97 < high <= 2
    assert page.percentile_range(np.array([])) == (0, 1)
    low, high = page.percentile_range(np.full(9, 3.0))
    assert low < 3 < high


def test_depth_colours_are_evenly_darker_with_distance():
    colours = page.depth_colours(np.linspace(-1, 6, 400), (0.0, 5.0)).astype(float)
    linear = np.where(colours <= 10, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16
    np.testing.assert_array_equal(colours[0], page.DEPTH_COLOURS[0])
    np.testing.assert_array_equal(colours[-1], page.DEPTH_COLOURS[-1])
    inside = lightness[58:342:20]
    assert (np.diff(inside) < 0).all()
    assert np.diff(inside).std() < 0.35 * np.abs(np.diff(inside)).mean()


def test_normal_colours():
    right, up, camera = page.normal_colours(np.array([(1, 0, 0), (0, -1, 0), (0, 0, -1)]))
    assert right[0] == up[1] == camera[2] == 255
    assert (right[1], right[2]) == (128, 128)


# ---------------------------------------------------------------------------------------------- renderer

VIEW = splat.Viewpoint(np.eye(4), focal=10.0, middle=np.array([10.0, 5.0]), size=(11, 21))


def dots(*entries: tuple) -> splat.Points:
    xyz, rgb, radius = zip(*entries, strict=True)
    return splat.Points(np.array(xyz, float), np.array(rgb, np.uint8), np.array(radius, float))


def test_the_nearest_point_wins_whatever_the_order():
    near, far = ((0, 0, 2), (255, 0, 0), 0.0), ((0, 0, 4), (0, 255, 0), 0.5)
    for order in ((near, far), (far, near)):
        rgb, depth = splat.splat(dots(*order), VIEW)
        assert rgb[5, 10].tolist() == [255, 0, 0]
        assert rgb[5, 11].tolist() == [0, 255, 0]
        assert (depth[5, 10], depth[5, 11], depth[0, 0]) == (2, 4, np.inf)


def test_of_equal_discs_the_nearest_wins_whatever_the_order():
    discs = [((0, 0, z), (z, 0, 0), 0.0) for z in (3, 2, 5, 4)]
    for order in (discs, discs[::-1]):
        assert splat.splat(dots(*order), VIEW)[0][5, 10].tolist() == [2, 0, 0]


def test_points_land_where_the_camera_sees_them():
    rgb, _ = splat.splat(dots(((0.4, -0.2, 2), (9, 9, 9), 0.0)), VIEW)
    assert np.argwhere((rgb == 9).all(-1)).tolist() == [[4, 12]]


def test_points_behind_the_camera_and_outside_are_left_out():
    behind = dots(((0, 0, -1), (9, 9, 9), 1.0), ((0, 0, 0), (9, 9, 9), 1.0), ((50, 0, 1), (9, 9, 9), 0.1))
    rgb, depth = splat.splat(behind, VIEW)
    assert (rgb == DARK).all()
    assert np.isinf(depth).all()


def test_markers_shine_through():
    wall = dots(((0, 0, 2), (0, 0, 0), 3.0))
    picture = splat.render(wall, dots(((0, 0, 1), (200, 0, 0), 0.0), ((0.6, 0, 3), (200, 0, 0), 0.0)), VIEW)
    assert picture[5, 10].tolist() == [200, 0, 0]
    assert picture[5, 12].tolist() == [int(200 * splat.HIDDEN_OPACITY), 0, 0]


def test_shading_darkens_the_far_side_of_a_step():
    depth = np.full((9, 20), 2.0)
    depth[:, 10:] = 3.0
    shade = splat.depth_shading(depth)
    np.testing.assert_array_equal(shade[:, :10], 1)
    assert (shade[:, 10] < 0.9).all()
    np.testing.assert_array_equal(shade[:, 13:], 1)
    assert (splat.depth_shading(np.full((4, 4), np.inf)) == 1).all()


@pytest.mark.parametrize("tilt", [0, 30, 60])
def test_up_is_found_though_the_cameras_look_down(tilt):
    """Level cameras on a circle, tilted down; no normals to help."""
    poses = []
    for turn in np.radians([-40, 0, 40]):
        forward = np.array([np.sin(turn), np.tan(np.radians(tilt)), np.cos(turn)])
        poses.append(splat.look_at(np.zeros(3), forward, np.array([0.0, -1.0, 0.0])))
    up = splat.upwards(np.stack(poses), np.zeros((10, 3)))
    assert up @ (0, -1, 0) > np.cos(np.radians(15))


def test_a_floor_refines_up():
    floor = np.tile(np.array([0.0, -1.0, 0.0]), (100, 1))
    pose = splat.look_at(np.zeros(3), np.array([0.0, 0.5, 1.0]), np.array([0.0, -1.0, 0.0]))[None]
    np.testing.assert_allclose(splat.upwards(pose, floor), (0, -1, 0), atol=1e-9)


def test_frusta_point_where_the_cameras_look():
    """In its own camera, a frustum of size 2 is the image border at depth 2, and lines from it to the centre."""
    scene = box_room(3, (28, 42))
    frusta = page.camera_points(scene, 2.0, 0.1).xyz.reshape(3, -1, 3)
    K = scene.intrinsics_at((28, 42))
    for xyz, pose, intrinsics in zip(frusta, scene.world_to_cam, K, strict=True):
        local = xyz @ pose[:3, :3].T + pose[:3, 3]
        assert np.abs(local).max(1).min() < 1e-5
        corners = local[local[:, 2] > 1.999]
        uv = (corners @ intrinsics.T)[:, :2] / corners[:, 2:]
        np.testing.assert_allclose(uv.max(0), (41.5, 27.5), atol=1e-3)
        np.testing.assert_allclose(uv[:, 0].min(), -0.5, atol=1e-3)
        assert uv[:, 1].min() < -5  # the roof marks the upper side


def test_a_viewpoint_is_behind_above_and_sees_the_points():
    rng = np.random.default_rng(0)
    points = rng.uniform((-1, -1, 4), (1, 1, 6), (500, 3))
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = -4, 0, 4
    up = np.array([0.0, -1.0, 0.0])
    view = splat.overview(points, poses[:, :3, 3], (up, splat.heading(poses, up)), (0, 30), (100, 150))
    assert view.centre[2] < 5
    assert view.centre[1] < 0
    uv = view.project(view.local(np.concatenate([points, poses[:, :3, 3]])))
    inside = ((uv >= 0) & (uv < (150, 100))).all(1)
    assert inside.mean() > 0.98
    assert inside[-3:].all()
