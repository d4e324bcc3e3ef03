"""One picture that shows a reconstruction: inputs, depth, normals, and the coloured points with the cameras.

numpy and PIL only, no display. S views, H, W pixels of a view at model size, N points.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from g2vlm import splat

if TYPE_CHECKING:
    from g2vlm.scene import Scene

MAX_SHOWN = 8
MAX_POINTS = 800_000
WIDTH, MARGIN, GAP = 1680, 24, 8
LABEL_WIDTH, BAR_WIDTH = 34, 720
PAGE, INK, MUTED, NOTHING, CAPTION = (255, 255, 255), (28, 32, 40), (112, 118, 130), (214, 217, 222), (200, 205, 214)
# Near (light, warm) to far (dark, cool); the lightness falls evenly, so equal steps in depth look equal.
DEPTH_COLOURS = np.array([
    (253, 239, 178), (254, 206, 122), (250, 170, 92), (238, 134, 86), (217, 101, 93),
    (186, 75, 107), (149, 56, 117), (110, 44, 118), (71, 36, 105), (36, 26, 74), (14, 12, 36),
])  # fmt: skip


def preview(scene: "Scene") -> Image.Image:
    """The picture for `scene`, 1680 pixels wide.

    At most 8 views are shown, evenly chosen and named in the title. Depth shares one colour range over all views, from
    the 2nd to the 98th percentile of the valid pixels. Normals are in the camera frame: red right, green up, blue
    towards the camera. The frames of the inputs have the colours of their cameras in the rendered pictures.
    """
    shown = np.unique(np.linspace(0, scene.num_views - 1, min(scene.num_views, MAX_SHOWN)).round().astype(int))
    depth_range = percentile_range(scene.depth[scene.valid])
    panels = [title(scene, shown), view_grid(scene, shown, depth_range), legend(depth_range, scene.units)]
    panels.append(overviews(scene))
    return stack(panels)


# ---------------------------------------------------------------------------------------------- colours


def percentile_range(values: np.ndarray) -> tuple[float, float]:
    """2nd and 98th percentile, widened when they coincide; (0, 1) without values."""
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values.astype(np.float64), [2, 98])
    margin = 0.0 if high - low > 1e-6 * abs(high) else 0.01 * abs(high) + 1e-12
    return low - margin, high + margin


def depth_colours(depth: np.ndarray, depth_range: tuple[float, float]) -> np.ndarray:
    """Depth (...) as colours (..., 3) uint8 from `DEPTH_COLOURS`; outside the range the end colours."""
    low, high = depth_range
    position = np.clip((depth.astype(np.float64) - low) / (high - low), 0, 1) * (len(DEPTH_COLOURS) - 1)
    below = np.minimum(position.astype(int), len(DEPTH_COLOURS) - 2)
    share = (position - below)[..., None]
    return np.round(DEPTH_COLOURS[below] * (1 - share) + DEPTH_COLOURS[below + 1] * share).astype(np.uint8)


def normal_colours(normals: np.ndarray) -> np.ndarray:
    """Unit normals (..., 3) in the camera frame as colours: red right, green up, blue towards the camera."""
    return np.round((normals * (1, -1, -1) + 1) * 127.5).clip(0, 255).astype(np.uint8)


def camera_colours(num_views: int) -> np.ndarray:
    """(S, 3) uint8: a cycle-free ramp from blue over green and yellow to red, in the order of the views."""
    stops = np.array([(64, 156, 255), (38, 200, 170), (150, 214, 60), (255, 204, 50), (255, 134, 60), (250, 78, 110)])
    position = np.linspace(0, len(stops) - 1, num_views) if num_views > 1 else np.zeros(1)
    return np.stack([np.interp(position, range(len(stops)), stops[:, i]) for i in range(3)], axis=1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- page


def stack(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels below each other on one page."""
    page = Image.new("RGB", (WIDTH, sum(panel.height + MARGIN for panel in panels) + MARGIN), PAGE)
    top = MARGIN
    for panel in panels:
        page.paste(panel, (MARGIN, top))
        top += panel.height + MARGIN
    return page


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """PIL's own font, so that no font file is needed."""
    return ImageFont.load_default(size)


def title(scene: "Scene", shown: np.ndarray) -> Image.Image:
    """One line: number of views, which are shown, size, model, units."""
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, 34), PAGE)
    draw = ImageDraw.Draw(panel)
    views = "1 view" if scene.num_views == 1 else f"{scene.num_views} views"
    draw.text((0, 0), views, INK, font(28))
    which = f"shown: {', '.join(map(str, shown))}" if len(shown) < scene.num_views else ""
    height, width = scene.resized_to
    facts = [which, f"{width} x {height} pixels", f"model: {printable(scene.model, 60)}", f"units: {scene.units}"]
    text = "   |   ".join(fact for fact in facts if fact)
    draw.text((draw.textlength(views, font(28)) + 24, 9), text, MUTED, font(18))
    return panel


def printable(text: str, limit: int) -> str:
    """At most `limit` characters of one line, the others replaced by dots."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def view_grid(scene: "Scene", shown: np.ndarray, depth_range: tuple[float, float]) -> Image.Image:
    """Input, depth and normals of the shown views: a column per view, or a row per view when there are one or two."""
    ramp = camera_colours(scene.num_views)
    cells = [view_cells(scene, int(view), depth_range) for view in shown]
    views, kinds = [f"view {view}" for view in shown], ["input", "depth", "normals"]
    frames = [[tuple(ramp[view].tolist()), None, None] for view in shown]
    if len(shown) <= 2:
        return grid(cells, frames, views, kinds)
    return grid(transpose(cells), transpose(frames), kinds, views)


def transpose(rows: list[list]) -> list[list]:
    """Rows become columns."""
    return [list(column) for column in zip(*rows, strict=True)]


def view_cells(scene: "Scene", view: int, depth_range: tuple[float, float]) -> list[np.ndarray]:
    """Three pictures (H, W, 3) uint8 of one view; invalid pixels of depth and normals are grey."""
    valid = scene.valid[view][..., None]
    depth = np.where(valid, depth_colours(scene.depth[view], depth_range), NOTHING).astype(np.uint8)
    normals = scene.normals[view]
    defined = valid & (np.abs(normals).sum(-1, keepdims=True) > 0)
    return [scene.images[view], depth, np.where(defined, normal_colours(normals), NOTHING).astype(np.uint8)]


def grid(cells: list[list[np.ndarray]], frames: list[list], rows: list[str], columns: list[str]) -> Image.Image:
    """Pictures in rows and columns, with names; a cell with a frame colour gets a border."""
    height, width = cells[0][0].shape[:2]
    room = (WIDTH - 2 * MARGIN - LABEL_WIDTH - GAP * (len(columns) - 1)) / len(columns)
    scale = min(room / width, 420 / height)
    cell_width, cell_height = max(1, int(width * scale)), max(1, int(height * scale))
    start = LABEL_WIDTH + int(room - cell_width) * len(columns) // 2  # centred when the height is the limit
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, 24 + len(rows) * (cell_height + GAP) - GAP), PAGE)
    draw = ImageDraw.Draw(panel)
    for j, name in enumerate(columns):
        left = start + j * (cell_width + GAP)
        draw.text((left + cell_width / 2, 0), name, MUTED, font(16), anchor="ma")
    for i, name in enumerate(rows):
        top = 24 + i * (cell_height + GAP)
        panel.paste(sideways(name, cell_height), (start - LABEL_WIDTH, top))
        for j, cell in enumerate(cells[i]):
            left = start + j * (cell_width + GAP)
            panel.paste(Image.fromarray(cell).resize((cell_width, cell_height), Image.Resampling.BOX), (left, top))
            if colour := frames[i][j]:
                draw.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), outline=colour, width=4)
    return panel


def sideways(text: str, length: int) -> Image.Image:
    """Text that reads upwards, centred along `length`."""
    label = Image.new("RGB", (length, 24), PAGE)
    ImageDraw.Draw(label).text((length / 2, 12), text, MUTED, font(16), anchor="mm")
    return label.rotate(90, expand=True)


def legend(depth_range: tuple[float, float], units: str) -> Image.Image:
    """Colour bar of the depth with numbers, and what the colours of the normals mean."""
    panel = depth_legend(depth_range, units)
    draw, left = ImageDraw.Draw(panel), LABEL_WIDTH + 150 + BAR_WIDTH + 110
    draw.text((left, 2), "normals", INK, font(16))
    for name, normal in (("right", (1, 0, 0)), ("up", (0, -1, 0)), ("to camera", (0, 0, -1))):
        left += 100
        draw.rectangle((left, 3, left + 18, 21), fill=tuple(normal_colours(np.array(normal)).tolist()))
        draw.text((left + 25, 3), name, MUTED, font(15))
    return panel


def depth_legend(depth_range: tuple[float, float], units: str) -> Image.Image:
    """Colour bar of the depth with numbers."""
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, 46), PAGE)
    draw = ImageDraw.Draw(panel)
    draw.text((LABEL_WIDTH, 2), f"depth ({units})", INK, font(16))
    left = LABEL_WIDTH + 150
    ramp = np.broadcast_to(np.linspace(*depth_range, BAR_WIDTH), (20, BAR_WIDTH))
    panel.paste(Image.fromarray(depth_colours(ramp, depth_range)), (left, 2))
    for share in np.linspace(0, 1, 5):
        x = left + share * (BAR_WIDTH - 1)
        draw.line((x, 22, x, 26), INK)
        value = depth_range[0] + share * (depth_range[1] - depth_range[0])
        draw.text((x, 28), f"{value:.3g}", INK, font(15), anchor="ma")
    return panel


# ---------------------------------------------------------------------------------------------- rendered points


def overviews(scene: "Scene") -> Image.Image:
    """The coloured points and the cameras from behind and above, and from further above."""
    width = (WIDTH - 2 * MARGIN - GAP) // 2
    size = (round(width * 0.68), width)
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, size[0]), PAGE)
    points, normals = scene_points(scene)
    for i, (angles, name) in enumerate((((-28, 32), "from behind and above"), ((8, 68), "from above"))):
        picture = overview_picture(scene, points, normals, angles, size) if len(normals) else no_points(size)
        caption(picture, name)
        panel.paste(picture, (i * (width + GAP), 0))
    return panel


def overview_picture(
    scene: "Scene", points: splat.Points, normals: np.ndarray, angles: tuple[float, float], size: tuple[int, int]
) -> Image.Image:
    """One rendered picture (h, w) from `angles` (right, up); drawn at twice the size and reduced, which smooths it."""
    poses = scene.cam_to_world.astype(np.float64)
    keep, extent = inliers(points.xyz)
    points, normals = points[keep], normals[keep]
    up = splat.upwards(poses, normals)
    axes = up, splat.heading(poses, up)
    near = np.linalg.norm(poses[:, :3, 3] - np.median(points.xyz, axis=0), axis=1) < 3 * extent
    view = splat.overview(points.xyz[::20], poses[near, :3, 3], axes, angles, (2 * size[0], 2 * size[1]))
    visible = seen_from(view.centre, points.xyz, normals)
    distance = float(np.linalg.norm(view.centre - np.median(points.xyz, axis=0)))
    pixel = distance / view.focal  # its width in the middle of the scene
    cameras = camera_points(scene, 50 * pixel, 2.2 * pixel)
    rendered = splat.render(points[visible], cameras, view)
    return Image.fromarray(rendered).resize((size[1], size[0]), Image.Resampling.BOX)


def seen_from(eye: np.ndarray, xyz: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """(N,) bool: points whose surface faces `eye`. Hiding walls seen from behind opens a room to the view."""
    rays = eye - xyz
    return (rays * normals).sum(1) >= -0.2 * np.linalg.norm(rays, axis=1)  # normals of real depth are noisy


def caption(picture: Image.Image, text: str) -> None:
    """Write text into the upper left corner, on a plain ground."""
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 20 + draw.textlength(text, font(16)), 30), fill=splat.BACKGROUND)
    draw.text((10, 7), text, CAPTION, font(16))


def no_points(size: tuple[int, int]) -> Image.Image:
    """What is shown instead of an empty cloud."""
    picture = Image.new("RGB", (size[1], size[0]), splat.BACKGROUND)
    middle = (size[1] / 2, size[0] / 2)
    ImageDraw.Draw(picture).text(middle, "no valid points", CAPTION, font(20), anchor="mm")
    return picture


def scene_points(scene: "Scene") -> tuple[splat.Points, np.ndarray]:
    """About `MAX_POINTS` valid points at most, evenly over the pixels, and world normals (N, 3) to their cameras.

    A point covers what its pixel spans on the surface: more when far, seen at a grazing angle, or thinned out.
    """
    step = max(1, int(np.ceil(np.sqrt(scene.valid.sum() / MAX_POINTS))))
    pick = (slice(None), slice(step // 2, None, step), slice(step // 2, None, step))
    view, row, column = np.nonzero(scene.valid[pick])
    local = scene.local_points[pick][view, row, column].astype(np.float64)
    poses = scene.cam_to_world.astype(np.float64)[view]
    normals = scene.normals[pick][view, row, column].astype(np.float64)
    facing = (normals * local).sum(1) / np.maximum(np.linalg.norm(local, axis=1), 1e-12)  # cosine, < 0 to the camera
    normals *= np.where(facing > 0, -1, 1)[:, None]
    focal = scene.intrinsics_at(scene.resized_to)[:, 0, 0].astype(np.float64)
    radius = 0.6 * step * np.abs(local[:, 2]) / np.maximum(np.abs(focal[view]), 1e-6)
    radius /= np.where(facing == 0, 1, np.clip(np.abs(facing), 0.15, 1))
    xyz = (poses[:, :3, :3] @ local[..., None])[..., 0] + poses[:, :3, 3]
    world_normals = (poses[:, :3, :3] @ normals[..., None])[..., 0]
    return splat.Points(xyz, scene.images[pick][view, row, column], radius), world_normals


def inliers(xyz: np.ndarray) -> tuple[np.ndarray, float]:
    """Which points to show, and the extent of the scene: the distance from the median that 80 % of the points keep."""
    distance = np.linalg.norm(xyz - np.median(xyz, axis=0), axis=1)
    extent = float(np.percentile(distance, 80))
    if extent == 0:
        extent = float(np.abs(xyz).max()) or 1.0
    return distance <= 2 * extent, extent


def camera_points(scene: "Scene", size: float, thickness: float) -> splat.Points:
    """The cameras as pyramids of points, `size` long, in the colours of `camera_colours`."""
    height, width = scene.resized_to
    K = scene.intrinsics_at(scene.resized_to).astype(np.float64)
    corners = np.array(
        [(-0.5, -0.5, 1), (width - 0.5, -0.5, 1), (width - 0.5, height - 0.5, 1), (-0.5, height - 0.5, 1)]
    )
    share = np.linspace(0, 1, 160)[:, None]
    lines = []
    for pose, intrinsics in zip(scene.cam_to_world.astype(np.float64), K, strict=True):
        rays = corners @ np.linalg.pinv(intrinsics).T
        rays /= max(1.0, np.linalg.norm(rays, axis=1).max() / 1.5)  # a senseless focal length stays drawable
        tip, base = pose[:3, 3], pose[:3, 3] + size * rays @ pose[:3, :3].T
        roof = (base[0] + base[1]) / 2 + (base[0] - base[3]) * 0.25  # marks the upper side of the image
        ends = [(tip, corner) for corner in base] + [(base[i], base[i - 1]) for i in range(4)]
        ends += [(base[0], roof), (roof, base[1])]
        lines.append(np.concatenate([a + share * (b - a) for a, b in ends]))
    xyz = np.concatenate(lines)
    rgb = np.repeat(camera_colours(len(lines)), len(lines[0]), axis=0)
    return splat.Points(xyz, rgb, np.full(len(xyz), thickness))
