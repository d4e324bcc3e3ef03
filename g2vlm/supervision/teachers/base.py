"""What a teacher of geometry is: something that completes what is known about a clip."""

from collections.abc import Sequence
from typing import Protocol

from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherTargets


class Teacher(Protocol):
    """Ground truth, a frozen network, or a cache of what one said."""

    @property
    def name(self) -> str:
        """As in configs and messages."""
        ...

    @property
    def revision(self) -> str:
        """Of its weights; empty where there are none."""
        ...

    @property
    def preprocessing(self) -> str:
        """Hash of how it sees a clip; empty where it takes it as it is."""
        ...

    @property
    def online(self) -> bool:
        """It computes on the training device: asked in the training process before a step; else by loader workers."""
        ...

    @property
    def features(self) -> TeacherFeatures | None:
        """What its features look like; None if it gives none."""
        ...

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        """The targets of a clip with what this teacher knows and those before it left out.

        Depth, validity, cameras, points and confidence come from one teacher, since they share a unit and a world; a
        teacher that comes after may add features, and a metric scale that it fits to the depth which is there.

        Args:
            clip: whose frames are those that the model sees.
            targets: of the teachers before; None if they know nothing of this clip.

        Returns:
            None if there are still no targets: the clip is not supervised.

        Raises:
            InputError: the teacher must know this clip and does not (a cache never misses silently).
        """
        ...


def targets_of(teachers: Sequence[Teacher], clip: Clip, targets: TeacherTargets | None = None) -> TeacherTargets | None:
    """What all teachers together say about a clip, asked in order."""
    for teacher in teachers:
        targets = teacher.complete(clip, targets)
    return targets
