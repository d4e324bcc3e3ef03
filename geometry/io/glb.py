"""GLB scenes for viewers: a coloured point cloud and camera frusta as separate named nodes.

Node tree: `opencv_to_gltf` (turns +y down, +z forward into glTF's +y up, -z forward) -> `points`, and `cameras` ->
`camera_0000`, ..., each with its `cam_to_world` as the node's matrix. Units and convention are in the scene's extras.
"""

# trimesh has incomplete type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import trimesh
from trimesh.path import Path3D
from trimesh.path.entities import Line

from geometry.arrays import ArrayLike, FloatArray, finite_array
from geometry.io.cameras import CameraView
from geometry.io.common import CONVENTION, FORMAT_VERSION, UNITS, atomic_file, color_array

MAX_POINTS = 2_000_000
OPENCV_TO_GLTF = np.diag([1.0, -1.0, -1.0, 1.0])
FRUSTUM_SIZE = 0.05  # depth of a drawn frustum, as a share of the scene's extent


def write_glb(
    path: str | Path,
    points: ArrayLike,
    colors: ArrayLike | None = None,
    cameras: Sequence[CameraView] = (),
    *,
    is_metric: bool,
    max_points: int | None = MAX_POINTS,
) -> None:
    """Write points, and the cameras if any are given.

    Args:
        path: file to write.
        points: (N, 3) world points, OpenCV axes.
        colors: (N, 3) uint8 RGB.
        cameras: views to draw as frusta.
        is_metric: whether the unit is the metre, as glTF has it; stated in the scene's extras.
        max_points: larger clouds are thinned evenly in storage order to this many; None keeps all, and files of
            gigabytes open nowhere.

    Raises:
        ValueError: no point, a point that is not finite, or colours of another shape or dtype.
    """
    xyz = finite_array(points, "points", ("N", 3))
    if not len(xyz):
        raise ValueError("points: needs at least one point")
    rgb = None if colors is None else color_array(colors, len(xyz))
    kept = _even_subset(len(xyz), max_points)
    xyz, rgb = xyz[kept], None if rgb is None else rgb[kept]
    scene = trimesh.Scene(
        metadata={
            "version": FORMAT_VERSION,
            "units": UNITS[is_metric],
            "convention": f"below opencv_to_gltf: {CONVENTION}",
        }
    )
    scene.graph.update(frame_from=scene.graph.base_frame, frame_to="opencv_to_gltf", matrix=OPENCV_TO_GLTF)
    cloud = trimesh.PointCloud(xyz, colors=rgb)
    scene.add_geometry(cloud, node_name="points", geom_name="points", parent_node_name="opencv_to_gltf")
    if cameras:
        _add_cameras(scene, cameras, FRUSTUM_SIZE * _extent(xyz))
    with atomic_file(path) as file:
        file.write(cast("bytes", scene.export(file_type="glb")))


def _add_cameras(scene: trimesh.Scene, cameras: Sequence[CameraView], depth: float) -> None:
    scene.graph.update(frame_from="opencv_to_gltf", frame_to="cameras")
    for k, view in enumerate(cameras):
        name = f"camera_{k:04d}"
        pose = np.asarray(view.cam_to_world, dtype=np.float64)
        scene.add_geometry(
            _frustum(view, depth), node_name=name, geom_name=name, parent_node_name="cameras", transform=pose
        )


def _frustum(view: CameraView, depth: float) -> Path3D:
    """Lines from the camera centre to the image corners at `depth`, and around them, in camera axes."""
    left, top, right, bottom = -0.5, -0.5, view.width - 0.5, view.height - 0.5  # outer edges of the pixels
    pixels = np.array([[left, top, 1], [right, top, 1], [right, bottom, 1], [left, bottom, 1]])
    corners = depth * pixels @ np.linalg.inv(view.intrinsics).T  # (4, 3)
    lines = [Line([0, 1, 2, 3, 4, 1]), *(Line([0, corner]) for corner in (2, 3, 4))]
    return Path3D(entities=lines, vertices=np.concatenate([np.zeros((1, 3)), corners]), process=False)


def _extent(points: FloatArray) -> float:
    """Diagonal of the box that holds the middle 90% of the points along each axis; 1 for a single place."""
    low, high = np.percentile(points, [5, 95], axis=0)
    return float(np.linalg.norm(high - low)) or 1.0


def _even_subset(count: int, limit: int | None) -> slice | npt.NDArray[np.int64]:
    if limit is None or count <= limit:
        return slice(None)
    return np.arange(limit) * count // limit
