"""Outputs only: reconstruct folders of photographs, which have no ground truth to score against."""

import logging
from dataclasses import dataclass
from pathlib import Path

from eval.evaluate import Skipped
from eval.protocols import Protocol
from g2vlm.errors import CheckFailed, InputError
from g2vlm.images import SUFFIXES
from g2vlm.pipeline import Pipeline, read_sources

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

    Raises:
        CheckFailed: nothing could be reconstructed.
    """
    done, skipped = [], []
    for folder in folders:
        try:
            done.append(_reconstruct(folder, pipeline, protocol, output))
        except (InputError, CheckFailed) as error:
            reason = " ".join(str(error).split())
            log.warning("skipped %s: %s", folder.name, reason)
            skipped.append(Skipped(folder.name, reason))
    if not done:
        raise CheckFailed("nothing could be reconstructed", f"{skipped[0].item}: {skipped[0].reason}", "")
    return done, skipped


def _reconstruct(folder: Path, pipeline: Pipeline, protocol: Protocol, output: Path) -> Reconstructed:
    name = folder.resolve().name
    sources = read_sources([folder], protocol.views.count, skip_bad=True)
    scene = pipeline.reconstruct_sources(sources, protocol.width)
    scene.export(output / name)
    return Reconstructed(name, name, scene.num_views, *scene.resized_to)
