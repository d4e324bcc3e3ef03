"""The laws of scenes and cameras, the source, and the held-out set."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from g2vlm.data.rooms import CAMERA_LAWS, CATEGORIES, LAWS, Composite, RoomsSource, build_scene, covisibility, heldout
from g2vlm.data.rooms import heldout_v1 as fixed
from g2vlm.data.rooms.cameras import HEIGHTS, Obstacles
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.layout import footprint, overlap
from g2vlm.data.rooms.source import MAX_VIEWS, NUM_SCENES, NUM_SEEDS
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from geometry import invert_rigid
from geometry.metrics.poses import pair_errors, pool_pairs, pose_metrics
from tests.g2vlm.data.rooms_oracle import inside_box

REQUEST = ViewRequest(3, (28, 42), 5)
SEEDS = range(40)


def scenes(law: str):
    return [build_scene(LAWS[law], seed) for seed in SEEDS]


def floor_grid(composite: Composite) -> np.ndarray:
    """Points (N, 2) all over the footprint of a composite, from its corners inwards."""
    box, steps = composite.box, np.linspace(-0.5, 0.5, 9)
    local = np.stack(np.meshgrid(steps * box.size[0], steps * box.size[1]), -1).reshape(-1, 2)
    cos, sin = np.cos(box.yaw), np.sin(box.yaw)
    return local @ np.array([[cos, sin], [-sin, cos]]) + np.array(box.centre[:2])


@pytest.mark.parametrize("law", sorted(LAWS))
def test_scenes_obey_their_law(law: str) -> None:
    least, most = LAWS[law].furniture
    found = scenes(law)
    for scene in found:
        assert least <= len(scene.furniture) <= most
        assert {composite.category for composite in scene.composites} <= set(CATEGORIES)
        assert [instance.index for instance in scene.instances] == list(range(len(scene.instances)))
        for instance in scene.instances[-len(scene.composites) :]:
            assert instance.box.volume > 0
    assert {bool(scene.room.notch) for scene in found} == {True, False}


@pytest.mark.parametrize("law", sorted(LAWS))
def test_composites_stay_inside_the_room(law: str) -> None:
    for scene in scenes(law):
        corners = np.array(scene.room.polygon)
        for composite in scene.composites:
            points = floor_grid(composite) * (1 - 1e-9)
            assert winding(points, corners).all()
            assert composite.box.centre[2] - composite.box.size[2] / 2 >= -1e-9
            assert composite.box.centre[2] + composite.box.size[2] / 2 <= scene.room.size[2]


def winding(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Whether points (N, 2) are inside a polygon: the angles to its corners add up to a full turn."""
    to = corners[None] - points[:, None]
    following = np.roll(to, -1, axis=1)
    cross = to[..., 0] * following[..., 1] - to[..., 1] * following[..., 0]
    return np.abs(np.arctan2(cross, (to * following).sum(-1)).sum(1) - 2 * np.pi) < 1e-6


@pytest.mark.parametrize("law", sorted(LAWS))
def test_composites_do_not_overlap(law: str) -> None:
    """Tried point by point, and by separating axes."""
    for scene in scenes(law):
        for a, b in itertools.combinations(scene.composites, 2):
            apart_in_height = abs(a.box.centre[2] - b.box.centre[2]) >= (a.box.size[2] + b.box.size[2]) / 2
            if apart_in_height:
                continue
            assert not overlap(footprint(a.box), footprint(b.box)), (scene.name, a.category, b.category)
            height = np.full((81, 1), b.box.centre[2])
            assert not inside_box(np.hstack([floor_grid(a), height]), b.box, slack=0).any()


def test_overlap_of_known_rectangles() -> None:
    base = (0.0, 0.0, 1.0, 0.5, 0.0)
    assert overlap(base, (1.9, 0.0, 1.0, 0.5, 0.0))
    assert not overlap(base, (2.1, 0.0, 1.0, 0.5, 0.0))
    assert overlap(base, (2.1, 0.0, 1.0, 0.5, 0.0), clearance=0.2)
    assert overlap(base, (0.0, 1.4, 1.0, 0.5, np.pi / 2))
    assert overlap(base, (1.2, 0.7, 0.4, 0.4, np.pi / 4))
    assert not overlap(base, (1.5, 0.9, 0.4, 0.4, np.pi / 4))


def test_the_polygon_of_an_l_shaped_room() -> None:
    for scene in scenes("standard"):
        x, y, _ = scene.room.size
        notch = scene.room.notch
        assert scene.room.area == pytest.approx(x * y - (notch.size[0] * notch.size[1] if notch else 0))
        if notch and (box := scene.room.notch_box):
            assert not winding(np.array([box.centre[:2]]), np.array(scene.room.polygon)).any()


# Cameras.


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("cameras", ["wide", "near", "pan", "smooth"])
def test_cameras_are_in_free_space_at_human_heights(law: str, cameras: str) -> None:
    for seed in range(12):
        scene = build_scene(LAWS[law], seed)
        views = CAMERA_LAWS[cameras](scene, 4, Draws(seed, 1))
        centres = views.cam_to_world[:, :3, 3]
        assert ((centres[:, 2] >= HEIGHTS[0]) & (centres[:, 2] <= HEIGHTS[1])).all()
        assert winding(centres[:, :2], np.array(scene.room.polygon)).all()
        assert not any(inside_box(centres, composite.box, slack=0.2).any() for composite in scene.furniture)
        rotation = views.cam_to_world[:, :3, :3]
        assert np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3))
        assert (rotation[:, 2, 1] < 0).all(), "y points down"


def test_free_and_distances_of_known_places() -> None:
    obstacles = Obstacles(build_scene(LAWS["tiny"], 3))
    outside = obstacles.room * (0.51, 0.0, 0.0) + (0, 0, 1.5)
    assert not obstacles.free(outside)
    up = obstacles.distances(np.array([0.0, 0.0, 2.0]), np.array([[0.0, 0.0, 1.0]]))
    assert up[0] == pytest.approx(obstacles.room[2] - 2.0)


def test_camera_laws_turn_less_or_more() -> None:
    turns = {name: np.median([rotations(name, seed) for seed in range(20)]) for name in CAMERA_LAWS}
    assert turns["smooth"] < 15
    assert turns["smooth"] < turns["near"] < 25
    assert turns["wide"] > 30
    assert turns["near"] < turns["varied"] < turns["wide"]


def rotations(cameras: str, seed: int) -> np.ndarray:
    """Degrees between all pairs of four views."""
    views = CAMERA_LAWS[cameras](build_scene(LAWS["tiny"], seed), 4, Draws(seed, 1))
    return pair_errors(np.tile(np.eye(4), (4, 1, 1)), np.linalg.inv(views.cam_to_world)).rotation_deg


def test_views_of_training_see_the_same_things() -> None:
    source = RoomsSource(cameras="wide")
    shared = [most_shared(source.load(scene, ViewRequest(3, (42, 42), 0))) for scene in range(30)]
    assert (torch.cat(shared) >= 0.25).float().mean() > 0.9


def most_shared(sample: SceneSample) -> torch.Tensor:
    """(S,) the largest share of each view that another one sees."""
    assert sample.depth is not None
    assert sample.intrinsics is not None
    assert sample.cam_to_world is not None
    share = covisibility(sample.depth, sample.intrinsics, sample.cam_to_world)
    return share.fill_diagonal_(0).amax(1)


# The source.


def equal(a: SceneSample, b: SceneSample) -> bool:
    names = ("images", "depth", "intrinsics", "cam_to_world", "normals", "instances", "categories")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_equal_requests_give_equal_bytes() -> None:
    first = RoomsSource().load(11, REQUEST)
    again = pickle.loads(pickle.dumps(RoomsSource())).load(11, REQUEST)
    assert equal(first, again)
    assert first.view_ids == again.view_ids == ("5-00", "5-01", "5-02")


def test_seeds_scenes_and_requests_differ() -> None:
    samples = [
        RoomsSource().load(11, REQUEST),
        RoomsSource().load(12, REQUEST),
        RoomsSource(seed=1).load(11, REQUEST),
        RoomsSource(split="heldout").load(11, REQUEST),
        RoomsSource().load(11, ViewRequest(3, (28, 42), 6)),
    ]
    assert not any(equal(a, b) for a, b in itertools.combinations(samples, 2))
    assert len({sample.scene for sample in samples}) == 4


def test_held_out_seeds_are_never_trained_on() -> None:
    last = RoomsSource(split="train", seed=NUM_SEEDS - 1)
    first = RoomsSource(split="heldout")
    assert last._seed(NUM_SCENES - 1) < first._seed(0)


@pytest.mark.parametrize("size", [(14, 14), (42, 28), (28, 56)])
@pytest.mark.parametrize("num_views", [2, MAX_VIEWS])
def test_any_size_and_number_of_views(size: tuple[int, int], num_views: int) -> None:
    sample = RoomsSource("standard").load(0, ViewRequest(num_views, size, 0))
    assert sample.size == size
    assert sample.num_views == num_views == len(set(sample.view_ids))
    assert sample.is_metric
    assert sample.license_class == "permissive"


@pytest.mark.parametrize("request_", [ViewRequest(25, (28, 28), 0), ViewRequest(0, (28, 28), 0)])
def test_too_many_views_are_refused(request_: ViewRequest) -> None:
    with pytest.raises(InputError, match="views"):
        RoomsSource().load(0, request_)


def test_bad_sizes_and_names_are_refused() -> None:
    with pytest.raises(InputError, match="multiples of 14"):
        RoomsSource().load(0, ViewRequest(2, (28, 30), 0))
    with pytest.raises(InputError, match="tiny, standard"):
        RoomsSource(law="huge")
    with pytest.raises(InputError, match="wide"):
        RoomsSource(cameras="none")
    with pytest.raises(InputError, match="seed"):
        RoomsSource(seed=NUM_SEEDS)
    with pytest.raises(InputError, match="scene"):
        RoomsSource().load(NUM_SCENES, REQUEST)


# rooms-heldout-v1.


@pytest.fixture(scope="module")
def held_out() -> list[SceneSample]:
    return heldout()


def test_held_out_content_is_fixed() -> None:
    assert fixed.digest() == fixed.DIGEST


def test_the_digest_notices_a_micrometre() -> None:
    content = {"a": [1.0, 2.0], "b": (-0.0, "name", 3)}
    assert fixed.rounded({"a": [1.0 + 1e-9, 2.0], "b": (0.0, "name", 3)}) == fixed.rounded(content)
    assert fixed.rounded({"a": [1.0 + 2e-6, 2.0], "b": (0.0, "name", 3)}) != fixed.rounded(content)


def test_held_out_size(held_out: list[SceneSample]) -> None:
    assert len(held_out) == 64
    assert {(sample.num_views, sample.size) for sample in held_out} == {(4, (84, 84))}
    assert len({sample.scene for sample in held_out}) == 64


def test_held_out_rotations(held_out: list[SceneSample]) -> None:
    errors = []
    for sample in held_out:
        assert sample.cam_to_world is not None
        truth = invert_rigid(sample.cam_to_world.double()).numpy()
        errors.append(pair_errors(np.tile(np.eye(4), (4, 1, 1)), truth))
    pooled = pool_pairs(errors)
    assert np.median(pooled.rotation_deg) >= 30
    assert pose_metrics(pooled).rra[15] <= 20


def test_held_out_views_overlap(held_out: list[SceneSample]) -> None:
    assert all((most_shared(sample) >= 0.25).all() for sample in held_out)
