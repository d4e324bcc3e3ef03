"""Pure geometry: tensors in, tensors out. Imports nothing of the project."""

from geometry.alignment import (
    align_depth_affine,
    align_depth_scale,
    align_points_scale,
    sample_valid,
    umeyama,
    weighted_l1_scale,
    weighted_l1_scale_truncated,
)
from geometry.cameras import (
    crop_intrinsics,
    half_pixel_to_integer_grid,
    integer_grid_to_half_pixel,
    intrinsics_from_points,
    pixel_grid,
    project,
    ray_directions,
    resize_intrinsics,
    unproject,
)
from geometry.losses import GeometryLosses, GeometryLossWeights, GeometryTargets, geometry_losses
from geometry.pointmaps import depth_edges, neighbour_normals, normals_from_points, world_points_from_local
from geometry.rotations import geodesic_angle, rotation_from_9d
from geometry.transforms import apply_rigid, invert_rigid, relative_cam, rigid
from geometry.types import GeometryPrediction, Similarity, Views

__all__ = [
    "GeometryLossWeights",
    "GeometryLosses",
    "GeometryPrediction",
    "GeometryTargets",
    "Similarity",
    "Views",
    "align_depth_affine",
    "align_depth_scale",
    "align_points_scale",
    "apply_rigid",
    "crop_intrinsics",
    "depth_edges",
    "geodesic_angle",
    "geometry_losses",
    "half_pixel_to_integer_grid",
    "integer_grid_to_half_pixel",
    "intrinsics_from_points",
    "invert_rigid",
    "neighbour_normals",
    "normals_from_points",
    "pixel_grid",
    "project",
    "ray_directions",
    "relative_cam",
    "resize_intrinsics",
    "rigid",
    "rotation_from_9d",
    "sample_valid",
    "umeyama",
    "unproject",
    "weighted_l1_scale",
    "weighted_l1_scale_truncated",
    "world_points_from_local",
]
