"""Rooms as a source of training data: endless scenes, rendered when they are asked for."""

from functools import lru_cache
from typing import Literal

import torch

from g2vlm.data.rooms.cameras import CAMERA_LAWS, Cameras
from g2vlm.data.rooms.draws import Draws
from g2vlm.data.rooms.layout import LAWS, SceneLaw, build_scene
from g2vlm.data.rooms.packing import PackedScene, pack
from g2vlm.data.rooms.render import render
from g2vlm.data.rooms.scene import Scene
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.errors import InputError

Split = Literal["train", "heldout"]
FIRST_SEED: dict[Split, int] = {"train": 0, "heldout": 2**40}
NUM_SCENES = 2**24
NUM_SEEDS = 2**16  # sources of NUM_SCENES that a split has room for
MAX_VIEWS = 24
CAMERA_STREAM = 1  # of a scene's random draws; stream 0 builds the scene
KEPT_SCENES = 32


class RoomsSource:
    """Procedural rooms; implements `g2vlm.data.types.SceneSource`.

    Equal requests give equal bytes in every process and on every machine. Training and held-out scenes have different
    seeds whatever `seed` is.

    Args:
        law: a name in `LAWS`, or a law.
        split: which seeds scenes are built from.
        seed: 0, ..., 65535: of the source; sources with different seeds share no scene.
        cameras: a name in `CAMERA_LAWS`.
        device: where to render; samples live there.

    Raises:
        InputError: a name or the seed is not one of those.
    """

    name = "rooms"

    def __init__(
        self,
        law: str | SceneLaw = "tiny",
        split: Split = "train",
        seed: int = 0,
        cameras: str = "mixed",
        device: torch.device | str = "cpu",
    ) -> None:
        if split not in FIRST_SEED:
            raise _unknown("split", split, FIRST_SEED)
        if cameras not in CAMERA_LAWS:
            raise _unknown("cameras", cameras, CAMERA_LAWS)
        if isinstance(law, str) and law not in LAWS:
            raise _unknown("law", law, LAWS)
        if not 0 <= seed < NUM_SEEDS:
            raise InputError(f"rooms: seed {seed}", "seeds count the sources of a split", f"give 0 to {NUM_SEEDS - 1}")
        self.law = LAWS[law] if isinstance(law, str) else law
        self.cameras = cameras
        self.device = torch.device(device)
        self._first = FIRST_SEED[split] + seed * NUM_SCENES

    def __len__(self) -> int:
        return NUM_SCENES

    def num_views(self, scene: int) -> int:
        """The most views that an excerpt may have."""
        return MAX_VIEWS

    def scene(self, scene: int) -> Scene:
        """The exact state of a scene."""
        return _built(self.law, self._seed(scene), "cpu")[0]

    def index(self, name: str) -> int:
        """The number of the scene of this name.

        Raises:
            InputError: it is not the name of a scene of this source.
        """
        digits = name.removeprefix("rooms-")
        number = int(digits) - self._first if digits.isdecimal() else -1
        if not 0 <= number < NUM_SCENES or not name.startswith("rooms-"):
            raise InputError(f"rooms: scene {name!r}", "this source has no scene of that name", "check split and seed")
        return number

    def excerpt(self, scene: int, request: ViewRequest) -> Cameras:
        """The cameras of a request."""
        draws = Draws(self._seed(scene), CAMERA_STREAM, request.seed)
        return CAMERA_LAWS[self.cameras](self.scene(scene), request.num_views, draws)

    def load(self, scene: int, request: ViewRequest) -> SceneSample:
        """Render the views of a request.

        Raises:
            InputError: more than 24 views, or a size that is not made of multiples of 14.
        """
        _check(request)
        state, packed = _built(self.law, self._seed(scene), str(self.device))
        cameras = self.excerpt(scene, request)
        poses, intrinsics = cameras.poses().to(self.device), cameras.intrinsics(request.size).to(self.device)
        views = render(packed, poses, intrinsics, request.size)
        return SceneSample(
            images=views.images,
            depth=views.depth,
            valid=views.valid,
            intrinsics=intrinsics,
            cam_to_world=poses,
            normals=views.normals,
            instances=views.instances,
            categories=views.categories,
            is_metric=True,
            quality="high",
            dataset=self.name,
            scene=state.name,
            view_ids=tuple(f"{request.seed}-{view:02d}" for view in range(request.num_views)),
            license_class="permissive",
        )

    def _seed(self, scene: int) -> int:
        if not 0 <= scene < NUM_SCENES:
            raise InputError(f"rooms: scene {scene}", "there is no such scene", f"give 0 to {NUM_SCENES - 1}")
        return self._first + scene


@lru_cache(maxsize=KEPT_SCENES)
def _built(law: SceneLaw, seed: int, device: str) -> tuple[Scene, PackedScene]:
    """A scene and its tables; the last few are kept for further excerpts."""
    scene = build_scene(law, seed)
    return scene, pack(scene, device)


def _check(request: ViewRequest) -> None:
    if not 1 <= request.num_views <= MAX_VIEWS:
        raise InputError(f"rooms: {request.num_views} views", "an excerpt has 1 to 24", "ask for fewer views")
    if any(extent < 14 or extent % 14 for extent in request.size):
        raise InputError(f"rooms: views of {request.size}", "height and width are multiples of 14", "round the size")


def _unknown(what: str, given: object, known: object) -> InputError:
    assert isinstance(known, dict)
    return InputError(f"rooms: {what} {given!r}", "there is no such name", f"use one of {', '.join(known)}")
