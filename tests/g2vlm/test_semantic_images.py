"""The two rules of image size, and where each pixel lands. Values against the released ones: tests/parity."""

import numpy as np
import pytest
from PIL import Image

from g2vlm.errors import InputError
from g2vlm.semantic_images import SemanticRule, semantic_grid, semantic_pixels

OFFICIAL, NATIVE = SemanticRule.official(), SemanticRule.native()


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_official_ignores_the_aspect_ratio() -> None:
    image = picture(30, 500)
    values, grids = semantic_pixels([image], OFFICIAL)
    assert (values.shape, values.dtype, grids.tolist()) == ((2916, 1176), np.float32, [[1, 54, 54]])
    squashed = np.asarray(Image.fromarray(image).resize((768, 768), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(values, semantic_pixels([squashed], NATIVE)[0])


def test_native_keeps_the_aspect_ratio_within_the_limits() -> None:
    assert semantic_grid((480, 640), NATIVE) == (34, 46)  # 476 x 644
    assert semantic_grid((480, 640), SemanticRule.native(max_pixels=112 * 112)) == (6, 8)  # 84 x 112
    assert semantic_grid((30, 20), SemanticRule.native(min_pixels=112 * 112)) == (10, 8)  # 140 x 112


def test_official_takes_the_limits_of_a_checkpoint() -> None:
    rule = SemanticRule.official(max_pixels=230 * 230)
    assert semantic_grid((90, 500), rule) == (16, 16)
    assert semantic_pixels([picture(90, 500)], rule)[1].tolist() == [[1, 16, 16]]


def test_images_come_one_after_the_other() -> None:
    images = [picture(60, 90), picture(90, 60), picture(30, 30)]
    values, grids = semantic_pixels(images, NATIVE)
    apart = [semantic_pixels([image], NATIVE) for image in images]
    np.testing.assert_array_equal(values, np.concatenate([one[0] for one in apart]))
    np.testing.assert_array_equal(grids, np.concatenate([one[1] for one in apart]))
    assert [(1, *semantic_grid(image.shape[:2], NATIVE)) for image in images] == [tuple(grid) for grid in grids]
    assert [part.shape for part in semantic_pixels([], NATIVE)] == [(0, 1176), (0, 3)]


def test_patch_layout() -> None:
    """Mark one pixel and look for it: (channel, time, row, col) within the patch, merge blocks row-major."""
    pixels = np.zeros((56, 84, 3), np.uint8)
    pixels[28 + 14 + 3, 56 + 5, 1] = 255  # block (1, 2), patch (1, 0) of the block, pixel (3, 5), channel 1
    values, grids = semantic_pixels([pixels], NATIVE)
    assert grids.tolist() == [[1, 4, 6]]
    values = values.reshape(2, 3, 2, 2, 3, 2, 14, 14)  # (block row, block col, row, col, channel, time, y, x)
    found = np.argwhere(values > values[0, 0, 0, 0, :, 0, 0, 0].max()).tolist()
    assert found == [[1, 2, 1, 0, 1, time, 3, 5] for time in (0, 1)]


def test_native_refuses_a_strip() -> None:
    with pytest.raises(InputError, match="200:1"):
        semantic_pixels([picture(2, 401)], NATIVE)
    assert semantic_grid((2, 401), OFFICIAL) == (54, 54)


@pytest.mark.parametrize("values", [(0,), (None, 0), (None, 56 * 56, 28 * 27), (None, 4000, 3999), (None, 1.5)])
def test_rules_that_no_image_can_follow(values: tuple) -> None:
    with pytest.raises(InputError, match="unusable rule"):
        SemanticRule(*values)
