"""What an evaluation fixes, as data: which views, at what size, how predictions are aligned and how items are averaged.

A protocol's name stands beside every number; whoever changes one of its constants gets another name (`modified`).
Alignment belongs to the evaluator: a model's output is scored up to what the protocol aligns.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from g2vlm.errors import InputError

Average = Literal["plain", "pixels"]
"""Of per-item scores: every item counts the same, or by its valid pixels."""


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
        average: how items make up the dataset's value.
        max_depth: true depth at or beyond it is invalid, in the unit of the data.
    """

    alignment: str = "l1_scale"
    average: Average = "plain"
    max_depth: float | None = None


@dataclass(frozen=True)
class PointRule:
    """Umeyama's Sim(3) on all valid pixels of all views, then point-to-point ICP; distances without a cap.

    Args:
        icp_distance: largest ICP correspondence, in the unit of the data.
        average: how items make up the dataset's value.
        max_points: thin both clouds evenly to this many points; None where published numbers use every point.
    """

    icp_distance: float = 0.1
    average: Average = "plain"
    max_points: int | None = None


@dataclass(frozen=True)
class NormalRule:
    """Angles between oriented normals in the camera frame.

    Args:
        max_bend: normals derived from the truth are used where the second difference of 1/depth along rows and columns
            is at most this share of 1/depth. It is zero on planes, however slanted, and large at steps of the depth.
        average: how items make up the dataset's value.
    """

    max_bend: float = 0.03
    average: Average = "plain"


@dataclass(frozen=True)
class PoseRule:
    """Errors of the relative poses of all pairs of views, pooled over all items.

    Args:
        relative: `pi3` (w2c_j inv(w2c_i), as G2VLM) or `vggt`; `geometry.metrics.poses.RELATIVE_POSES`.
        thresholds: of RRA and RTA, degrees, strict.
        auc_limits: of AUC, degrees.
    """

    relative: str = "pi3"
    thresholds: tuple[int, ...] = (5, 15, 30)
    auc_limits: tuple[int, ...] = (30,)


@dataclass(frozen=True)
class Protocol:
    """Everything that decides whether two numbers can be compared.

    Args:
        name: as printed beside the numbers.
        dataset: the kind of source it reads.
        about: one line for people.
        width: of the views in pixels; the height follows the aspect of the data, in multiples of 14. None: the
            source has views of one size, or, where nothing is scored, the model's own width.
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


def _seven_scenes(name: str, depth: str, stride: int, about: str) -> Protocol:
    """Depth is cut at 10 m and every valid pixel counts, as in the point-map evaluations that use these sequences."""
    return Protocol(
        name,
        "seven_scenes",
        f"{about}, every {stride}th frame",
        width=518,
        views=ViewRule(stride=stride),
        depth=DepthRule(average="pixels", max_depth=10.0),
        options={"depth": depth},
    )


_PUBLISHED = "depth moved to the colour camera as in the published preparation, its uint16 wrap included"
_CLEAN = "depth moved to the colour camera, invalid pixels removed first"
_RAW = "depth and intrinsics of the depth camera, not registered to the colours"
_ALL = (
    Protocol(
        "rooms-heldout-v1", "rooms", "rendered rooms that no training sees", points=PointRule(max_points=8192)
    ),  # a third of the points: what takes most of the time, and moves the distances little
    _seven_scenes("7scenes-proj-clean", "proj_clean", 40, _CLEAN),
    _seven_scenes("7scenes-proj-clean-sparse", "proj_clean", 200, _CLEAN),
    _seven_scenes("7scenes-proj", "proj", 40, _PUBLISHED),
    _seven_scenes("7scenes-proj-sparse", "proj", 200, _PUBLISHED),
    _seven_scenes("7scenes-rawdepth", "rawdepth", 40, _RAW),
    Protocol("canonical-v1", "canonical", "8 views spread over each scene folder", 518, ViewRule(count=8)),
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
        raise InputError(f"no protocol {name} for the dataset {dataset}", "", f"choose from {', '.join(names)}")
    return PROTOCOLS[name]
