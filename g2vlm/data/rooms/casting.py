"""Which primitive each pixel sees and how far it is: exact intersections, only +, -, *, / and square roots.

Nothing here adds up in an order that a library chooses, so that all machines, batches and thread counts give equal
bits.

Pixels are grouped in tiles of 7 x 7. Every primitive is tested against the tiles that its box can reach in the image;
in the primitive's own frame, scaled so that it is the unit box, cylinder or sphere, a ray `o + t d` has
`d = M (x, y, 1)` with (x, y, 1) the pixel in the camera frame, so that t is the z-depth itself.

Shapes: V views, P primitives, K pairs of a primitive and a tile, T = V th tw tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from g2vlm.data.rooms.packing import PackedScene

TILE = 7
NEAR = 0.02  # metres; nothing nearer is drawn
CHUNK = {"cpu": 1024}  # pairs at a time: what stays in a core's cache
GPU_CHUNK = 1 << 19
Entry = Callable[[Tensor, list[Tensor]], Tensor]
NEVER_ZERO = 1e-20  # added to directions, so that a ray along a face divides by something


@dataclass(frozen=True, eq=False)
class Hits:
    """What the pixels see, tile by tile.

    Args:
        depth: (V, th, tw, 7, 7) z-depth in metres.
        winner: (V, th, tw, 7, 7) int64 index of the primitive.
    """

    depth: Tensor
    winner: Tensor


@dataclass(frozen=True, eq=False)
class Rig:
    """Cameras and their pixels.

    Args:
        rotation: (V, 3, 3) camera to world.
        centre: (V, 3).
        slope_x: (V, tw, 7) x of every pixel column at z = 1 in the camera frame.
        slope_y: (V, th, 7) y of every pixel row at z = 1.
        focal: (V, 2).
        principal: (V, 2).
    """

    rotation: Tensor
    centre: Tensor
    slope_x: Tensor
    slope_y: Tensor
    focal: Tensor
    principal: Tensor

    @property
    def tiles(self) -> tuple[int, int]:
        """(th, tw)."""
        return self.slope_y.shape[1], self.slope_x.shape[1]

    @property
    def rays(self) -> list[Tensor]:
        """x, y and z in the world of every ray, scaled to z = 1 in its camera: three (V, th, tw, 7, 7)."""
        r = self.rotation[:, :, :, None, None]  # (V, 3, 3, 1, 1)
        across = [r[:, k, 0] * self.slope_x for k in range(3)]  # (V, tw, 7)
        down = [r[:, k, 1] * self.slope_y + r[:, k, 2] for k in range(3)]  # (V, th, 7)
        return [a[:, None, :, None, :] + d[:, :, None, :, None] for a, d in zip(across, down, strict=True)]


def make_rig(cam_to_world: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Rig:
    """The rig of cameras (V, 4, 4) with intrinsics (V, 3, 3) without skew for images (H, W)."""
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], -1)
    principal = intrinsics[:, :2, 2]
    v, u = (torch.arange(extent, dtype=focal.dtype, device=focal.device) for extent in size)
    return Rig(
        rotation=cam_to_world[:, :3, :3],
        centre=cam_to_world[:, :3, 3],
        slope_x=((u - principal[:, :1]) / focal[:, :1]).unflatten(1, (-1, TILE)),
        slope_y=((v - principal[:, 1:]) / focal[:, 1:]).unflatten(1, (-1, TILE)),
        focal=focal,
        principal=principal,
    )


def cast(scene: PackedScene, rig: Rig, rays: list[Tensor]) -> Hits:
    """The nearest hit of every pixel; inside a closed room there always is one."""
    keys = _room_keys(scene, rig, rays).view(-1, TILE * TILE)  # (T, 49)
    for test, (first, last) in zip((enter_box, enter_cylinder, enter_sphere), scene.spans, strict=True):
        if first < last:
            _cast_shape(scene, rig, test, first, last, keys)
    keys = keys.view(*rays[0].shape)
    return Hits((keys >> 32).to(torch.int32).view(torch.float32), keys & 0xFFFFFFFF)


def _keys(depth: Tensor, winner: Tensor) -> Tensor:
    """Depth's bits above the primitive's index: positive floats are ordered as their bits are."""
    return (depth.view(torch.int32).to(torch.int64) << 32) + winner


def _room_keys(scene: PackedScene, rig: Rig, rays: list[Tensor]) -> Tensor:
    """Keys (V, th, tw, 7, 7) of where rays leave the room's box."""
    floor, ceiling = scene.rows[:, 4], scene.rows[:, 5]
    half = (floor[3], floor[4], ceiling[2] / 2)
    best, face = None, None
    for axis in range(3):
        origin = rig.centre[:, axis] - (half[2] if axis == 2 else 0.0)
        inverse = 1 / (rays[axis] + NEVER_ZERO)
        leaves = half[axis] * inverse.abs() - origin[:, None, None, None, None] * inverse
        side = (rays[axis] > 0).to(torch.int64) + 2 * axis
        if best is None or face is None:
            best, face = leaves, side
        else:
            face = torch.where(leaves < best, side, face)
            best = torch.minimum(best, leaves)
    assert best is not None
    assert face is not None
    return _keys(best, face)


# Primitives.


def _cast_shape(scene: PackedScene, rig: Rig, test: Entry, first: int, last: int, keys: Tensor) -> None:
    """Lower the keys (T, 49) wherever a primitive of one shape is nearer."""
    origin, matrix = _unit_frames(scene.rows[:, first:last], rig)  # (V, P, 3), (V, P, 3, 3)
    pair, tile_y, tile_x = _reached_tiles(scene.rows[:, first:last], rig)  # (K,) each
    rows, columns = rig.tiles
    view = pair // (last - first)
    frames = torch.cat([origin, matrix.flatten(-2)], -1).flatten(0, 1)  # (V P, 12)
    chunk = CHUNK.get(keys.device.type, GPU_CHUNK)
    for start in range(0, pair.shape[0], chunk):
        part = slice(start, start + chunk)
        o, m = frames[pair[part]].T.contiguous().tensor_split([3])  # (3, K), (9, K)
        xs = rig.slope_x.flatten(0, 1)[view[part] * columns + tile_x[part]]  # (K, 7)
        ys = rig.slope_y.flatten(0, 1)[view[part] * rows + tile_y[part]]
        d = [_outer(m[3 * k : 3 * k + 3, :, None], xs, ys) for k in range(3)]
        depth = test(o[:, :, None], d)  # (K, 49)
        winner = pair[part] % (last - first) + first
        tile = (view[part] * rows + tile_y[part]) * columns + tile_x[part]
        keys.scatter_reduce_(0, tile[:, None].expand_as(depth), _keys(depth, winner[:, None]), "amin")


def _outer(m: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """m0 x + m1 y + m2 for all pixels of tiles: (3, K, 1), (K, 7), (K, 7) -> (K, 49)."""
    return ((m[0] * xs)[:, None, :] + (m[1] * ys + m[2])[:, :, None]).flatten(1) + NEVER_ZERO


def _unit_frames(rows: Tensor, rig: Rig) -> tuple[Tensor, Tensor]:
    """Camera centres (V, P, 3) and camera axes (V, P, 3, 3) in frames where each primitive is the unit one."""
    half, cos, sin = rows[3:6], rows[6], rows[7]
    dx, dy, dz = (rig.centre[:, k, None] - rows[k] for k in range(3))  # (V, P)
    origin = torch.stack([(cos * dx + sin * dy) / half[0], (cos * dy - sin * dx) / half[1], dz / half[2]], -1)
    x, y, z = (rig.rotation[:, None, k] for k in range(3))  # (V, 1, 3)
    cos, sin = cos[:, None], sin[:, None]
    rotated = [cos * x + sin * y, cos * y - sin * x, z.expand(-1, rows.shape[1], -1)]
    return origin, torch.stack([r / h[:, None] for r, h in zip(rotated, half, strict=True)], -2)


def _reached_tiles(rows: Tensor, rig: Rig) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs view * P + primitive (K,), tile rows (K,) and tile columns (K,) of all tiles that a primitive may touch."""
    (left, right), (top, bottom) = _tile_ranges(rows, rig)  # (V P,) each; empty where right < left
    wide, tall = (right - left + 1).clamp_min(0), (bottom - top + 1).clamp_min(0)
    count = wide * tall
    pair = torch.repeat_interleave(torch.arange(count.shape[0], device=count.device), count)
    within = torch.arange(pair.shape[0], device=count.device) - (count.cumsum(0) - count)[pair]
    width = wide[pair]
    down = torch.div(within, width, rounding_mode="floor")
    return pair, top[pair] + down, left[pair] + within - down * width


def _tile_ranges(rows: Tensor, rig: Rig) -> list[tuple[Tensor, Tensor]]:
    """First and last tile column, then row, (V P,) each, around the projected corners of every primitive's box."""
    x, y, z = _corners_in_camera(rows, rig)  # (V, P, 8)
    ahead = (z > NEAR).any(-1)
    straddles = ahead & (z <= NEAR).any(-1)
    clamped = z.clamp_min(NEAR)
    # What a box cut by the near plane shows reaches at most as far as its corners would from that plane.
    nearest = torch.where(straddles[..., None], NEAR, clamped)
    ranges = []
    for axis, (side, tiles) in enumerate(zip((x, y), rig.tiles[::-1], strict=True)):
        low = torch.minimum(side / clamped, side / nearest).amin(-1)
        high = torch.maximum(side / clamped, side / nearest).amax(-1)
        ends = [rig.focal[:, axis, None] * end + rig.principal[:, axis, None] for end in (low, high)]  # pixels
        first = torch.floor((ends[0] - 0.01) / TILE).clamp(0, tiles).to(torch.int64)
        last = torch.floor((ends[1] + 0.01) / TILE).clamp(-1, tiles - 1).to(torch.int64)
        ranges.append((first.flatten(), torch.where(ahead, last, -1).flatten()))
    return ranges


def _corners_in_camera(rows: Tensor, rig: Rig) -> list[Tensor]:
    """x, y and z in each camera of the corners of every primitive's box, three (V, P, 8)."""
    sign = torch.tensor([-1.0, 1.0], device=rows.device)
    sx, sy, sz = (s.flatten() for s in torch.meshgrid(sign, sign, sign, indexing="ij"))  # (8,)
    bx, by, bz = rows[3, :, None] * sx, rows[4, :, None] * sy, rows[5, :, None] * sz  # (P, 8)
    cos, sin = rows[6, :, None], rows[7, :, None]
    world = (rows[0, :, None] + cos * bx - sin * by, rows[1, :, None] + sin * bx + cos * by, rows[2, :, None] + bz)
    dx, dy, dz = (w - rig.centre[:, k, None, None] for k, w in enumerate(world))  # (V, P, 8)
    r = rig.rotation[:, :, :, None, None]
    return [r[:, 0, k] * dx + r[:, 1, k] * dy + r[:, 2, k] * dz for k in range(3)]


# Where a ray o + t d enters a unit primitive from outside; infinity when it misses or starts beyond.


def enter_box(o: Tensor, d: list[Tensor]) -> Tensor:
    """Of the box [-1, 1]^3: the last entry into a slab, if it comes before the first exit."""
    near, far = _slab(o[0], d[0])
    for axis in (1, 2):
        enters, leaves = _slab(o[axis], d[axis])
        near, far = torch.maximum(near, enters), torch.minimum(far, leaves)
    return _entry(near, far)


def enter_cylinder(o: Tensor, d: list[Tensor]) -> Tensor:
    """Of the upright cylinder of radius 1 within |z| <= 1.

    With a = dx^2 + dy^2 and c = ox dy - oy dx, the ray passes the axis at distance |c| / sqrt(a); that form of the
    discriminant, a - c^2, keeps its digits far away where b^2 - ac loses them.
    """
    a = d[0] * d[0] + d[1] * d[1]
    cross = o[0] * d[1] - o[1] * d[0]
    half = (a - cross * cross).clamp_min(0).sqrt()
    middle = -(o[0] * d[0] + o[1] * d[1])
    inverse = 1 / a
    near, far = (middle - half) * inverse, (middle + half) * inverse
    enters, leaves = _slab(o[2], d[2])
    return _entry(torch.maximum(near, enters), torch.minimum(far, leaves))


def enter_sphere(o: Tensor, d: list[Tensor]) -> Tensor:
    """Of the unit sphere; the discriminant is |d|^2 - |o x d|^2, as for the cylinder."""
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    cx, cy, cz = o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0]
    half = (a - (cx * cx + cy * cy + cz * cz)).clamp_min(0).sqrt()
    near = (-(o[0] * d[0] + o[1] * d[1] + o[2] * d[2]) - half) / a
    return torch.where((half > 0) & (near > NEAR), near, torch.inf)


def _slab(o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves -1 <= x <= 1."""
    inverse = 1 / d
    middle, half = -o * inverse, inverse.abs()
    return middle - half, middle + half


def _entry(near: Tensor, far: Tensor) -> Tensor:
    return torch.where((near < far) & (near > NEAR), near, torch.inf)
