"""The clips that correspondence is measured on: views of a scene, and where the points of the first are in the others.

A `Clip` can be loaded at any width, and shows the same at each; its points are found once, at one width.

Shapes: T views, P query points, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.protocols import ViewRule
from eval.sources import choose_views, require_folder, scene_names, stretched
from g2vlm.data.canonical import CanonicalSource
from g2vlm.data.frames import FrameSource
from g2vlm.data.rooms import heldout_v1
from g2vlm.data.rooms.packing import pack
from g2vlm.data.rooms.render import render
from g2vlm.data.rooms.source import RoomsSource
from g2vlm.data.seven_scenes import SevenScenesSource
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError
from geometry import invert_rigid
from geometry.correspondence import (
    VisibilityRule,
    cycle_error,
    grid_pixels,
    keep_consistent,
    tracks_from_depth,
)

QUERY_GRID = (8, 8)
OFFSETS = 24
WINDOW = 49
"""Frames of a recording that a clip is spread over."""
RULE = VisibilityRule()
MAX_CYCLE_ERROR = 2.0
DATASETS = ("rooms", "seven_scenes", "canonical")


@dataclass(frozen=True)
class Clip:
    """Views of one scene.

    Args:
        name: of the scene.
        load: its views at a width in pixels; may raise InputError.
    """

    name: str
    load: Callable[[int], SceneSample]


@dataclass(frozen=True)
class ClipSet:
    """What is measured on.

    Args:
        name: as printed above the numbers.
        about: one line for people.
        clips: for matches and their confidence.
        paths: frames in the order of time, the first and the OFFSETS after it, or fewer.
    """

    name: str
    about: str
    clips: Sequence[Clip]
    paths: Sequence[Clip]


@dataclass(frozen=True, eq=False)
class Points:
    """Query points of the first view, and their places in the others.

    Args:
        size: (H, W) that the coordinates are for.
        queries: (P, 2) int64 pixels x, y in the first view.
        places: (T - 1, P, 2) in the others; without meaning where not visible.
        visible: (T - 1, P) bool.
    """

    size: tuple[int, int]
    queries: Tensor
    places: Tensor
    visible: Tensor


def points_of(sample: SceneSample) -> Points:
    """The middles of the first view's QUERY_GRID, followed by depth and cameras, those that do not come back left out.

    Raises:
        InputError: no depth or no cameras, or no point is visible in another view.
    """
    depth, valid, K, poses = sample.depth, sample.valid, sample.intrinsics, sample.cam_to_world
    if depth is None or K is None or poses is None:
        raise InputError(f"no correspondences in {sample.scene}", "it has no depth or no cameras", "leave it out")
    known = depth if valid is None else torch.where(valid, depth, 0)
    queries = grid_pixels(sample.size, QUERY_GRID, device=depth.device)
    world_to_cam = invert_rigid(poses)
    tracks = tracks_from_depth(known, K, world_to_cam, queries, RULE)
    tracks = keep_consistent(tracks, cycle_error(tracks, known, K, world_to_cam), MAX_CYCLE_ERROR)
    if not tracks.visible[1:].any():
        raise InputError(f"no correspondences in {sample.scene}", "no point is seen twice", "leave it out")
    return Points(sample.size, queries, tracks.points[1:], tracks.visible[1:])


def find_clips(dataset: str, data: Path | None, clips: int, views: int, paths: int) -> ClipSet:
    """The clips of a dataset.

    Args:
        dataset: one of DATASETS.
        data: its folder; none for rooms.
        clips: at most so many.
        views: of a clip.
        paths: at most so many.

    Raises:
        InputError: no folder, or a folder for rooms, which need none.
    """
    if dataset == "rooms":
        if data is not None:
            raise InputError("rooms are rendered", "they take no --data", "leave it out")
        return _rooms(clips, views, paths)
    folder = require_folder(dataset, data)
    source = CanonicalSource(folder) if dataset == "canonical" else SevenScenesSource(folder)
    return _recordings(dataset, source, clips, views, paths)


# ---------------------------------------------------------------------------------------------- rooms


def _rooms(clips: int, views: int, paths: int) -> ClipSet:
    wide, walks = (RoomsSource(heldout_v1.LAW, "heldout", cameras=law) for law in (heldout_v1.CAMERAS, "smooth"))
    name = f"rooms-correspondence-{views}"
    about = (
        f"held-out rooms (the first {len(heldout_v1.REQUEST_SEEDS)}: those of {heldout_v1.NAME}) in {views} "
        f"wide-baseline views; walks of {OFFSETS + 1} frames in the same rooms"
    )

    def clip(scene: int) -> Clip:
        return Clip(f"heldout-{scene:02d}", lambda size: wide.load(scene, ViewRequest(views, (size, size), 0)))

    def path(scene: int) -> Clip:
        return Clip(f"heldout-{scene:02d}", lambda size: walk(walks, scene, OFFSETS + 1, size))

    return ClipSet(name, about, [*map(clip, range(clips))], [*map(path, range(paths))])


def walk(rooms: RoomsSource, scene: int, num_views: int, size: int) -> SceneSample:
    """A walk through a room, longer than the source gives at once; square views `size` pixels wide."""
    request = ViewRequest(num_views, (size, size), 0)
    cameras, state = rooms.excerpt(scene, request), rooms.scene(scene)
    poses, intrinsics = cameras.poses(), cameras.intrinsics(request.size)
    views = render(pack(state, rooms.device), poses, intrinsics, request.size)
    return SceneSample(
        views.images, views.depth, views.valid, intrinsics, poses, is_metric=True, dataset=rooms.name, scene=state.name
    )


# ---------------------------------------------------------------------------------------------- recordings


def _recordings(dataset: str, source: FrameSource, clips: int, views: int, paths: int) -> ClipSet:
    """Each recording's first WINDOW frames, evenly thinned, and its first OFFSETS + 1."""
    names = scene_names(source)
    about = f"{views} views spread over the first {WINDOW} frames of a recording; its first {OFFSETS + 1} frames"

    def clip(scene: int, count: int, last: int) -> Clip:
        def load(width: int) -> SceneSample:
            known = range(min(last, len(source.frame_names(scene))))
            return stretched(source, scene, choose_views(known, ViewRule(count)), width)[0]

        return Clip(names[scene], load)

    scenes = range(len(source))
    return ClipSet(
        f"{dataset}-correspondence-{views}",
        about,
        [clip(scene, views, WINDOW) for scene in scenes[:clips]],
        [clip(scene, OFFSETS + 1, OFFSETS + 1) for scene in scenes[:paths]],
    )
