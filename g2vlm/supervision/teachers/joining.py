"""Two teachers about one clip."""

from dataclasses import replace

from g2vlm.supervision.targets import TeacherTargets


def has_geometry(targets: TeacherTargets) -> bool:
    """Whether targets say anything but features."""
    return any(entry is not None for entry in (targets.depth, targets.cam_to_world, targets.intrinsics, targets.points))


def joined(first: TeacherTargets | None, later: TeacherTargets | None) -> TeacherTargets | None:
    """What both say: geometry of the first that has any, whole, and features of the first that has any.

    Geometry is never mixed, since it has one unit and one world; the metric scale belongs to it. The information is
    the geometry's, but for the input and cells, which are the features'.
    """
    if first is None or later is None:
        return later if first is None else first
    geometry = first if has_geometry(first) or not has_geometry(later) else later
    featured = first if first.features or not later.features else later
    if geometry is featured:
        return geometry
    names = dict.fromkeys((first.info.teacher, later.info.teacher))
    info = replace(
        geometry.info,
        teacher=" + ".join(names),
        input_size=featured.info.input_size,
        cell_size=featured.info.cell_size,
    )
    return replace(geometry, features=featured.features, features_normed=featured.features_normed, info=info)
