"""A teacher's targets read back from files: never a guess, never a silent miss.

The files are those of `cache_writer`. What was said about some frames is given back for exactly these frames, in this
order, at this size: a network that sees many views says other things about other views.
"""

import json
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from g2vlm.errors import CheckpointError, InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers.cache_format import TOLERANCE, VERSION, Entry, decoded, key_of, thumbnails
from g2vlm.supervision.teachers.cache_writer import AGAIN, IDENTITY, MANIFEST, identity_from, read_records
from g2vlm.supervision.teachers.joining import has_geometry, joined

MAKE = "run python -m train.cache_teacher with this run's config and the same --output"
_OPEN_SHARDS = 4


@dataclass(frozen=True, eq=False)
class _Shard:
    """An open file, and the records of its clips."""

    file: Any
    records: dict[str, dict[str, Any]]


class CachedTeacher:
    """What teachers said about the clips of a cache.

    Files are opened when they are needed, by each process for itself, a few at a time.

    Args:
        root: folder of the cache.
        features: whether its features are read, if it has any.
        revision, preprocessing: what those of the cache must be; by default whatever they are.

    Raises:
        InputError: there is no such cache, it is not complete, or it is of another revision or preprocessing.
        CheckpointError: its manifest is damaged.
    """

    name = "cache"
    online = False

    def __init__(
        self, root: Path, features: bool = True, revision: str | None = None, preprocessing: str | None = None
    ):
        self.root = Path(root)
        manifest = _read_manifest(self.root)
        self.identity = identity_from(manifest["identity"])
        self._require("revision", revision)
        self._require("preprocessing", preprocessing)
        self.features: TeacherFeatures | None = self.identity.features if features else None
        self.shards: list[str] = [shard["name"] for shard in manifest["shards"]]
        self.clips: dict[str, list[Any]] = manifest["clips"]
        self._open: OrderedDict[str, _Shard] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for a process that is not forked."""
        return {**vars(self), "_open": OrderedDict()}

    @property
    def revision(self) -> str:
        """Of the teachers."""
        return self.identity.revision

    @property
    def preprocessing(self) -> str:
        """Of the teachers."""
        return self.identity.preprocessing

    def complete(self, clip: Clip, targets: TeacherTargets | None) -> TeacherTargets | None:
        """As in `Teacher`.

        Raises:
            InputError: the clip is not in the cache, or only with other frames, another size or other pictures.
            CheckpointError: its shard is absent or damaged.
        """
        if targets is not None and has_geometry(targets) and (self.features is None or targets.features):
            return targets
        key = key_of(clip, self.identity.revision)
        if key not in self.clips:
            raise self._missing(clip)
        entry = self._entry(key)
        self._check_frames(clip, entry.tensors["thumbnails"])
        found = decoded(entry)
        if found is not None and self.features is None:
            found = replace(found, features=None, info=replace(found.info, cell_size=0))
        return joined(targets, found)

    def _require(self, what: str, wanted: str | None) -> None:
        own = getattr(self.identity, what)
        if wanted is not None and wanted != own:
            raise InputError(
                f"the cache {self.root} has the {what} {own!r}", f"{wanted!r} was asked for", f"{MAKE} elsewhere"
            )

    def _missing(self, clip: Clip) -> InputError:
        """Why a clip is not there, as far as its name tells."""
        views, _, height, width = clip.images.shape
        scene = clip.name.rsplit(":", 1)[0]
        others = [name for _, name in self.clips.values() if name.rsplit(":", 1)[0] == scene]
        what = f"{clip.name!r}, {views} frames of {width} x {height}, is not in the cache {self.root}"
        if clip.name in others:
            return InputError(what, "the cache has these frames at another size", MAKE)
        if others:
            why = f"the cache has other frames of it, such as {others[0]!r}"
            return InputError(what, why, "give its source the options fixed_samples and fixed_seed of the cache's run")
        return InputError(what, f"it holds {len(self.clips)} other clips", MAKE)

    def _entry(self, key: str) -> Entry:
        """A clip, its checksums verified."""
        name = self.shards[self.clips[key][0]]
        shard = self._shard(name)
        try:
            record = shard.records[key]
            own = [part for part in shard.file.keys() if part.startswith(f"{key}.")]  # noqa: SIM118 (no mapping)
            wanted = [part for part in own if self.features is not None or ".features." not in part]
            entry = Entry({part.removeprefix(f"{key}."): shard.file.get_tensor(part) for part in wanted}, record)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"cannot read {self.root / name}", str(error), AGAIN) from None
        if not entry.intact():
            raise CheckpointError(f"{self.root / name} is damaged", "a checksum does not match", AGAIN)
        return entry

    def _shard(self, name: str) -> _Shard:
        """An open shard; the least recently used is closed for it."""
        if self._process != os.getpid():  # a forked worker opens files of its own
            self._open, self._process = OrderedDict(), os.getpid()
        if name not in self._open:
            path = self.root / name
            records = read_records(path, self.identity)
            self._open[name] = _Shard(safe_open(path, framework="pt").__enter__(), records)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _check_frames(self, clip: Clip, stored: Tensor) -> None:
        """Names may lie about what a file holds today; pictures do not."""
        given = thumbnails(clip.images)
        differ = (given.int() - stored.int()).abs().flatten(1).amax(1) > TOLERANCE  # (S,)
        if bool(differ.any()):
            frames = ", ".join(str(i) for i in torch.nonzero(differ).flatten().tolist()[:8])
            raise InputError(
                f"{clip.name!r} shows other pictures than when {self.root} was made",
                f"frames {frames} of {len(given)} differ",
                "make the cache again from these files, or use those it was made from",
            )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        why = f"it is not complete: there is no {MANIFEST} yet" if (root / IDENTITY).is_file() else "there is none"
        raise InputError(f"cannot read the cache {root}", why, MAKE)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["identity"]["version"] != VERSION:
            found = manifest["identity"]["version"]
            raise CheckpointError(f"{path} has version {found}", f"this program reads version {VERSION}", MAKE)
        if manifest["count"] != len(manifest["clips"]):
            raise ValueError("it names another number of clips than it counts")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged", str(error), f"delete it and {MAKE}") from None
    return manifest
