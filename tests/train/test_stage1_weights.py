"""The weights that stage 2 starts from: the geometry of the demo weights, and a card."""

import torch
from safetensors.torch import load_file

from benchmarks.ablations import ROOT
from g2vlm.checkpoint import DEMO_WEIGHTS, read_config

STAGE1 = ROOT / "train/weights/stage1"


def test_they_are_small_and_described() -> None:
    assert {path.name for path in STAGE1.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in STAGE1.iterdir()) <= 12e6
    assert read_config(STAGE1).view_width == read_config(DEMO_WEIGHTS).view_width


def test_their_geometry_is_that_of_the_demo_weights() -> None:
    """What stage 2 has not trained, `g2vlm recon` uses too."""
    start, demo = (load_file(folder / "model.safetensors") for folder in (STAGE1, DEMO_WEIGHTS))
    geometry = [name for name in start if name.startswith(("geometry_encoder.", "heads.")) or ".geometric" in name]
    assert len(geometry) > 150
    assert all(torch.equal(start[name], demo[name]) for name in geometry)
