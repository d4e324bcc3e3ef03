"""Folders that appear complete or not at all, and what to tell a user when writing fails."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from g2vlm.errors import InputError, ResourceError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
REPLACEABLE = (".safetensors", ".json", ".txt", ".jinja", ".md")
"""What a checkpoint folder holds; a folder with anything else is never replaced."""


@contextmanager
def staged_folder(destination: Path, overwrite: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends, and vanishes when it fails.

    Args:
        destination: the folder to make.
        overwrite: replace a folder that is not empty, if it holds nothing but checkpoint files.
        num_bytes: how much will be written.

    Raises:
        InputError: the destination is taken, or cannot be written.
        ResourceError: the disk is too small.
    """
    _check_destination(destination, overwrite)
    staging = destination.parent / f".{destination.name}.{os.getpid()}.partial"
    try:
        with write_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            _check_space(destination.parent, num_bytes)
            staging.mkdir()
            yield staging
            _put(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as an error that a user can act on.

    Raises:
        ResourceError: the disk is full.
        InputError: it cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if _error_number(error) in DISK_FULL:
            raise ResourceError(f"disk full while writing {path}", why, "free some space") from None
        raise InputError(f"cannot write {path}", why, "choose another folder") from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """safetensors tells the system's error in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise InputError(f"{destination} is not a folder", "a file or a link has this name", "choose another name")
    entries = list(destination.iterdir()) if destination.is_dir() else []
    if entries and not overwrite:
        raise InputError(f"{destination} is not empty", "nothing is overwritten unasked", "pass --overwrite")
    others = sorted(entry.name for entry in entries if entry.is_dir() or entry.suffix not in REPLACEABLE)
    if others:
        raise InputError(
            f"{destination} is not only a checkpoint", f"it holds {', '.join(others[:5])}", "choose another folder"
        )


def _check_space(parent: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise ResourceError(
            f"not enough disk space in {parent}",
            f"{num_bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
            "free some space, or store in bfloat16",
        )


def _put(staging: Path, destination: Path) -> None:
    if not destination.exists():
        staging.rename(destination)
        return
    old = staging.with_suffix(".old")
    destination.rename(old)
    staging.rename(destination)
    shutil.rmtree(old)
