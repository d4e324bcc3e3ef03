"""Named groups of tensors in a folder: safetensors shards, and a manifest of what made them and where each group lies.

A folder holds manifest.json and shard-00000.safetensors and so on. The manifest has `made_by` (plain values that say
what the tensors come from), `shards` (file -> bytes and SHA-256) and `entries` (name -> shard, checksums of its
tensors, and facts about it). A shard is renamed into place before the manifest names it, and the manifest is replaced
at once: a writer that is stopped leaves a usable folder, and the next one goes on from there.
"""

import difflib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from g2vlm.errors import CheckpointError, InputError
from g2vlm.staging import write_errors
from g2vlm.weights import read_header, read_json, sha256

MANIFEST = "manifest.json"
SCHEMA = 2
SHARD_BYTES = 512 * 2**20


class ShardWriter:
    """Writes groups of tensors into a folder, or adds to those that are there. One writer at a time.

        with ShardWriter(folder, made_by) as writer:
            if name not in writer:
                writer.add(name, {"patches": patches}, {"frames": 32})

    Args:
        folder: made if missing.
        made_by: JSON values that say what the tensors come from.
        shard_bytes: a shard is written when it holds as much.

    Raises:
        InputError: the folder holds tensors that something else made.
        CheckpointError: its manifest is damaged.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any], shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        maker = plain(made_by)
        self._manifest: dict[str, Any] = {"schema": SCHEMA, "made_by": maker, "shards": {}, "entries": {}}
        if (folder / MANIFEST).is_file():
            self._manifest = read_manifest(folder)
            require_made_by(folder, self._manifest["made_by"], maker)
        self._tensors: dict[str, Tensor] = {}
        self._waiting: dict[str, dict[str, Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._manifest["entries"] or name in self._waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what waits, also when the block failed: what was made before stays."""
        self.flush()

    def add(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """A group; its tensors are copied to the CPU.

        Args:
            name: not there yet.
            tensors: by a name without `/`.
            facts: JSON values that are known without opening the shard.

        Raises:
            InputError: the name is taken, or the folder cannot be written.
            ResourceError: the disk is full.
        """
        if name in self:
            raise InputError(f"{name} is in {self.folder} already", "each name has one group of tensors", "skip it")
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        self._tensors |= {f"{name}/{key}": tensor for key, tensor in copies.items()}
        self._waiting[name] = {"checksums": {key: checksum(t) for key, t in copies.items()}, "facts": dict(facts)}
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the waiting groups as a shard; errors as in `add`."""
        if not self._waiting:
            return
        shard = f"shard-{len(self._manifest['shards']):05d}.safetensors"
        with write_errors(self.folder / shard):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{shard}.partial"
            save_file(self._tensors, partial, metadata={"format": "pt"})
            self._manifest["shards"][shard] = {"bytes": partial.stat().st_size, "sha256": sha256(partial)}
            partial.rename(self.folder / shard)
            self._manifest["entries"] |= {name: {"shard": shard, **own} for name, own in self._waiting.items()}
            waiting = self.folder / f".{MANIFEST}.partial"
            waiting.write_text(json.dumps(self._manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            waiting.replace(self.folder / MANIFEST)
        (self.folder / shard).chmod((self.folder / MANIFEST).stat().st_mode)
        self._tensors, self._waiting = {}, {}


class Shards:
    """Groups of tensors by name, read from a folder that `ShardWriter` wrote.

    Sizes and headers of all shards are checked at construction, tensors when they are read; `verify` reads everything.

    Args:
        folder: of the manifest.
        made_by: what they must come from, as far as it is given here; None for whatever made them.

    Raises:
        CheckpointError: no manifest, or shards that are absent, damaged or not the manifest's.
        InputError: something else made them.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any] | None = None):
        self.folder = folder
        manifest = read_manifest(folder)
        self.made_by: dict[str, Any] = manifest["made_by"]
        self._shards, self._entries = manifest["shards"], manifest["entries"]
        require_made_by(folder, self.made_by, plain(made_by or {}), exactly=False)
        self._keys = {shard: self._header(shard) for shard in self._shards}
        self._open: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for a process that is not forked."""
        return {**vars(self), "_open": {}}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """Of all groups, in order of their names."""
        return sorted(self._entries)

    def facts(self, name: str) -> dict[str, Any]:
        """What was said about a group when it was written.

        Raises:
            InputError: there is no such group; the message has the nearest name.
        """
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            fix = f"make it first; the nearest name there is {near[0]!r}" if near else "make it first"
            raise InputError(f"nothing of {name!r} in {self.folder}", f"{len(self)} others are kept there", fix)
        return self._entries[name]["facts"]

    def load(self, name: str) -> dict[str, Tensor]:
        """A group's tensors on the CPU.

        Raises:
            InputError: as in `facts`.
            CheckpointError: its shard has not all of them, or others than were written.
        """
        self.facts(name)
        entry = self._entries[name]
        shard, checksums = entry["shard"], entry["checksums"]
        absent = [key for key in checksums if f"{name}/{key}" not in self._keys[shard]]
        if absent:
            why = f"{MANIFEST} says that its {absent[0]} is there"
            raise CheckpointError(f"{self.folder / shard} lacks {name}", why, "make it again")
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard, framework="pt")
        tensors = {key: self._open[shard].get_tensor(f"{name}/{key}") for key in checksums}
        if any(checksum(tensor) != checksums[key] for key, tensor in tensors.items()):
            why = f"a checksum of {name} does not match"
            raise CheckpointError(f"{self.folder / shard} is damaged", why, "make it again")
        return tensors

    def verify(self) -> None:
        """Compare the contents of all shards with the manifest.

        Raises:
            CheckpointError: one differs.
        """
        for shard, expected in self._shards.items():
            if sha256(self.folder / shard) != expected["sha256"]:
                raise CheckpointError(f"{self.folder / shard} is damaged", "its SHA-256 differs", "make it again")

    def _header(self, shard: str) -> set[str]:
        file = self.folder / Path(shard).name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", f"{MANIFEST} names it", "copy the whole folder again")
        if file.stat().st_size != self._shards[shard]["bytes"]:
            why = f"it has {file.stat().st_size} bytes, not {self._shards[shard]['bytes']}"
            raise CheckpointError(f"{file} is damaged", why, "copy it again")
        return {*read_header(file)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    manifest = read_json(folder / MANIFEST)
    parts = [manifest.get(key) for key in ("made_by", "shards", "entries")]
    if manifest.get("schema") != SCHEMA or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"unusable {folder / MANIFEST}", f"it is not of schema {SCHEMA}", "make the folder again")
    absent = sorted({str(entry.get("shard")) for entry in manifest["entries"].values()} - manifest["shards"].keys())
    if absent:
        raise CheckpointError(f"unusable {folder / MANIFEST}", f"it lists no {absent[0]}", "make the folder again")
    return manifest


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous tensor on the CPU, of any kind."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(dict(values)))


def require_made_by(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], exactly: bool = True) -> None:
    """Refuse tensors that something else made.

    Raises:
        InputError: values differ; each is named with both.
    """
    keys = sorted(found.keys() | wanted.keys() if exactly else wanted.keys())
    differ = [
        f"{key} is {found.get(key)!r}, wanted {wanted.get(key)!r}" for key in keys if found.get(key) != wanted.get(key)
    ]
    if differ:
        raise InputError(
            f"{folder} was made by something else", "; ".join(differ), "use another folder, or make it again"
        )
