"""Semantic encoder pixels against the released preprocessing and against transformers' PIL processor."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from g2vlm.semantic_images import SemanticRule, semantic_pixels
from tests.parity import golden

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("path", golden.cases("g2vlm_*/inputs.safetensors"))
def test_golden(path: Path):
    stored = load_file(path)
    names = [name.removesuffix(".rgb_u8") for name in stored if name.endswith(".rgb_u8")]
    assert names, f"no image in {path}"
    values, grids = semantic_pixels([stored[f"{name}.rgb_u8"] for name in names], SemanticRule.native())
    np.testing.assert_array_equal(grids, np.concatenate([stored[f"{name}.grid_thw"] for name in names]))
    expected = np.concatenate([stored[f"{name}.pixel_values"] for name in names])
    np.testing.assert_allclose(values, expected, atol=1e-6, rtol=0)


SIZES = [(1, 1), (1, 199), (200, 1), (13, 2600), (27, 29), (14, 14), (42, 70), (480, 640), (1100, 1300), (3000, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (28 * 28 * 4, 28 * 28 * 16)])
def test_transformers_processor(size: tuple[int, int], limits: tuple[int, int]):
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})
    expected = processor(images=[image], return_tensors="np", input_data_format="channels_last")
    values, grids = semantic_pixels([image], SemanticRule.native(*limits))
    assert grids.tolist() == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(values, expected["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_squashed_as_released(size: tuple[int, int]):
    """The released transform: PIL's bicubic resize to 768 x 768, then the Qwen2-VL processor."""
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    squashed = Image.fromarray(image).resize((768, 768), Image.Resampling.BICUBIC)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    expected = processor(images=[squashed], return_tensors="np")
    values, grids = semantic_pixels([image], SemanticRule.official())
    assert grids.tolist() == expected["image_grid_thw"].tolist() == [[1, 54, 54]]
    np.testing.assert_allclose(values, expected["pixel_values"], atol=1e-6, rtol=0)
