"""What an evaluation fixes, as data: which views, at what size, how predictions are aligned and how items are averaged.

A protocol's name stands beside every number; whoever changes one of its constants gets another name (`modified`).
Alignment belongs to the evaluator: a model's output is scored up to what the protocol aligns.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from g2vlm.errors import InputError

Average = Literal["macro", "micro"]
"""Over scenes, every scene the same; or over all pixels or pairs of views together. `results.json` has both."""
Intrinsics = Literal["exact", "one_factor"]
"""How intrinsics follow a resize: each axis with its own factor, or both with the larger (published tables)."""


@dataclass(frozen=True)
class ViewRule:
    """Which views of a scene are used; with no rule set, all of them in the order of the source.

    Args:
        stride: the views whose number is a multiple of it, counted from the scene's first.
        count: this many; evenly chosen from those that `stride` leaves, first and last included.
    """

    stride: int | None = None
    count: int | None = None


@dataclass(frozen=True)
class DepthRule:
    """One alignment over all views of an item together; `geometry.metrics.depth.ALIGNMENTS` has the names.

    Args:
        alignment: `l1_scale` is the scale of the smallest AbsRel (a weighted median).
        average: which one is the dataset's value.
        max_depth: true depth at or beyond it is invalid, in the unit of the data.
    """

    alignment: str = "l1_scale"
    average: Average = "macro"
    max_depth: float | None = None


@dataclass(frozen=True)
class PointRule:
    """Umeyama's Sim(3) on all valid pixels of all views, then point-to-point ICP; distances without a cap.

    The dataset's value is the mean over scenes.

    Args:
        alignment: its name in results.
        icp_distance: largest ICP correspondence, in the unit of the data.
        max_points: thin both clouds evenly to this many points; None where published numbers use every point.
    """

    alignment: str = "umeyama_then_icp"
    icp_distance: float = 0.1
    max_points: int | None = None


@dataclass(frozen=True)
class NormalRule:
    """Angles between oriented normals in the camera frame.

    Args:
        max_bend: normals derived from the truth are used where the second difference of 1/depth along rows and columns
            is at most this share of 1/depth. It is zero on planes, however slanted, and large at steps of the depth.
        average: which one is the dataset's value.
    """

    max_bend: float = 0.03
    average: Average = "macro"


@dataclass(frozen=True)
class PoseRule:
    """Errors of the relative poses of all pairs of views.

    Args:
        relative: `pi3` (w2c_j inv(w2c_i), as G2VLM) or `vggt`; `geometry.metrics.poses.RELATIVE_POSES`.
        thresholds: of RRA and RTA, degrees, strict.
        auc_limits: of AUC, degrees.
        average: which one is the dataset's value; `micro` pools the pairs of all items.
    """

    relative: str = "pi3"
    thresholds: tuple[int, ...] = (5, 15, 30)
    auc_limits: tuple[int, ...] = (30,)
    average: Average = "micro"


@dataclass(frozen=True)
class Protocol:
    """Everything that decides whether two numbers can be compared.

    Args:
        name: as printed beside the numbers.
        dataset: the kind of source it reads.
        about: one line for people.
        width: of the views in pixels; the height follows the aspect of the data, in multiples of 14. None: the
            source has views of one size, or, where nothing is scored, the model's own width. A width that is no
            multiple of 14 is that of the truth: the model sees the next smaller size, and its prediction is brought to
            the truth's.
        intrinsics: how they follow the resize to that width.
        views: which views.
        depth, points, normals, poses: the rules of the metrics.
        options: further choices that the source is built with.
        modified: constants that were changed from the named protocol; such numbers are comparable only among
            themselves.
    """

    name: str
    dataset: str
    about: str
    width: int | None = None
    intrinsics: Intrinsics = "exact"
    views: ViewRule = ViewRule()
    depth: DepthRule = DepthRule()
    points: PointRule = PointRule()
    normals: NormalRule = NormalRule()
    poses: PoseRule = PoseRule()
    options: dict[str, str] = field(default_factory=dict)
    modified: dict[str, int] = field(default_factory=dict)

    def changed(
        self,
        width: int | None = None,
        views: int | None = None,
        max_points: int | None = None,
        limit: int | None = None,
    ) -> "Protocol":
        """The protocol with other constants (None: as they are), recorded in `modified` and in `label`.

        `limit`, the number of scenes to stop at, is only recorded.
        """
        given = {"width": width, "views": views, "max_points": max_points, "limit": limit}
        modified = {name: value for name, value in given.items() if value is not None}
        return replace(
            self,
            width=width or self.width,
            views=replace(self.views, count=views or self.views.count),
            points=replace(self.points, max_points=max_points or self.points.max_points),
            modified=self.modified | modified,
        )

    @property
    def label(self) -> str:
        """The name, with what was modified."""
        if not self.modified:
            return self.name
        return f"{self.name} (modified: {', '.join(f'{name} {value}' for name, value in self.modified.items())})"

    def record(self) -> dict[str, Any]:
        """Everything, for `results.json`."""
        return asdict(self)


_STRIDES = {"": 40, "-sparse": 200}
_DEPTHS = {
    "proj_clean": "depth moved to the colour camera, invalid pixels removed first",
    "proj": "depth moved to the colour camera as in the published preparation, its uint16 wrap included",
    "rawdepth": "depth and intrinsics of the depth camera, not registered to the colours",
}


def _seven_scenes(name: str, depth: str, width: int = 518, intrinsics: Intrinsics = "exact") -> tuple[Protocol, ...]:
    """The protocol with every 40th frame and, `-sparse`, with every 200th.

    Depth is cut at 10 m and every valid pixel counts, as in the point-map evaluations that use these sequences.
    """
    grid = f"{width} wide" if intrinsics == "exact" else f"{width} wide, one factor for both axes of the intrinsics"
    return tuple(
        Protocol(
            f"{name}{suffix}",
            "seven_scenes",
            f"every {stride}th frame, {_DEPTHS[depth]}; {grid}",
            width=width,
            intrinsics=intrinsics,
            views=ViewRule(stride=stride),
            depth=DepthRule(average="micro", max_depth=10.0),
            options={"depth": depth},
        )
        for suffix, stride in _STRIDES.items()
    )


_ALL = (
    Protocol(
        "rooms-heldout-v1", "rooms", "rendered rooms that no training sees", points=PointRule(max_points=8192)
    ),  # a third of the points: what takes most of the time, and moves the distances little
    *_seven_scenes("7scenes-proj-clean", "proj_clean"),
    *_seven_scenes("7scenes-pi3-518", "proj", 518, "one_factor"),
    *_seven_scenes("7scenes-g2vlm-512", "proj", 512, "one_factor"),
    *_seven_scenes("7scenes-proj", "proj"),
    *_seven_scenes("7scenes-rawdepth", "rawdepth"),
    Protocol("canonical-v1", "canonical", "8 views spread over each scene folder", 518, views=ViewRule(count=8)),
    Protocol("images", "images", "outputs only: photographs have no ground truth"),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _ALL}
DATASETS = tuple(dict.fromkeys(protocol.dataset for protocol in _ALL))


def find_protocol(dataset: str, name: str | None = None) -> Protocol:
    """A dataset's protocol: the one named, or its first.

    Raises:
        InputError: no such protocol for the dataset.
    """
    names = [protocol.name for protocol in _ALL if protocol.dataset == dataset]
    if name is None and names:
        return PROTOCOLS[names[0]]
    if name not in names:
        other = f"it belongs to --dataset {PROTOCOLS[name].dataset}" if name in PROTOCOLS else ""
        raise InputError(f"no protocol {name} for the dataset {dataset}", other, f"choose from {', '.join(names)}")
    return PROTOCOLS[name]
