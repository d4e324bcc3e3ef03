"""The geometry encoder: DINOv2 with a class token and registers, built from timm's blocks.

Shapes: S views, R registers, P = gh * gw patches, D width; a view has 1 + R + P tokens.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed  # pyright: ignore[reportPrivateImportUsage]
from timm.models.vision_transformer import Attention, Block  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from g2vlm.config import GeometryEncoderConfig, Windows


class DinoV2(nn.Module):
    """DINOv2 whose position table keeps its class-token row, as the public and the released weights store it.

    `mask_token` belongs to the weights' layout and takes no part in the computation. `windows` is the attention rule
    and may be changed at any time.
    """

    def __init__(self, config: GeometryEncoderConfig):
        super().__init__()
        self.config = config
        self.windows: Windows = config.windows
        dim, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(None, config.patch_size, embed_dim=dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads,
                config.mlp_ratio,
                qkv_bias=True,
                init_values=config.layer_scale,
                norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),  # pyright: ignore[reportArgumentType]
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    @property
    def keeps_images_apart(self) -> bool:
        """Whether no image's features depend on the images beside it, so that scenes may share a call."""
        return self.windows == "per_image"

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (S, 3, H, W) of one scene, sides multiples of the patch -> patch features (S, P, D)."""
        x = self.embed(images)
        attention = _ATTENTION[self.windows]
        for block in self.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.attn, Attention)
            x = x + block.ls1(attention(block.attn, block.norm1(x), self.config.num_registers))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.norm(x)[:, 1 + self.config.num_registers :]

    def embed(self, images: Tensor) -> Tensor:
        """(S, 3, H, W) -> class, register and patch tokens (S, 1 + R + P, D); registers carry no position."""
        num_views = images.shape[0]
        grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        patches = self.patch_embed(images.to(self.cls_token.dtype))  # (S, P, D)
        table = self.positions(grid)  # (1, 1 + P, D)
        cls = (self.cls_token + table[:, :1]).expand(num_views, -1, -1)
        registers = self.register_tokens.expand(num_views, -1, -1)
        return torch.cat([cls, registers, patches + table[:, 1:]], dim=1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table resized to a (gh, gw) grid in float32, bicubic with antialias: (1, 1 + gh * gw, D)."""
        table = self.position_embeddings
        side = self.config.image_size // self.config.patch_size
        if grid == (side, side):
            return table
        patches = table[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _per_image_attention(attention: Attention, x: Tensor, num_registers: int) -> Tensor:
    """Each image attends within itself: (S, 1 + R + P, D) -> same."""
    return attention(x)


def _official_attention(attention: Attention, x: Tensor, num_registers: int) -> Tensor:
    """The released code's windows: P tokens each over the flat list of S * (1 + R + P) tokens.

    The last S * (1 + R) tokens lie in no window. The released kernel never writes their output; here it is zero before
    the output projection, hence the projection's bias after it.
    """
    num_views, num_tokens, dim = x.shape
    num_patches = num_tokens - 1 - num_registers
    flat = x.flatten(0, 1)
    inside = attention(flat[: num_views * num_patches].unflatten(0, (num_views, num_patches))).flatten(0, 1)
    outside = attention.proj.bias.expand(num_views * (1 + num_registers), dim)
    return torch.cat([inside, outside.to(inside.dtype)]).unflatten(0, (num_views, num_tokens))


_ATTENTION = {"per_image": _per_image_attention, "official": _official_attention}
