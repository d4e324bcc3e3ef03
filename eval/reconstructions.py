"""Outputs only: reconstruct folders of photographs, which have no ground truth to score against."""

import logging
from dataclasses import dataclass
from pathlib import Path

from eval.evaluate import Skipped
from eval.protocols import Protocol
from g2vlm.errors import CheckFailed, InputError
from g2vlm.images import SUFFIXES, list_images, read_images
from g2vlm.pipeline import Pipeline, evenly_chosen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconstructed:
    """A scene that was reconstructed, with the folder of its files relative to the output folder."""

    item: str
    folder: str
    num_views: int
    height: int
    width: int


def photo_folders(root: Path) -> list[Path]:
    """The folder itself when it holds images, else its subfolders that do, in order of their names.

    Raises:
        InputError: there is no image in either.
    """
    if _has_images(root):
        return [root]
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _has_images(folder)]
    if not folders:
        raise InputError(f"no images in  {root}", "nor in its subfolders", f"known suffixes: {', '.join(SUFFIXES)}")
    return folders


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir() if path.is_file())


def reconstruct_folders(
    folders: list[Path], pipeline: Pipeline, protocol: Protocol, output: Path
) -> tuple[list[Reconstructed], list[Skipped]]:
    """Reconstruct each folder as one scene and write what `g2vlm recon` writes into `output`/NAME.

    Returns:
        The scenes; and what was left out: whole folders, and single images that cannot be read.
    """
    done, skipped = [], []
    for folder in folders:
        try:
            scene, bad_images = _reconstruct(folder, pipeline, protocol, output)
        except (InputError, CheckFailed) as error:
            reason = " ".join(str(error).split())
            log.warning("skipped %s: %s", folder.name, reason)
            skipped.append(Skipped(folder.name, reason))
        else:
            done.append(scene)
            skipped += bad_images
    return done, skipped


def _reconstruct(
    folder: Path, pipeline: Pipeline, protocol: Protocol, output: Path
) -> tuple[Reconstructed, list[Skipped]]:
    name = folder.resolve().name
    sources, errors = read_images(evenly_chosen(list_images([folder]), protocol.views.count), skip_bad=True)
    scene = pipeline.reconstruct_sources(sources, protocol.width)
    scene.export(output / name)
    bad = [Skipped(f"{name}, one image", f"{error.what}: {error.why}") for error in errors]
    return Reconstructed(name, name, scene.num_views, *scene.resized_to), bad
