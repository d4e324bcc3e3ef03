"""Teachers of geometry by name."""

from importlib import import_module
from pathlib import Path
from typing import Any

from g2vlm.data.registry import option_names, unknown
from g2vlm.errors import InputError
from g2vlm.supervision.teachers.base import Teacher

TEACHERS = {
    "ground_truth": "g2vlm.supervision.teachers.ground_truth:GroundTruth",
    "expert": "g2vlm.supervision.teachers.expert:ExpertTeacher",
    "cache": "g2vlm.supervision.teachers.cache:CachedTeacher",
    "vggt": "g2vlm.supervision.teachers.vggt:VGGT",
    "vggt_omega": "g2vlm.supervision.teachers.vggt_omega:VGGTOmega",
    "pi3": "g2vlm.supervision.teachers.pi3:Pi3",
    "depth_anything3": "g2vlm.supervision.teachers.depth_anything3:DepthAnything3",
    "depth_anything3_metric": "g2vlm.supervision.teachers.depth_anything3:MetricScale",
    "depth_anything": "g2vlm.supervision.teachers.depth_anything:DepthAnything",
    "cut3r": "g2vlm.supervision.teachers.cut3r:CUT3R",
}
NEEDS_ROOT = ("cache",)


def build_teacher(name: str, root: Path | str | None = None, **options: Any) -> Teacher:
    """A teacher by its name in configs.

    Args:
        name: a key of `TEACHERS`.
        root: folder of what a teacher once said; None for teachers that are asked themselves.
        options: arguments of the teacher's class.

    Raises:
        InputError: unknown name or option (the nearest known one is suggested), or a root missing or not wanted.
        MissingExtra: the teacher is somebody's package or weights, which are not here.
    """
    if name not in TEACHERS:
        raise unknown("teacher", name, list(TEACHERS))
    if (root is None) == (name in NEEDS_ROOT):
        why = "no folder was given" if root is None else "it reads no folder"
        raise InputError(f"cannot open teacher  {name}", why, "check root")
    module, class_name = TEACHERS[name].split(":")
    teacher_class = getattr(import_module(module), class_name)
    known = option_names(teacher_class)
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known)
    return teacher_class(**options) if root is None else teacher_class(Path(root), **options)
