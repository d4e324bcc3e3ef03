"""Semantic encoder pixels against the released preprocessing and against transformers' PIL processor."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from g2vlm.images import SourceImage, vit_pixels
from tests.parity import golden

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("path", golden.cases("g2vlm_*/inputs.safetensors"))
def test_golden(path: Path):
    stored = load_file(path)
    names = [name.removesuffix(".rgb_u8") for name in stored if name.endswith(".rgb_u8")]
    assert names, f"no image in {path}"
    for name in names:
        values, grid = vit_pixels(SourceImage(stored[f"{name}.rgb_u8"]), "native")
        assert [list(grid)] == stored[f"{name}.grid_thw"].tolist()
        np.testing.assert_allclose(values, stored[f"{name}.pixel_values"], atol=1e-6, rtol=0)


SIZES = [(1, 1), (1, 199), (200, 1), (13, 2600), (27, 29), (14, 14), (42, 70), (480, 640), (1100, 1300), (3000, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (28 * 28 * 4, 28 * 28 * 16)])
def test_transformers_processor(size: tuple[int, int], limits: tuple[int, int]):
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})
    expected = processor(images=[image], return_tensors="np", input_data_format="channels_last")
    values, grid = vit_pixels(SourceImage(image), "native", *limits)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(values, expected["pixel_values"], atol=1e-6, rtol=0)
