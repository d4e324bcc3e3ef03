"""The weights that stage 2 starts from: the geometry of the demo weights, and a card."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from g2vlm.checkpoint import DEMO_WEIGHTS, read_config

STAGE1 = Path(__file__).parents[2] / "train/weights/stage1"
GEOMETRY = ("geometry_encoder.", "geometry_projection.", "heads.")


def test_they_are_small_and_described() -> None:
    assert {path.name for path in STAGE1.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in STAGE1.iterdir()) <= 12e6
    assert read_config(STAGE1).view_width == read_config(DEMO_WEIGHTS).view_width


def test_their_geometry_is_that_of_the_demo_weights() -> None:
    """What stage 2 has not trained, `g2vlm recon` uses too."""
    start, demo = (load_file(folder / "model.safetensors") for folder in (STAGE1, DEMO_WEIGHTS))
    geometry = [name for name in start if name.startswith(GEOMETRY) or ".geometric" in name]
    assert {name.split(".")[0] for name in geometry} == {"geometry_encoder", "geometry_projection", "heads", "decoder"}
    assert all(torch.equal(start[name], demo[name]) for name in geometry)
