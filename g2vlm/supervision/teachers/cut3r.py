"""CUT3R as a teacher, from a local checkout; written from its published description, not run with the released weights.

Its network takes frames in [-1, 1] one after another (sides multiples of 16) and gives for each the points in its own
camera's frame with a confidence 1 + exp(.), and seven numbers of a camera-to-world pose: translation, then quaternion
with the real part first. Intrinsics are recovered from the points. It gives no features here.

Shapes: S views, H W pixels.
"""

# roma has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Mapping, Sequence
from typing import Any, cast

import roma
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import NetworkTeacher, Preparation, fingerprint, import_network, load_folder
from g2vlm.supervision.teachers.point_maps import PointMaps, targets_from_point_maps
from geometry import rigid

SOURCE = "https://github.com/CUT3R/CUT3R (its folder src on PYTHONPATH)"
PATCH = 16


class CUT3R(NetworkTeacher):
    """CUT3R.

    Args:
        weights: folder with config.json and model.safetensors; its own .pth files can run code and are not opened.
        long_side: of the input in pixels; by default the clip's.
    """

    def __init__(self, weights: str | None = None, long_side: int | None = None):
        network_class = import_network("CUT3R", "dust3r.model", "ARCroco3DStereo", SOURCE, weights)
        network = load_folder(network_class, str(weights))
        super().__init__("cut3r", network, Preparation(PATCH, long_side), None, fingerprint(str(weights)))

    def say(self, images: Tensor) -> TeacherTargets:
        """As in `NetworkTeacher`."""
        return targets_from_cut3r(self.network(views_for_cut3r(images)).ress, self.info(images))


def views_for_cut3r(images: Tensor) -> list[dict[str, Any]]:
    """What the network takes for images (S, 3, H, W) in [0, 1]: one view after another, without known rays or poses."""
    height, width = images.shape[-2:]
    yes, no = (torch.tensor([answer], device=images.device) for answer in (True, False))
    return [
        {
            "img": 2 * image[None] - 1,
            "ray_map": torch.full((1, height, width, 6), torch.nan, device=images.device),
            "true_shape": torch.tensor([[height, width]], dtype=torch.int32),
            "idx": number,
            "instance": str(number),
            "camera_pose": torch.eye(4, device=images.device)[None],
            "img_mask": yes,
            "ray_mask": no,
            "update": yes,
            "reset": no,
        }
        for number, image in enumerate(images)
    ]


def targets_from_cut3r(outputs: Sequence[Mapping[str, Any]], info: TeacherInfo) -> TeacherTargets:
    """What the network said, in this project's conventions.

    Args:
        outputs: one per view: pts3d_in_self_view (1, H, W, 3), conf_self (1, H, W), camera_pose (1, 7).
        info: of the targets.
    """
    pose = torch.cat([output["camera_pose"] for output in outputs]).float()  # (S, 7)
    real_last = F.normalize(pose[:, 3:].roll(-1, dims=-1), dim=-1)
    rotation = cast(Tensor, roma.unitquat_to_rotmat(real_last))
    maps = PointMaps(
        local_points=torch.cat([output["pts3d_in_self_view"] for output in outputs]),
        cam_to_world=rigid(rotation, pose[:, :3]),
        confidence=torch.cat([output["conf_self"] for output in outputs]),
    )
    return targets_from_point_maps(maps, info)
