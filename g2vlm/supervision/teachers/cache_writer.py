"""Write a cache of a teacher's targets: whole shards or none, by any number of processes, resumed wherever it stopped.

A folder holds identity.json (written first: whose targets these are), shards, and manifest.json (written last: which
clip is in which shard). A shard is written under a hidden name, synced to disk and renamed; its name follows from the
clips in it, so that processes never disturb each other. What a killed process had not yet written is made again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from g2vlm.errors import CheckpointError, InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.staging import write_errors
from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.teachers.base import Teacher, targets_of
from g2vlm.supervision.teachers.cache_format import VERSION, Entry, encoded, key_of, require_fields

IDENTITY, MANIFEST = "identity.json", "manifest.json"
AGAIN = "delete it and run train.cache_teacher again: it makes what is missing"


@dataclass(frozen=True)
class Identity:
    """Whose targets a cache holds; another identity is another cache.

    Args:
        teacher, revision: names and weights of the teachers that were asked, in order.
        preprocessing: hash of how they see a clip.
        fields: of `TeacherTargets` that are kept, if the teachers know them.
        features: what the features look like; None if none are kept.
    """

    teacher: str
    revision: str
    preprocessing: str
    fields: tuple[str, ...]
    features: TeacherFeatures | None = None

    @classmethod
    def of(cls, teachers: Sequence[Teacher], fields: Sequence[str]) -> "Identity":
        """Of teachers asked in order."""
        features = next((own.features for own in teachers if own.features is not None), None)
        kept = require_fields(fields)
        return cls(
            teacher=" + ".join(own.name for own in teachers),
            revision=" + ".join(own.revision for own in teachers),
            preprocessing=" + ".join(own.preprocessing for own in teachers),
            fields=kept,
            features=features if "features" in kept else None,
        )

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON types."""
        return json.loads(json.dumps({"version": VERSION, **asdict(self)}))


def identity_from(values: dict[str, Any]) -> Identity:
    """From JSON types."""
    features = values["features"] and TeacherFeatures(
        **(values["features"] | {"blocks": tuple(values["features"]["blocks"])})
    )
    names = ("teacher", "revision", "preprocessing")
    return Identity(**{name: values[name] for name in names}, fields=tuple(values["fields"]), features=features)


def prepare_folder(folder: Path, identity: Identity) -> None:
    """Make the folder of a cache, or check that it is the one that is to go on; remove what a killed process left.

    Raises:
        InputError: it holds something else, or the cache of another identity.
        ResourceError: the disk is full.
    """
    entries = [*folder.iterdir()] if folder.is_dir() else []
    if not (folder / IDENTITY).is_file():
        if [entry for entry in entries if not entry.name.endswith(".partial")]:
            raise InputError(f"{folder} is no cache of a teacher", f"it holds no {IDENTITY}", "choose another --output")
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / IDENTITY, identity.plain)
    there = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    other = [name for name, value in identity.plain.items() if there.get(name) != value]
    if other:
        why = "; ".join(f"{name}: {there.get(name)} there, {identity.plain[name]} now" for name in other)
        raise InputError(f"{folder} holds targets made otherwise", why, "choose another --output, or the same options")
    for entry in entries:
        if entry.name.endswith(".partial"):
            entry.unlink(missing_ok=True)


class CacheWriter:
    """Collects clips into shards.

    Args:
        folder: prepared.
        identity: of the cache.
        clips_per_shard, bytes_per_shard: a shard is written when it has so many.
    """

    def __init__(self, folder: Path, identity: Identity, clips_per_shard: int = 64, bytes_per_shard: int = 2**28):
        self.folder, self.identity = folder, identity
        self.clips_per_shard, self.bytes_per_shard = clips_per_shard, bytes_per_shard
        self.known = set(stored_clips(folder, identity))
        self._waiting: dict[str, Entry] = {}
        self._bytes = 0

    def has(self, clip: Clip) -> bool:
        """Whether it is stored, or waits to be."""
        return key_of(clip, self.identity.revision) in self.known

    def add(self, clip: Clip, entry: Entry) -> None:
        """Take a clip; a full shard is written."""
        key = key_of(clip, self.identity.revision)
        self._waiting[key] = entry
        self.known.add(key)
        self._bytes += sum(tensor.nbytes for tensor in entry.tensors.values())
        if len(self._waiting) >= self.clips_per_shard or self._bytes >= self.bytes_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            ResourceError: the disk is full.
        """
        if not self._waiting:
            return
        name = hashlib.blake2b(" ".join(sorted(self._waiting)).encode(), digest_size=8).hexdigest()
        target = self.folder / f"shard-{name}.safetensors"
        tensors = {f"{key}.{part}": own for key, entry in self._waiting.items() for part, own in entry.tensors.items()}
        clips = {key: entry.record for key, entry in self._waiting.items()}
        metadata = {"identity": json.dumps(self.identity.plain), "clips": json.dumps(clips)}
        partial = self.folder / f".{target.name}.{os.getpid()}.partial"
        with write_errors(target):
            save_file(tensors, partial, metadata)
            _sync(partial)
            os.replace(partial, target)
            _sync(self.folder)
        self._waiting, self._bytes = {}, 0


@dataclass(frozen=True)
class Counts:
    """What became of clips: `made` now, of which `without` have no targets; already `there`."""

    made: int = 0
    without: int = 0
    there: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.made + other.made, self.without + other.without, self.there + other.there)


def write_clips(writer: CacheWriter, teachers: Sequence[Teacher], clips: Iterable[Clip]) -> Counts:
    """Ask teachers about all clips that are not stored yet, and store what they say; errors as of the teachers."""
    counts = Counts()
    for clip in clips:
        if writer.has(clip):
            counts += Counts(there=1)
            continue
        targets = targets_of(teachers, clip)
        writer.add(clip, encoded(clip, targets, writer.identity.fields))
        counts += Counts(made=1, without=int(targets is None))
    writer.flush()
    return counts


def write_manifest(folder: Path, identity: Identity) -> dict[str, Any]:
    """Write the manifest of all shards of a folder and return it; a clip in several shards is taken from the first."""
    clips: dict[str, list[Any]] = {}
    shards = shard_files(folder)
    for number, shard in enumerate(shards):
        for key, record in read_records(shard, identity).items():
            clips.setdefault(key, [number, record["name"]])
    manifest = {
        "identity": identity.plain,
        "count": len(clips),
        "shards": [{"name": shard.name, "bytes": shard.stat().st_size} for shard in shards],
        "clips": dict(sorted(clips.items())),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def shard_files(folder: Path) -> list[Path]:
    """All whole shards of a folder."""
    return sorted(folder.glob("shard-*.safetensors"))


def stored_clips(folder: Path, identity: Identity) -> list[str]:
    """Keys of all clips in a folder's shards; errors as of `read_records`."""
    return [key for shard in shard_files(folder) for key in read_records(shard, identity)]


def read_records(shard: Path, identity: Identity) -> dict[str, dict[str, Any]]:
    """Key -> record of the clips in a shard.

    Raises:
        CheckpointError: it is absent, damaged, or of another cache.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
        clips, own = json.loads(metadata["clips"]), json.loads(metadata["identity"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {shard}", str(error) or "it has no header", AGAIN) from None
    if own != identity.plain:
        why = f"it was made by {own.get('teacher')}, prepared as {own.get('preprocessing')}"
        raise CheckpointError(f"{shard} belongs to another cache", why, AGAIN)
    return clips


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A whole file, synced to disk, or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with write_errors(path):
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
