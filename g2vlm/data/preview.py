"""A contact sheet of data: images, depth, normals and instances of some views of some scenes.

S views, H, W pixels of a view.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from g2vlm.data.checks import frames_of
from g2vlm.data.frames import FrameSource
from g2vlm.data.types import SceneSample, SceneSource, ViewRequest
from g2vlm.errors import InputError
from g2vlm.images import geometry_size
from g2vlm.preview import (
    INK,
    MARGIN,
    MUTED,
    NOTHING,
    PAGE,
    WIDTH,
    depth_colours,
    font,
    grid,
    legend,
    normal_colours,
    percentile_range,
    printable,
    stack,
)  # fmt: skip
from geometry import normals_from_points

SHOWN_WIDTH = 280  # pixels of a view; a multiple of 14
RENDERED_SIZE = (210, 280)


def contact_sheet(samples: Sequence[SceneSample]) -> Image.Image:
    """One picture, 1680 pixels wide: a block per sample with a column per view.

    Depth has one colour range per sample. Normals that the sample lacks are derived from its depth. What a sample does
    not know is left out.
    """
    return stack([panel for sample in samples for panel in _panels(sample)])


def load_samples(source: SceneSource, num_scenes: int = 3, num_views: int = 6) -> list[SceneSample]:
    """Samples to look at: the first scenes, their views evenly chosen where frames are stored.

    Raises:
        InputError: a view cannot be read, or the numbers are below one.
    """
    if num_scenes < 1 or num_views < 1:
        raise InputError("nothing to show", f"{num_scenes} scenes of {num_views} views", "ask for one at least")
    return [_sample(source, scene, num_views) for scene in range(min(num_scenes, len(source)))]


def _sample(source: SceneSource, scene: int, num_views: int) -> SceneSample:
    if not isinstance(source, FrameSource):
        request = ViewRequest(min(num_views, source.num_views(scene)), RENDERED_SIZE, seed=0)
        return source.load(scene, request)
    count = source.num_views(scene)
    indices = np.unique(np.linspace(0, count - 1, min(count, num_views)).round().astype(int)).tolist()
    height, width = source.read_frame(scene, indices[0]).image.shape[:2]
    return source.load_views(scene, indices, geometry_size((height, width), SHOWN_WIDTH))


def _panels(sample: SceneSample) -> list[Image.Image]:
    frames = frames_of(sample)
    depths = [frame.depth for frame in frames]
    known = np.concatenate([depth[depth > 0] for depth in depths if depth is not None] or [np.zeros(0)])
    depth_range = percentile_range(known)
    rows = {"image": [frame.image for frame in frames]}
    if sample.depth is not None:
        rows["depth"] = [_masked(depth_colours(d, depth_range), d > 0) for d in depths if d is not None]
    if (normals := _normals(sample)) is not None:
        rows["normals"] = [_masked(normal_colours(n), np.abs(n).sum(-1) > 0) for n in normals]
    if sample.instances is not None:
        rows["instances"] = [instance_colours(view) for view in sample.instances.cpu().numpy()]
    names = [printable(name, 24) for name in sample.view_ids] or [f"view {i}" for i in range(sample.num_views)]
    cells = grid(list(rows.values()), [[None] * sample.num_views] * len(rows), list(rows), names)
    units = "metres" if sample.is_metric else "relative"
    return [_title(sample, units), cells, *([legend(depth_range, units)] if "depth" in rows else [])]


def _normals(sample: SceneSample) -> np.ndarray | None:
    """(S, H, W, 3), zero where unknown."""
    if sample.normals is not None:
        normals = sample.normals
        return (normals if sample.valid is None else normals * sample.valid[..., None]).cpu().numpy()
    if sample.depth is None or sample.intrinsics is None:
        return None
    return normals_from_points(sample.local_points, sample.valid)[0].cpu().numpy()


def _masked(picture: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.where(valid[..., None], picture, NOTHING).astype(np.uint8)


def instance_colours(instances: np.ndarray) -> np.ndarray:
    """(H, W) numbers as colours (H, W, 3) uint8, the same number always in the same colour; -1 is grey."""
    number = np.maximum(instances, 0).astype(np.int64)
    hue = (number * 0.61803398875) % 1  # steps of the golden ratio keep neighbouring numbers apart
    phase = (hue[..., None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 2 * np.pi
    shade = 0.75 + 0.25 * (number // 7 % 2)[..., None]
    return _masked(np.round((0.5 + 0.42 * np.cos(phase)) * shade * 255), instances >= 0)


def _title(sample: SceneSample, units: str) -> Image.Image:
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, 34), PAGE)
    draw = ImageDraw.Draw(panel)
    name = printable(sample.scene or sample.dataset, 50)
    draw.text((0, 0), name, INK, font(28))
    height, width = sample.size
    facts = (
        f"{sample.dataset}   |   {width} x {height} pixels   |   units: {units}   |   licence: {sample.license_class}"
    )
    draw.text((draw.textlength(name, font(28)) + 24, 9), facts, MUTED, font(18))
    return panel
