"""What all teachers share that are frozen networks: input sizes, patch features, point maps, other people's packages.

Shapes: S views of a clip, H W pixels of the network's input, h w cells of its features, C their width.
"""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.errors import InputError, MissingExtra
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.joining import has_geometry, joined
from g2vlm.weights import WeightFiles, weight_files

Half = Literal["frame", "global", "both"]
_SAMPLED = 2**20


@dataclass(frozen=True)
class Preparation:
    """How the frames of a clip become a network's input: the whole frame, its aspect kept up to rounding.

    Args:
        multiple: sides are multiples of this many pixels.
        long_side: the longer side in pixels, before rounding; None keeps the clip's size.
        pool: cells of features are averages of pool x pool patches.
        half: of the channels that are kept as features.

    Raises:
        InputError: an impossible pool or half.
    """

    multiple: int
    long_side: int | None = None
    pool: int = 1
    half: Half = "both"

    def __post_init__(self) -> None:
        if self.half not in get_args(Half) or self.pool < 1 or self.multiple % self.pool:
            raise InputError(f"half is {self.half!r}, pool {self.pool}", "", "half: frame, global, both; pool: 1 or 2")

    def size(self, images: Tensor) -> tuple[int, int]:
        """(H, W) that images (S, 3, *, *) are brought to."""
        height, width = images.shape[-2:]
        scale = 1 if self.long_side is None else self.long_side / max(height, width)
        unit = self.multiple
        return (
            max(int(height * scale / unit + 0.5), 1) * unit,
            max(int(width * scale / unit + 0.5), 1) * unit,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images (S, 3, *, *) in [0, 1] at the network's size, float32."""
        size = self.size(images)
        if images.shape[-2:] == size:
            return images.float()
        return F.interpolate(images.float(), size, mode="bilinear", antialias=True).clamp(0, 1)

    @property
    def digest(self) -> str:
        """Of everything here."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class NetworkTeacher(ABC):
    """A frozen network that is asked in the training process, on the device of the clip.

    Args:
        name: of the teacher.
        network: in evaluation mode from here on, without gradients.
        prepare: its input.
        features: what its features look like; None if it gives none.
        revision: of its weights.
    """

    online = True

    def __init__(
        self, name: str, network: nn.Module, prepare: Preparation, features: TeacherFeatures | None, revision: str
    ):
        self.name, self.prepare, self.features, self.revision = name, prepare, features, revision
        self.network: Any = network.eval().requires_grad_(False)

    @property
    def preprocessing(self) -> str:
        """Hash of how it sees a clip."""
        return self.prepare.digest

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        """As in `Teacher`; a clip whose geometry is known gets features alone.

        Raises:
            InputError: the features are not as the options say.
        """
        if targets is not None and has_geometry(targets) and (self.features is None or targets.features):
            return targets
        images = self.prepare(clip.images)
        self.network.to(images.device)
        known = targets is not None and has_geometry(targets)
        with torch.no_grad():
            found = self.features_alone(images) if known else self.say(images)
        self._check(found)
        view_ids = () if clip.scene is None else clip.scene.view_ids
        return joined(targets, replace(found, info=replace(found.info, view_ids=view_ids)))

    @abstractmethod
    def say(self, images: Tensor) -> TeacherTargets:
        """Targets of prepared images (S, 3, H, W) in [0, 1], without gradients."""

    def features_alone(self, images: Tensor) -> TeacherTargets:
        """As `say`, of a clip whose geometry is known; a network that can be spared predicting it overrides this."""
        return self.say(images)

    def info(self, images: Tensor) -> TeacherInfo:
        """Of targets for prepared images."""
        height, width = images.shape[-2:]
        cell = 0 if self.features is None else self.prepare.multiple
        return TeacherInfo(self.name, self.revision, (height, width), cell, preprocessing=self.prepare.digest)

    def _check(self, found: TeacherTargets) -> None:
        for tensor in (found.features or {}).values():
            if self.features is None or tensor.shape[-1] != self.features.dim:
                expected = "none" if self.features is None else f"width {self.features.dim}"
                raise InputError(
                    f"teacher {self.name} gives features of width {tensor.shape[-1]}, expected {expected}",
                    "the weights are another model's than its options say",
                    "set its options width and depth to those of the weights",
                )


def autocast(images: Tensor) -> torch.autocast:
    """bfloat16 inside a network on a GPU, nothing on a CPU."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda")


def patch_features(patches: Tensor, prepare: Preparation) -> Tensor:
    """Features (S, h, w, C) in bfloat16 from patches (S, rows, columns, width): a half of the channels, pooled.

    In VGGT's width of 2048 the first half is the frame attention's output and the second the global attention's.
    """
    width = patches.shape[-1]
    chosen = {"frame": slice(width // 2), "global": slice(width // 2, None), "both": slice(None)}[prepare.half]
    maps = patches[..., chosen].float()
    if prepare.pool > 1:
        maps = F.avg_pool2d(maps.permute(0, 3, 1, 2), prepare.pool).permute(0, 2, 3, 1)
    return maps.bfloat16()


def without_special(tokens: Tensor, start: int, rows: int, columns: int) -> Tensor:
    """Patches (S, rows, columns, C) of tokens (S, start + rows columns, C)."""
    return tokens[:, start:].unflatten(1, (rows, columns))


def positive(depth: Tensor) -> Tensor:
    """Where a depth (..., H, W) can be one."""
    return depth.isfinite() & (depth > 0)


def import_network(package: str, module: str, attribute: str, source: str, weights: str | None) -> Any:
    """A class of somebody's installed package.

    Args:
        package: its name for people.
        module, attribute: where the class is.
        source: where the package is to be had.
        weights: where the user says that its weights are.

    Raises:
        MissingExtra: it is not installed.
        InputError: no weights were named; none are ever downloaded.
    """
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingExtra(
            f"teacher needs the package {package}",
            str(error),
            f"install it from {source} and set the teacher's option weights to the folder of its weights",
        ) from None
    if weights is None:
        raise InputError(
            f"no weights of {package}",
            "nothing is downloaded",
            f"set the teacher's option weights to a folder with model.safetensors (see {source})",
        )
    return found


def load_folder(network_class: Any, weights: str) -> Any:
    """A network from a folder with its own config.json and model.safetensors, by its class's `from_pretrained`.

    Raises:
        CheckpointError: it holds no weights in the safetensors format; no other is ever opened.
        InputError: it is a file.
    """
    weight_files(weights)
    if not Path(weights).is_dir():
        raise InputError(f"cannot use the weights {weights}", "they are a file", "give the folder with its config.json")
    return network_class.from_pretrained(weights, local_files_only=True)


def load_weights(network: nn.Module, weights: str) -> nn.Module:
    """A network with the tensors of a folder or file in the safetensors format, all of them.

    Raises:
        CheckpointError: the files are absent, damaged or of another format.
        InputError: they are another network's.
    """
    files = WeightFiles(weights)
    try:
        network.load_state_dict({name: files.load(name) for name in files.specs})
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"the weights in {weights} do not fit", why, "give the weights of this network") from None
    return network


def fingerprint(weights: str | Path) -> str:
    """Of weights: sizes, and the first and last megabyte of every file."""
    digest = hashlib.blake2b(digest_size=8)
    for file in weight_files(weights):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size}".encode() + stream.read(_SAMPLED))
            stream.seek(max(size - _SAMPLED, 0))
            digest.update(stream.read())
    return digest.hexdigest()


def entry(outputs: Mapping[str, Any], name: str) -> Tensor:
    """One output (1, S, ...) of a network, for its only clip, in float32: (S, ...)."""
    return outputs[name][0].float()
