"""A small z-buffer point renderer in numpy: pictures of coloured points and cameras without a display or OpenGL.

N points, S cameras, h, w pixels of the picture. World and camera frames as everywhere: cameras look along +z, +y down.
"""

from dataclasses import dataclass

import numpy as np

BACKGROUND = (36, 40, 48)
MAX_RADIUS = 6  # pixels; a larger splat hides more than it fills
SHADE_STRENGTH = 6.0
HIDDEN_OPACITY = 0.45  # of markers behind points


@dataclass(frozen=True, eq=False)
class Points:
    """Coloured points in the world.

    Args:
        xyz: (N, 3).
        rgb: (N, 3) uint8.
        radius: (N,) the disc each point covers, in world units.
    """

    xyz: np.ndarray
    rgb: np.ndarray
    radius: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "Points":
        return Points(self.xyz[index], self.rgb[index], self.radius[index])


@dataclass(frozen=True, eq=False)
class Viewpoint:
    """A virtual pinhole camera.

    Args:
        cam_to_world: (4, 4).
        focal: in pixels.
        middle: (2,) principal point, x and y in pixels.
        size: (h, w) of the picture.
    """

    cam_to_world: np.ndarray
    focal: float
    middle: np.ndarray
    size: tuple[int, int]

    @property
    def centre(self) -> np.ndarray:
        """Its position in the world (3,)."""
        return self.cam_to_world[:3, 3]

    def local(self, xyz: np.ndarray) -> np.ndarray:
        """World points (N, 3) in the frame of this camera."""
        return (xyz - self.centre) @ self.cam_to_world[:3, :3]

    def project(self, local: np.ndarray) -> np.ndarray:
        """Pixel coordinates (N, 2) of local points with z > 0."""
        return self.focal * local[:, :2] / local[:, 2:] + self.middle


def render(points: Points, markers: Points, view: Viewpoint) -> np.ndarray:
    """Picture (h, w, 3) uint8: the nearest point per pixel, darker where it lies behind its neighbours.

    The markers (cameras) are not shaded, and shine through what hides them.
    """
    picture, depth = splat(points, view)
    filled = np.isfinite(depth)
    picture[filled] = picture[filled] * depth_shading(depth)[filled, None]
    marker_rgb, marker_depth = splat(markers, view)
    marked = np.isfinite(marker_depth)
    opacity = np.where(marker_depth < depth, 1, HIDDEN_OPACITY)[marked, None]
    picture[marked] = picture[marked] * (1 - opacity) + marker_rgb[marked] * opacity
    return picture


def splat(points: Points, view: Viewpoint) -> tuple[np.ndarray, np.ndarray]:
    """Colours (h, w, 3) uint8 and depth (h, w), infinite where no point falls."""
    shape = (view.size[0] + 2 * MAX_RADIUS, view.size[1] + 2 * MAX_RADIUS)  # room for discs that cross the border
    local = view.local(points.xyz)
    front = np.flatnonzero(in_front(local))
    column, row = np.round(np.clip(view.project(local[front]), -1e6, 1e6)).astype(np.int64).T + MAX_RADIUS
    inside = _within(row, shape[0]) & _within(column, shape[1])
    front, pixel = front[inside], (row * shape[1] + column)[inside]

    order = np.argsort(-local[front, 2], kind="stable")  # far to near: of several writes to a pixel the last one stays
    front, pixel = front[order], pixel[order]
    z = local[front, 2]
    reach = np.clip(np.round(view.focal * points.radius[front] / z - 0.5), 0, MAX_RADIUS)
    owner = _owners(pixel, z, reach, shape)[MAX_RADIUS:-MAX_RADIUS, MAX_RADIUS:-MAX_RADIUS]
    rgb = np.concatenate([points.rgb[front], [BACKGROUND]]).astype(np.uint8)
    return rgb[owner], np.append(z, np.inf)[owner]


def _within(index: np.ndarray, length: int) -> np.ndarray:
    return (index >= MAX_RADIUS) & (index < length - MAX_RADIUS)


def _owners(pixel: np.ndarray, z: np.ndarray, reach: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Index of the nearest disc over each pixel of `shape`, -1 for none. The discs are sorted from far to near."""
    depth = np.append(z, np.inf)  # index -1 is infinitely far
    owner = np.full(shape[0] * shape[1], -1)
    for radius in range(MAX_RADIUS + 1):
        layer, offsets = np.full(len(owner), -1), _disc(radius, shape[1])
        members = np.flatnonzero(reach == radius)
        for chunk in np.array_split(members, len(members) * len(offsets) // 4_000_000 + 1):
            layer[pixel[chunk, None] + offsets] = chunk[:, None]
        nearer = depth[layer] < depth[owner]
        owner[nearer] = layer[nearer]
    return owner.reshape(shape)


def _disc(radius: int, stride: int) -> np.ndarray:
    """Offsets into a flattened picture of the pixels of a disc."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (y * stride + x)[y**2 + x**2 <= (radius + 0.3) ** 2]


def depth_shading(depth: np.ndarray, reach: int = 2) -> np.ndarray:
    """Eye-dome lighting: factor in (0, 1] per pixel, exp(-k * mean over 8 neighbours of max(0, log z - log z_n)).

    Boucheny 2009. It darkens the far side of every depth step, which makes plain point clouds readable.
    """
    filled = np.isfinite(depth)
    log_depth = np.log(np.where(filled, depth, 1)).astype(np.float32)
    log_depth[~filled] = np.float32(1e6)  # behind everything
    padded = np.pad(log_depth, reach, mode="edge")
    height, width = depth.shape
    total = np.zeros(depth.shape, dtype=np.float32)
    for dy in (0, reach, 2 * reach):
        for dx in (0, reach, 2 * reach):
            total += np.clip(log_depth - padded[dy : dy + height, dx : dx + width], 0, 0.1)
    return np.where(filled, np.exp(-SHADE_STRENGTH / 8 * total), 1)


# ---------------------------------------------------------------------------------------------- choosing a viewpoint


def upwards(cam_to_world: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Unit vector (3,) that points up in the world, guessed from upright cameras (S, 4, 4) and normals (N, 3).

    Photographs are taken level: up is the mean camera up, cleared of the cameras' right axes. Floors and tables, that
    is normals close to this guess, then refine it.
    """
    right, up = cam_to_world[:, :3, 0], -cam_to_world[:, :3, 1].mean(0)
    spread = right.T @ right / len(right)
    guess = unit(np.linalg.solve(spread + 0.03 * np.eye(3), up), cam_to_world[0, :3, 1] * -1)
    for degrees in (35, 20, 10):
        near = normals[normals @ guess > np.cos(np.radians(degrees))]
        if len(near) > 0.05 * len(normals):
            guess = unit(near.mean(0), guess)
    return guess


def unit(vector: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """`vector` scaled to length one, or `otherwise` when it is too short to have a direction."""
    length = np.linalg.norm(vector)
    return vector / length if length > 1e-3 else otherwise


def look_at(eye: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Camera-to-world (4, 4) at `eye`, +z towards `target`, +y as far down as possible."""
    forward = unit(target - eye, np.array([0.0, 0.0, 1.0]))
    fallback = unit(np.cross(forward, np.eye(3)[np.abs(forward).argmin()]), np.eye(3)[0])
    right = unit(np.cross(forward, up), fallback)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = eye
    return pose


def overview(
    points: np.ndarray,
    centres: np.ndarray,
    axes: tuple[np.ndarray, np.ndarray],
    angles: tuple[float, float],
    size: tuple[int, int],
) -> Viewpoint:
    """A viewpoint behind and above that sees nearly all points and all camera centres, as large as they fit.

    Args:
        points: (N, 3) points of interest; their median is looked at.
        centres: (S, 3) positions of the cameras that must be visible; there may be none.
        axes: unit vectors (3,) up and ahead, orthogonal.
        angles: degrees to the right of looking ahead, and above it.
        size: (h, w) of the picture.
    """
    target, (up, ahead) = np.median(points, axis=0), axes
    away = np.linalg.norm(np.concatenate([points, centres]) - target, axis=1)
    distance = 2.5 * max(np.percentile(away, 95), away[len(points) :].max(initial=0) / 2) or 1.0
    side, above = np.radians(angles)
    back = -np.cos(side) * ahead + np.sin(side) * np.cross(ahead, up)
    pose = look_at(target + distance * (np.cos(above) * back + np.sin(above) * up), target, up)
    return fitted(Viewpoint(pose, 1.0, np.zeros(2), size), points, centres)


def heading(cam_to_world: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Horizontal unit vector (3,) along the mean viewing direction; the first camera's when they look all around."""
    ahead = cam_to_world[:, :3, 2]
    level = ahead - (ahead @ up)[:, None] * up
    mean = level.mean(0)
    across = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    first = unit(level[0], across / np.linalg.norm(across))
    return unit(mean, first) if np.linalg.norm(mean) > 0.2 else first


def fitted(view: Viewpoint, points: np.ndarray, markers: np.ndarray) -> Viewpoint:
    """The same pose, with focal length and principal point such that its content fills the picture.

    The content is the 1 to 99 % box of the projected points, widened to hold every marker.
    """
    low, high = np.percentile(_seen(view, points), [1, 99], axis=0)
    marked = _seen(view, markers)
    low, high = np.vstack([marked, low]).min(0), np.vstack([marked, high]).max(0)
    size = np.array(view.size[::-1], dtype=np.float64)
    focal = 0.88 * float((size / np.maximum(high - low, 1e-3)).min())
    return Viewpoint(view.cam_to_world, focal, (size - 1) / 2 - focal * (low + high) / 2, view.size)


def in_front(local: np.ndarray) -> np.ndarray:
    """Which local points (N, 3) lie in front of the camera, not within rounding of its plane."""
    return local[:, 2] > 1e-9 * np.abs(local).max(initial=0)


def _seen(view: Viewpoint, xyz: np.ndarray) -> np.ndarray:
    """Projections of the points in front of the camera."""
    local = view.local(xyz)
    return view.project(local[in_front(local)])
