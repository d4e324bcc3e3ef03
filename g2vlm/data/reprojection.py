"""Do depth, intrinsics and poses of a scene fit each other? One view's points must fall on the depth of another.

S views of any size h x w; P pairs of views.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

GRID = 80  # points across a view; their depth is compared with the full resolution of the other
MIN_OVERLAP = 0.3  # share of a view's points that must fall on valid depth of the other for the two to be covisible
CLOSE = 0.05  # relative depth difference at which a point counts as the same surface


@dataclass(frozen=True, eq=False)
class PosedDepth:
    """One view: depth (h, w), 0 = invalid; K (3, 3); cam_to_world (4, 4)."""

    depth: np.ndarray
    K: np.ndarray
    cam_to_world: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How well the views of a scene agree.

    Args:
        pairs: ordered pairs of covisible views.
        error: median over the pairs of the median relative depth difference; NaN without pairs.
        close: mean over all pairs tried of the share of points that meet the same surface within 5%.
    """

    pairs: int
    error: float
    close: float


def agreement(views: Sequence[PosedDepth]) -> Agreement:
    """Compare every ordered pair of views."""
    clouds = [_points(view) for view in views]
    errors, closes = [], []
    for i, points in enumerate(clouds):
        for j, other in enumerate(views):
            if i == j or not len(points):
                continue
            difference = _differences(points, views[i].cam_to_world, other)
            closes.append(float((difference < CLOSE).sum()) / len(points))
            if len(difference) >= MIN_OVERLAP * len(points):
                errors.append(float(np.median(difference)))
    return Agreement(
        len(errors), float(np.median(errors)) if errors else float("nan"), float(np.mean(closes)) if closes else 0.0
    )


def _points(view: PosedDepth) -> np.ndarray:
    """(N, 3) local points on a coarse grid."""
    step = max(1, view.depth.shape[1] // GRID)
    rows, columns = np.mgrid[step // 2 : view.depth.shape[0] : step, step // 2 : view.depth.shape[1] : step]
    z = view.depth[rows, columns].astype(np.float64)
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1)[z > 0]
    return z[z > 0][:, None] * (pixels @ np.linalg.inv(view.K).T)


def _differences(points: np.ndarray, pose: np.ndarray, other: PosedDepth) -> np.ndarray:
    """Relative depth differences where points (N, 3) of a camera at `pose` fall on valid depth of another view."""
    move = np.linalg.inv(other.cam_to_world) @ pose
    seen = points @ move[:3, :3].T + move[:3, 3]
    seen = seen[seen[:, 2] > 1e-6 * np.abs(seen).max(initial=1e-12)]
    pixels = np.rint((seen @ other.K.T)[:, :2] / seen[:, 2:])
    height, width = other.depth.shape
    inside = ((pixels >= 0) & (pixels < (width, height))).all(1)
    columns, rows = pixels[inside].astype(int).T
    truth = other.depth[rows, columns]
    return np.abs(seen[inside, 2][truth > 0] - truth[truth > 0]) / truth[truth > 0]


# ---------------------------------------------------------------------------------------------- likely mistakes


def alternatives(views: Sequence[PosedDepth]) -> Mapping[str, list[PosedDepth]]:
    """The same views read in the other ways that are common; keys say what was mistaken for what."""
    flip = np.diag([1.0, -1.0, -1.0, 1.0])
    return {
        "the poses look like world_to_cam": inverted(views),
        "the poses look like cam_to_world with OpenGL axes": [
            replace(view, cam_to_world=view.cam_to_world @ flip) for view in views
        ],
        "the depth looks like distances along the rays": [replace(view, depth=_z_from_ray(view)) for view in views],
    }


def inverted(views: Sequence[PosedDepth]) -> list[PosedDepth]:
    """The views with their poses inverted."""
    return [replace(view, cam_to_world=np.linalg.inv(view.cam_to_world)) for view in views]


def _z_from_ray(view: PosedDepth) -> np.ndarray:
    rows, columns = np.mgrid[: view.depth.shape[0], : view.depth.shape[1]]
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(view.K).T
    return view.depth / np.linalg.norm(rays, axis=-1)


def diagnose(views: Sequence[PosedDepth], given: Agreement, limit: float) -> str:
    """The alternative reading that fits, or an empty string when none does clearly better than the given one."""
    for name, other in alternatives(views).items():
        found = agreement(other)
        if found.pairs and found.error < limit and found.close > 1.2 * given.close:
            return name
    return ""


def is_ambiguous(views: Sequence[PosedDepth], given: Agreement, limit: float) -> bool:
    """Whether inverted poses fit nearly as well, because the views hardly move."""
    found = agreement(inverted(views))
    return found.pairs >= given.pairs and found.error < limit and found.close > 0.95 * given.close
