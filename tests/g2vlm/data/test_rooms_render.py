"""Renderings of rooms against the oracle, against each other, and against the scene's state."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from g2vlm.data.rooms import CAMERA_LAWS, CATEGORIES, LAWS, Composite, Scene, build_scene, covisibility, pack, render
from g2vlm.data.rooms.cameras import look
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.scene import Part, Shape
from geometry import apply_rigid, ray_directions, unproject
from tests.g2vlm.data.rooms_oracle import Nearest, inside_box, trace

SIZE = (56, 70)
SCENES = [("tiny", 0), ("tiny", 3), ("tiny", 19), ("standard", 1), ("standard", 4)]


def scene_and_views(law: str, seed: int, num_views: int = 3, cameras: str = "wide"):
    scene = build_scene(LAWS[law], seed)
    views = CAMERA_LAWS[cameras](scene, num_views, Draws(seed, 1))
    return scene, views.poses(), views.intrinsics(SIZE)


def oracle(scene: Scene, pose: torch.Tensor, K: torch.Tensor, shift: float = 0.0) -> Nearest:
    """The oracle's view, its rays shifted by a fraction of a pixel."""
    moved = K.double().clone()
    moved[:2, 2] -= shift
    rays = ray_directions(moved, *SIZE).reshape(-1, 3).numpy() @ pose[:3, :3].double().numpy().T
    return trace(scene, pose[:3, 3].double().numpy(), rays)


def test_the_scenes_under_test_have_all_there_is() -> None:
    scenes = [build_scene(LAWS[law], seed) for law, seed in SCENES]
    assert any(scene.room.notch for scene in scenes)
    shapes = {part.shape for scene in scenes for composite in scene.composites for part in composite.parts}
    assert shapes == {"box", "cylinder", "sphere"}


@pytest.mark.parametrize(("law", "seed"), SCENES)
def test_equals_the_oracle(law: str, seed: int) -> None:
    scene, poses, K = scene_and_views(law, seed)
    views = render(pack(scene), poses, K, SIZE)
    for view in range(len(poses)):
        exact = oracle(scene, poses[view], K[view])
        near = [oracle(scene, poses[view], K[view], shift) for shift in (-1e-3, 1e-3)]
        # Where a thousandth of a pixel decides which surface is hit, rounding may too.
        stable = (near[0].surface == exact.surface) & (near[1].surface == exact.surface)
        assert stable.mean() > 0.99
        depth = views.depth[view].flatten().numpy()
        assert np.array_equal(views.instances[view].flatten().numpy()[stable], exact.instance[stable])
        assert np.abs(depth / exact.depth - 1)[stable].max() < 1e-5
        normal = exact.normal / np.linalg.norm(exact.normal, axis=-1, keepdims=True)
        given = views.world_normals[view].reshape(-1, 3).numpy()
        given = given * np.sign((given * normal).sum(-1, keepdims=True))
        error = np.abs(given - normal)[stable].max(-1)
        assert (error < 1e-5).mean() > 0.998
        assert error.max() < 3e-4  # at the rim of a thin post, where a micrometre turns the normal most


def test_rays_along_the_axes() -> None:
    """Level cameras that look straight at a wall: some rays are parallel to faces of walls, doors and cupboards."""
    scene = build_scene(LAWS["tiny"], 3)
    poses = np.stack([look(np.array([0.25, 0.25, 2.0]), yaw * np.pi / 2, 0, 0) for yaw in range(4)])
    poses = torch.from_numpy(poses.round(12)).float()
    K = torch.tensor([[60.0, 0, 35], [0, 60.0, 28], [0, 0, 1]]).expand(4, 3, 3)
    views = render(pack(scene), poses, K, SIZE)
    for view in range(4):
        exact = oracle(scene, poses[view], K[view])
        same = views.instances[view].flatten().numpy() == exact.instance
        assert same.mean() > 0.99
        assert np.quantile(np.abs(views.depth[view].flatten().numpy() / exact.depth - 1), 0.99) < 1e-5


@pytest.mark.parametrize("shape", ["box", "cylinder", "sphere"])
@pytest.mark.parametrize("turn", [-np.pi, -2.6, -0.5, -0.2, 0.0, 0.2, 0.5, 1.2, 2.6])
def test_beside_something_long_that_reaches_behind_the_camera(shape: Shape, turn: float) -> None:
    """Cameras a hand's breadth from either side of a thin screen, looking along it: it straddles the image plane."""
    scene = build_scene(LAWS["tiny"], 3)
    part = Part(shape, (0.0, 0.0, 1.0), (2.0, 0.02, 1.8), scene.room.materials[0])
    scene = replace(scene, furniture=(Composite("cabinet", (0.1, 0.2), 0.3, (part,)),))
    beside = [np.array([*scene.furniture[0].to_world(0.1, side), 1.1]) for side in (-0.07, 0.07)]
    poses = torch.from_numpy(np.stack([look(centre, 0.3 + turn, -0.1, 0.05) for centre in beside])).float()
    K = torch.tensor([[30.0, 0, 35], [0, 30.0, 28], [0, 0, 1]]).expand(2, 3, 3)
    views = render(pack(scene), poses, K, SIZE)
    for view in range(2):
        exact = oracle(scene, poses[view], K[view])
        given = views.depth[view].flatten().numpy()
        assert (np.abs(given / exact.depth - 1) < 1e-4)[exact.depth > 0.05].mean() > 0.998


def test_the_same_bits_alone_and_in_company() -> None:
    scene, poses, K = scene_and_views("standard", 2, num_views=5)
    together = render(pack(scene), poses, K, SIZE)
    alone = render(pack(scene), poses[3:4], K[3:4], SIZE)
    for name in ("images", "depth", "normals", "instances", "categories"):
        assert torch.equal(getattr(together, name)[3], getattr(alone, name)[0]), name


def test_maps_have_their_meaning() -> None:
    scene, poses, K = scene_and_views("tiny", 5, num_views=4)
    views = render(pack(scene), poses, K, SIZE)
    assert views.images.dtype == torch.uint8
    assert views.images.shape == (4, 3, *SIZE)
    assert views.valid.all()
    for index in views.instances.unique().tolist():
        categories = views.categories[views.instances == index].unique()
        assert [CATEGORIES[c] for c in categories.tolist()] == [scene.instances[index].category]


def test_normals_are_unit_and_face_the_camera() -> None:
    _, poses, K = scene_and_views("tiny", 6)
    views = render(pack(build_scene(LAWS["tiny"], 6)), poses, K, SIZE)
    assert torch.allclose(views.normals.norm(dim=-1), torch.ones(()), atol=1e-5)
    assert ((views.normals * ray_directions(K, *SIZE)).sum(-1) < 1e-6).all()
    turned = torch.einsum("vij,vhwj->vhwi", poses[:, :3, :3], views.normals)
    assert torch.allclose(turned, views.world_normals, atol=1e-5)


@pytest.mark.parametrize(("law", "seed"), SCENES)
def test_boxes_contain_the_points_of_their_instance(law: str, seed: int) -> None:
    scene, poses, K = scene_and_views(law, seed, num_views=4)
    views = render(pack(scene), poses, K, SIZE)
    points = apply_rigid(poses, unproject(views.depth, K)).reshape(-1, 3).double().numpy()
    instances = views.instances.flatten().numpy()
    for index in np.unique(instances):
        assert inside_box(points[instances == index], scene.instances[index].box, slack=1e-4).all()


@pytest.mark.parametrize("cameras", ["wide", "smooth"])
def test_points_of_one_view_lie_on_the_surfaces_of_another(cameras: str) -> None:
    """Cast a ray from camera j to each point of view i: nothing is hit behind the point, and where views agree, it."""
    scene, poses, K = scene_and_views("tiny", 7, num_views=2, cameras=cameras)
    views = render(pack(scene), poses, K, SIZE)
    points = apply_rigid(poses, unproject(views.depth, K))[0].reshape(-1, 3).double().numpy()
    origin = poses[1, :3, 3].double().numpy()
    met = trace(scene, origin, points - origin)
    assert (met.depth < 1 + 1e-4).all()
    visible = met.depth > 1 - 1e-4
    assert visible.mean() > 0.25
    assert (met.instance[visible] == views.instances[0].flatten().numpy()[visible]).mean() > 0.999


def test_covisibility_of_known_views() -> None:
    """A camera sees all of itself, and nothing of what is behind it."""
    scene = build_scene(LAWS["tiny"], 3)
    poses = np.stack([look(np.array([0.0, 0.0, 2.0]), yaw, 0, 0) for yaw in (0.0, 0.1, np.pi)])
    poses, K = torch.from_numpy(poses).float(), torch.tensor([[60.0, 0, 35], [0, 60.0, 28], [0, 0, 1]]).expand(3, 3, 3)
    share = covisibility(render(pack(scene), poses, K, SIZE).depth, K, poses)
    assert torch.equal(share.diagonal(), torch.ones(3))
    assert 0.8 < share[0, 1] < 0.95
    assert share[0, 2] == share[2, 0] == 0


def test_every_surface_has_texture() -> None:
    """Large patches of one instance differ in brightness."""
    plain = total = 0
    for seed in range(6):
        _, poses, K = scene_and_views("tiny", seed)
        views = render(pack(build_scene(LAWS["tiny"], seed)), poses, K, SIZE)
        grey = views.images.float().mean(1).unfold(1, 7, 7).unfold(2, 7, 7).flatten(-2)
        whole = views.instances.unfold(1, 7, 7).unfold(2, 7, 7).flatten(-2)
        one = (whole == whole[..., :1]).all(-1)
        plain += int((grey.std(-1)[one] < 1).sum())
        total += int(one.sum())
    assert plain / total < 0.1


def test_wrong_size_is_refused() -> None:
    _, poses, K = scene_and_views("tiny", 0)
    with pytest.raises(ValueError, match="multiples of 7"):
        render(pack(build_scene(LAWS["tiny"], 0)), poses, K, (60, 70))
