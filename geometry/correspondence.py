"""Correspondences between views, from depth and cameras: tracks, visibility, and the cells that points fall into.

Pixels follow the project's rule (the centre of pixel (0, 0) is at (0, 0)), and so do cells: cell (i, j) of an h x w
grid over an H x W image covers the pixels' area [j W/w, (j+1) W/w) x [i H/h, (i+1) H/h), measured from the image's
border, and its centre is at (j, i) in continuous cell coordinates.

Shape legend: ... any batch, T views of one scene, P points, H W pixels, h w cells.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geometry.cameras import pixel_rays, project
from geometry.rotations import at_least_float32
from geometry.transforms import apply_rigid, invert_rigid, length

Size = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class VisibilityRule:
    """When a view shows a point, given the view's depth map (VGGT's track generator, which has no `min_depth`).

    The rule cannot tell the two sides of a thing thinner than `relative` times its distance; `cycle_error` often can.

    Args:
        margin: pixels from the image's border that a point must keep: `margin <= floor(u) < W - margin`.
        relative: depths z of the point and D of a pixel agree if |z - D| < relative z and |z - D| < relative D.
        slack: added to both limits, in the unit of the depth (VGGT-Omega: 0.01).
        min_depth: a point must be further than this in front of the camera; -inf tests nothing.
    """

    margin: int = 4
    relative: float = 0.05
    slack: float = 0.0
    min_depth: float = 0.0


@dataclass(frozen=True)
class TrackRule:
    """Which points of a view are followed through a clip, and what counts as seeing them again (GASP).

    Args:
        grids: rows and columns of the regular grids of points. The points of an 8 x 8 grid are among those of a
            24 x 24 grid: with both, they count twice.
        visibility: when a view shows a point.
        max_cycle_error: pixels that a point may be off after the way there and back; inf checks nothing.
    """

    grids: tuple[tuple[int, int], ...] = ((8, 8), (24, 24))
    visibility: VisibilityRule = field(default_factory=VisibilityRule)
    max_cycle_error: float = 2.0


@dataclass(frozen=True, eq=False)
class Tracks:
    """The points of one view in all views of a scene.

    Args:
        points: (T, P, 2) pixel coordinates; without meaning where the point is behind the camera.
        depth: (T, P) z in the camera of each view.
        inside: (T, P) bool, within the image by the rule's margin and in front of the camera.
        visible: (T, P) bool, inside and not occluded.
    """

    points: Tensor
    depth: Tensor
    inside: Tensor
    visible: Tensor

    def useful(self, anchor: int) -> Tensor:
        """Tracks (P,) bool that are visible in the anchor view and in at least one other."""
        return self.visible[anchor] & (self.visible.sum(0) > 1)


def grid_pixels(image_size: Size, grid_size: Size, *, device: torch.device | None = None) -> Tensor:
    """The pixels that hold the centres of a regular grid's cells: (h * w, 2) int64 as (x, y), row by row."""
    (height, width), (rows, columns) = image_size, grid_size
    y = (2 * torch.arange(rows, device=device) + 1) * height // (2 * rows)
    x = (2 * torch.arange(columns, device=device) + 1) * width // (2 * columns)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)


def mask_pixels(mask: Tensor) -> Tensor:
    """The true pixels of a mask (H, W): (P, 2) int64 as (x, y), row by row."""
    return mask.nonzero().flip(-1)


def tracks_from_depth(
    depth: Tensor, K: Tensor, world_to_cam: Tensor, pixels: Tensor, rule: VisibilityRule, *, anchor: int = 0
) -> Tracks:
    """Where the pixels of one view are in every view, and which views show them.

    A pixel is lifted by its depth, moved into each view and projected. It is visible there if it is inside and its
    depth agrees with that of any of the four pixels around it, floor(u, v) + {0, 1}^2. A pixel without depth is inside
    and visible nowhere.

    Args:
        depth: (T, H, W) z-depth; zero, negative or not finite where unknown.
        K: intrinsics (T, 3, 3).
        world_to_cam: (T, 4, 4) or (T, 3, 4).
        pixels: (P, 2) integers (x, y) in the anchor view.
        rule: what counts as visible.
        anchor: the view that the pixels are of.
    """
    height, width = depth.shape[-2:]
    x, y = pixels.unbind(-1)
    lifted = depth[anchor, y, x]  # (P,)
    known = lifted.isfinite() & (lifted > 0)
    local = torch.where(known, lifted, 1)[:, None] * pixel_rays(pixels.to(depth.dtype), K[anchor])  # (P, 3)
    world = apply_rigid(invert_rigid(world_to_cam[anchor]), local)
    points, z = project(apply_rigid(world_to_cam, world.expand(len(depth), -1, -1)), K)  # (T, P, 2), (T, P)

    column, row = points.floor().unbind(-1)  # (T, P)
    inside = (column >= rule.margin) & (column < width - rule.margin)
    inside &= (row >= rule.margin) & (row < height - rule.margin)
    inside &= known & (z > rule.min_depth)

    around = _depth_around(depth, points)  # (T, P, 4)
    limit = rule.relative * torch.minimum(z[..., None], around) + rule.slack
    agrees = (around > 0) & ((z[..., None] - around).abs() < limit)
    return Tracks(points, z, inside, inside & agrees.any(-1))


def cycle_error(tracks: Tracks, depth: Tensor, K: Tensor, world_to_cam: Tensor, *, anchor: int = 0) -> Tensor:
    """Distance in the anchor view between each point and its way there and back.

    The way back starts at the point's place in another view, with that view's own depth: of the four pixels around it,
    the one nearest to the point's. Where depth and cameras do not agree, the two places differ.

    Args:
        tracks: of `tracks_from_depth`.
        depth, K, world_to_cam, anchor: as given to it.

    Returns:
        (T, P) in pixels; infinite where no pixel around has depth, or the way back ends behind the anchor.
    """
    around = _depth_around(depth, tracks.points)  # (T, P, 4)
    usable = around.isfinite() & (around > 0)
    miss = torch.where(usable, (around - tracks.depth[..., None]).abs(), torch.inf)
    found = around.gather(-1, miss.argmin(-1, keepdim=True))  # (T, P, 1)
    known = usable.any(-1)
    local = torch.where(known[..., None], found, 1) * pixel_rays(tracks.points, K)  # (T, P, 3)
    world = apply_rigid(invert_rigid(world_to_cam), local)
    back, z = project(apply_rigid(world_to_cam[anchor], world), K[anchor])
    return torch.where(known & (z > 0), length(back - tracks.points[anchor]), torch.inf)


def keep_consistent(tracks: Tracks, error: Tensor, max_error: float = 2.0) -> Tracks:
    """The tracks with what comes back further than `max_error` pixels, by `cycle_error` (T, P), not visible."""
    return replace(tracks, visible=tracks.visible & (error <= max_error))


def grid_tracks(depth: Tensor, K: Tensor, world_to_cam: Tensor, rule: TrackRule, *, anchor: int = 0) -> Tracks:
    """The tracks of a rule's points, grid after grid; arguments as of `tracks_from_depth`."""
    image_size = (depth.shape[1], depth.shape[2])
    pixels = torch.cat([grid_pixels(image_size, grid, device=depth.device) for grid in rule.grids])
    tracks = tracks_from_depth(depth, K, world_to_cam, pixels, rule.visibility, anchor=anchor)
    error = cycle_error(tracks, depth, K, world_to_cam, anchor=anchor)
    return keep_consistent(tracks, error, rule.max_cycle_error)


def cell_coordinates(points: Tensor, image_size: Size, grid_size: Size) -> Tensor:
    """Continuous cell coordinates of pixel coordinates (..., 2), the centre of cell (i, j) at (j, i).

    `x_cell = (x + 1/2) w / W - 1/2`, the same for y. The image may be any resampling of the one that the grid was made
    from, as long as both show the same field of view.
    """
    points = at_least_float32(points)  # also whole pixels
    (height, width), (rows, columns) = image_size, grid_size
    scale = torch.tensor([columns / width, rows / height], dtype=points.dtype, device=points.device)
    return (points + 0.5) * scale - 0.5


def cell_index(points: Tensor, image_size: Size, grid_size: Size) -> Tensor:
    """Index (...) `i w + j` of the cell that holds each of the pixel coordinates (..., 2); the nearest one if none."""
    rows, columns = grid_size
    column, row = torch.floor(cell_coordinates(points, image_size, grid_size) + 0.5).unbind(-1)
    return row.clamp(0, rows - 1).long() * columns + column.clamp(0, columns - 1).long()


def cell_depth(depth: Tensor, valid: Tensor, grid_size: Size) -> tuple[Tensor, Tensor]:
    """Mean depth of the pixels in each cell, those without depth left out (GASP).

    A pixel belongs to the cell that holds its centre.

    Args:
        depth: (T, H, W), anything where not valid.
        valid: (T, H, W) bool.
        grid_size: (h, w).

    Returns:
        Means (T, h * w), row by row, 0 in a cell without a valid pixel; and which cells have one, (T, h * w) bool.
    """
    rows, columns = (
        _members(pixels, cells, depth) for pixels, cells in zip(depth.shape[1:], grid_size, strict=True)
    )  # (h, H), (w, W)
    with torch.autocast(depth.device.type, enabled=False):
        total, count = (rows @ values @ columns.T for values in (torch.where(valid, depth, 0), valid.to(depth.dtype)))
    return (total / count.clamp_min(1)).flatten(1), (count > 0).flatten(1)


def _members(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Which of a line's pixels each of its cells has: (cells, pixels), 1 or 0."""
    owner = (2 * torch.arange(pixels, device=like.device) + 1) * cells // (2 * pixels)
    return (owner == torch.arange(cells, device=like.device)[:, None]).to(like.dtype)


def _depth_around(depth: Tensor, points: Tensor) -> Tensor:
    """Depths (T, P, 4) of the pixels floor(u, v) + {0, 1}^2 around points (T, P, 2).

    They are zero outside the image, and where a point is not finite.
    """
    height, width = depth.shape[-2:]
    corner = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=points.dtype, device=points.device)
    x, y = (points.floor()[..., None, :] + corner).unbind(-1)  # (T, P, 4)
    exists = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column, row = (own.nan_to_num(0).clamp(0, last - 1).long() for own, last in ((x, width), (y, height)))
    index = row * width + column
    found = depth.flatten(1).gather(1, index.flatten(1)).view_as(x)
    return torch.where(exists, found, 0)
