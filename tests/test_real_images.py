"""Reconstruction of real photographs with random weights: no error, finite numbers, readable files.

The photographs are not in the repository; the tests skip where the folder is absent.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.images import SUFFIXES, list_images
from g2vlm.pipeline import Pipeline, load
from g2vlm.scene import Scene

DATA = Path(os.environ.get("G2VLM_REAL_IMAGES") or Path(__file__).resolve().parents[2] / "shared" / "data")
FOLDERS = sorted({path.parent for path in DATA.rglob("*") if path.suffix.lower() in SUFFIXES}) if DATA.is_dir() else []
WIDTH = 70

pytestmark = pytest.mark.skipif(not FOLDERS, reason=f"no photographs in {DATA}")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny", device="cpu", dtype=torch.float32)


def check(scene: Scene, num_views: int) -> None:
    assert scene.num_views == num_views
    assert (scene.depth > 0).all()
    assert np.isfinite(scene.world_points).all()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(DATA).as_posix())
def test_every_folder(folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    num_views = min(len(list_images(folder)), 24)
    scene = pipeline.reconstruct(folder, width=WIDTH, max_views=24)
    check(scene, num_views)
    written = scene.export(tmp_path / "out")
    assert all(path.stat().st_size > 0 for path in written)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in list_images(FOLDERS[0])[:4]]


def test_one_view(photos: list[Image.Image], pipeline: Pipeline) -> None:
    check(pipeline.reconstruct(photos[0], width=WIDTH), 1)


def test_24_views(photos: list[Image.Image], pipeline: Pipeline) -> None:
    check(pipeline.reconstruct((photos * 24)[:24], width=WIDTH), 24)


def test_portrait_and_halved(photos: list[Image.Image], pipeline: Pipeline) -> None:
    portrait = [photo.transpose(Image.Transpose.ROTATE_90) for photo in photos]
    scene = pipeline.reconstruct(portrait, width=WIDTH)
    assert scene.resized_to[0] > scene.resized_to[1]
    halved = [photo.resize((photo.width // 2, photo.height // 2)) for photo in photos]
    check(pipeline.reconstruct(halved, width=WIDTH), len(photos))


def test_rgba_files(photos: list[Image.Image], pipeline: Pipeline, tmp_path: Path) -> None:
    for index, photo in enumerate(photos):
        rgba = photo.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(photo.size))
        rgba.save(tmp_path / f"{index}.png")
    check(pipeline.reconstruct(tmp_path, width=WIDTH), len(photos))
