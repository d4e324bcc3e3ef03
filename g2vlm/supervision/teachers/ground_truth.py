"""The data as a teacher: depth and cameras that a clip's scene came with."""

import torch

from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.joining import joined


class GroundTruth:
    """Depth, validity, cameras and the metric scale of clips whose data have them; it knows no features."""

    name = "ground_truth"
    revision = preprocessing = ""
    online = False
    features: TeacherFeatures | None = None

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        """As in `Teacher`; nothing is added to a clip without depth, poses or intrinsics.

        Raises:
            InputError: the scene has another number of views than the clip has frames.
        """
        scene = clip.scene
        if scene is None:
            return targets
        if scene.num_views != len(clip.images):
            raise InputError(
                f"the ground truth of clip {clip.name!r} does not fit",
                f"it has {scene.num_views} views, the clip has {len(clip.images)} frames",
                "give a clip the scene that its frames are the views of",
            )
        return joined(targets, targets_of_scene(scene))


def targets_of_scene(scene: SceneSample) -> TeacherTargets | None:
    """What the data say, in their unit, the first camera being the world; None if they say nothing.

    Depth is zero where it is not valid. The metric scale is 1 where lengths are metres, otherwise NaN.
    """
    depth, valid = scene.depth, scene.valid
    if depth is not None:
        seen = depth.isfinite() & (depth > 0)
        valid = seen if valid is None else valid & seen
        depth = torch.where(valid, depth, 0)
    if all(entry is None for entry in (depth, scene.cam_to_world, scene.intrinsics)):
        return None
    found = TeacherTargets(
        num_views=scene.num_views,
        size=scene.size,
        info=TeacherInfo(f"ground truth of {scene.dataset}", "", scene.size, view_ids=scene.view_ids),
        depth=depth,
        valid=None if depth is None else valid,
        cam_to_world=scene.cam_to_world,
        intrinsics=scene.intrinsics,
        metric_scale=torch.tensor(1.0 if scene.is_metric else torch.nan),
    )
    return found if found.cam_to_world is None else found.in_first_camera()
