"""The encoders against slow references: attention windows, position table, patch order of the single encoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm import compat
from g2vlm.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, GeometryEncoderConfig, SemanticEncoderConfig
from g2vlm.encoders.dinov2 import DinoV2
from g2vlm.encoders.shared_tower import SharedTower

DINO = GeometryEncoderConfig(hidden_size=24, num_layers=2, num_heads=2, image_size=42, num_registers=3)
TOWER = SemanticEncoderConfig(hidden_size=32, num_layers=2, num_heads=2)


def random_dino(**changes) -> DinoV2:
    encoder = DinoV2(replace(DINO, **changes)).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def slow_attention(attention, x: Tensor, windows: list[tuple[int, int]]) -> Tensor:
    """Softmax attention of a flat token list (T, D) inside each window; tokens outside every window get zero."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    out = torch.zeros_like(q)
    for start, stop in windows:
        for head in range(attention.num_heads):
            logits = q[start:stop, head] @ k[start:stop, head].T * attention.scale
            out[start:stop, head] = logits.softmax(-1) @ v[start:stop, head]
    return attention.proj(out.flatten(1))


@pytest.mark.parametrize("mode", ["official", "per_image"])
@pytest.mark.parametrize(("num_views", "size"), [(1, (42, 42)), (3, (28, 56)), (4, (14, 14))])
def test_windows(mode: str, num_views: int, size: tuple[int, int]) -> None:
    encoder = random_dino(windows=mode)
    images = torch.randn(num_views, 3, *size, dtype=torch.float64)
    num_patches, extra = size[0] * size[1] // 14**2, 1 + DINO.num_registers
    length = num_patches if mode == "official" else num_patches + extra
    windows = [(i * length, (i + 1) * length) for i in range(num_views)]
    x = encoder.embed(images).flatten(0, 1)
    for block in encoder.blocks:
        x = x + block.ls1(slow_attention(block.attn, block.norm1(x), windows))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    expected = encoder.norm(x).unflatten(0, (num_views, -1))[:, extra:]
    torch.testing.assert_close(encoder(images), expected)


def test_per_image_windows_keep_images_apart() -> None:
    encoder = random_dino(windows="per_image")
    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone)


def test_position_table_is_used_as_it_is_only_at_its_own_size() -> None:
    encoder = random_dino()
    assert encoder.positions((3, 3)) is encoder.position_embeddings
    resized = encoder.positions((2, 5))
    assert resized.shape == (1, 11, 24)
    torch.testing.assert_close(resized[:, 0], encoder.position_embeddings[:, 0])
    patches = encoder.position_embeddings[0, 1:].float().view(3, 3, 24).permute(2, 0, 1)[None]
    expected = F.interpolate(patches, size=(2, 5), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(resized[0, 1:], expected.double())


def test_registers_carry_no_position() -> None:
    encoder = random_dino()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(encoder.embed(images)[:, 1:4], encoder.register_tokens.expand(2, -1, -1))


def test_single_encoder_gives_row_major_patches_of_each_view() -> None:
    """Changing one patch of one view must change most the feature at that patch's row-major place."""
    tower = compat.build_vision_tower(replace(TOWER, num_layers=0), output_dim=16).double()
    encoder = SharedTower(replace(TOWER, num_layers=0), tower)
    images = torch.randn(2, 3, 56, 84, dtype=torch.float64)
    changed = images.clone()
    row, column = 2, 3
    changed[1, :, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] += 1
    difference = (encoder(changed) - encoder(images)).abs().sum(-1)  # (S, P)
    assert difference.nonzero().tolist() == [[1, row * 6 + column]]


def test_single_encoder_sees_clip_normalised_pixels() -> None:
    tower = compat.build_vision_tower(TOWER, output_dim=16)
    encoder = SharedTower(TOWER, tower)
    image = torch.rand(1, 3, 28, 28)
    imagenet, clip = (
        (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD))
    )
    patches = clip.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(4, 3, 1, 14, 14)
    pixel_values = patches.expand(-1, -1, 2, -1, -1).reshape(4, -1)  # one merge block: row-major already
    expected = compat.run_vision_tower(tower, pixel_values, torch.tensor([[1, 2, 2]])).patches
    torch.testing.assert_close(encoder(imagenet)[0], expected, rtol=1e-4, atol=1e-5)


def test_single_encoder_refuses_odd_grids() -> None:
    encoder = SharedTower(TOWER, compat.build_vision_tower(TOWER, output_dim=16))
    with pytest.raises(ValueError, match="multiples of 28"):
        encoder(torch.zeros(1, 3, 42, 28))


def test_single_encoder_owns_no_parameters() -> None:
    assert not list(SharedTower(TOWER, compat.build_vision_tower(TOWER, output_dim=16)).parameters())
