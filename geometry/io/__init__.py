"""Files of a reconstruction, one module per format.

Axes are OpenCV's (+x right, +y down, +z forward), poses `cam_to_world`, pixel (0, 0) has its centre at (0, 0); GLB
alone is turned to glTF's y-up axes, by one root node. Every writer fills a temporary file beside the target and renames
it, so a reader never sees half a file. Readers trust nothing: sizes are bounded, nothing is unpickled, and each
complaint is a ValueError that names the file and the field.
"""

from geometry.io.cameras import CameraFile, CameraView, read_cameras, write_cameras
from geometry.io.depth_png import depth_png_scale, read_depth_png, write_depth_png
from geometry.io.glb import write_glb
from geometry.io.npz import read_npz, write_npz
from geometry.io.ply import PointCloud, read_ply, write_ply

__all__ = [
    "CameraFile",
    "CameraView",
    "PointCloud",
    "depth_png_scale",
    "read_cameras",
    "read_depth_png",
    "read_npz",
    "read_ply",
    "write_cameras",
    "write_depth_png",
    "write_glb",
    "write_npz",
    "write_ply",
]
