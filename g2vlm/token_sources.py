"""Sources of geometry tokens by name, and teachers of geometry as sources."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from g2vlm.checkpoint import load_model
from g2vlm.data.registry import unknown
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip, GeometricExpert, GeometryTokens, GeometryTokenSource
from g2vlm.supervision.teachers.base import Teacher
from g2vlm.supervision.teachers.registry import build_teacher
from g2vlm.token_cache import CachedTokens

MeanCamera = Literal["mean", "none"]


class TeacherTokens:
    """A teacher's features as geometry tokens.

    Args:
        teacher: with features.
        block: 0-based number of the block whose features are taken; None for the last that it gives.
        camera: what stands for a view's camera, since a teacher gives features of patches alone: their mean, or none.

    Raises:
        InputError: a teacher without features, or without this block.
    """

    def __init__(self, teacher: Teacher, block: int | None = None, camera: MeanCamera = "mean"):
        features = teacher.features
        if features is None:
            raise InputError(f"the teacher {teacher.name} has no features", "tokens are made of them", "take another")
        if camera not in get_args(MeanCamera):
            raise InputError(f"unknown camera {camera!r} of tokens", "", f"known: {', '.join(get_args(MeanCamera))}")
        self.teacher, self.camera = teacher, camera
        self.block = max(features.blocks) if block is None else block
        if self.block not in features.blocks:
            why = f"it gives those of {', '.join(map(str, features.blocks))}"
            raise InputError(f"the teacher {teacher.name} has no features of block {block}", why, "choose one of them")
        self._dim = features.dim

    @property
    def token_dim(self) -> int:
        """Width of the teacher's features."""
        return self._dim

    @property
    def online(self) -> bool:
        """As the teacher."""
        return self.teacher.online

    def tokens(self, clip: Clip) -> GeometryTokens:
        """As in the protocol.

        Raises:
            InputError: the teacher knows nothing of this clip.
        """
        targets = self.teacher.complete(clip, None)
        if targets is None or targets.features is None or self.block not in targets.features:
            why = f"the teacher {self.teacher.name} gave no features of block {self.block}"
            raise InputError(f"no geometry tokens of clip {clip.name!r}", why, "leave the clip out")
        features = targets.detached().features
        assert features is not None
        maps = features[self.block]  # (S, h, w, C)
        patches = maps.flatten(1, 2)
        camera = patches.mean(dim=1, keepdim=True) if self.camera == "mean" else None
        metric = targets.metric_scale is not None and float(targets.metric_scale) == 1.0
        return GeometryTokens(patches, camera, (maps.shape[1], maps.shape[2]), metric, self.block)


def build_token_source(
    name: str, root: Path | str | None = None, device: torch.device | str = "cpu", **options: Any
) -> GeometryTokenSource:
    """A source by its name in configs.

    Args:
        name: `cache`: tokens that were made before; `geometric_expert`: of the model in a checkpoint folder;
            `teacher`: features of a teacher.
        root: folder of the cache, of the model, or of the teacher if it has one.
        device: for an expert; a teacher computes where the clips are that it is asked about.
        options: `made_by` of a cache; `layer` and `camera` of an expert; of a teacher its name as `teacher`, `block`
            and `camera` as in `TeacherTokens`, and arguments of its class.

    Raises:
        InputError: unknown name or option, or a root missing.
        CheckpointError: the folder is unusable.
    """
    if name not in SOURCES:
        raise unknown("source of geometry tokens", name, [*SOURCES])
    build, known = SOURCES[name]
    for option in options:
        if known and option not in known:
            raise unknown(f"option of {name}", option, [*known])
    source = build(root, **options)
    if isinstance(source, GeometricExpert):
        source.model.to(device)  # pyright: ignore[reportArgumentType]
    return source


def _cache(root: Path | str | None, **options: Any) -> CachedTokens:
    return CachedTokens(_folder(root, "the cache of geometry tokens"), **options)


def _expert(root: Path | str | None, **options: Any) -> GeometricExpert:
    return GeometricExpert(
        load_model(_folder(root, "the model whose tokens are given")).requires_grad_(False), **options
    )


def _teacher(root: Path | str | None, teacher: str = "", **options: Any) -> TeacherTokens:
    own = {key: options.pop(key) for key in ("block", "camera") if key in options}
    return TeacherTokens(build_teacher(teacher, root, **options), **own)


def _folder(root: Path | str | None, what: str) -> Path:
    if root is None:
        raise InputError(f"cannot open {what}", "no folder was given", "give its root")
    return Path(root)


SOURCES: dict[str, tuple[Callable[..., GeometryTokenSource], tuple[str, ...]]] = {
    "cache": (_cache, ("made_by",)),
    "geometric_expert": (_expert, ("layer", "camera")),
    "teacher": (_teacher, ()),
}
"""Name -> what builds it, and its options; a teacher's class checks its own."""
