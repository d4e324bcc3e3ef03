"""From the geometric expert's hidden states to points, cameras and normals, one view at a time.

Shapes: F views of one grid, P = gh * gw patches, D decoder width, C feature width, H = 14 gh, W = 14 gw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.config import G2VLMConfig, HeadsConfig
from g2vlm.model.layers import DefaultLinear
from g2vlm.model.rope import apply_grid_rotary, grid_rope_table
from geometry import GeometryPrediction, normals_from_points, rigid, rotation_from_9d

NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = DefaultLinear(dim, hidden_dim)
        self.fc2 = DefaultLinear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Self-attention within a view, queries and keys rotated by patch row and column."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = DefaultLinear(dim, 3 * dim)
        self.proj = DefaultLinear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (F, P, D), tables (P, D / heads) -> (F, P, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (F, heads, P, d)
        out = F.scaled_dot_product_attention(apply_grid_rotary(q, cos, sin), apply_grid_rotary(k, cos, sin), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from a view to a context view, both rotated by patch row and column."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = DefaultLinear(dim, dim)
        self.k_proj = DefaultLinear(dim, dim)
        self.v_proj = DefaultLinear(dim, dim)
        self.proj = DefaultLinear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and context (F, P, D), tables (P, D / heads) -> (F, P, D)."""
        q, k, v = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (F, heads, P, d)
            for projection, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        out = F.scaled_dot_product_attention(apply_grid_rotary(q, cos, sin), apply_grid_rotary(k, cos, sin), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class FrameBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(F, P, D) -> (F, P, D)."""
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class ContextBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to a context view, and MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_y = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and context (F, P, D) -> (F, P, D)."""
        x = x + self.attn(self.norm1(x), cos, sin)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(context), cos, sin)
        return x + self.mlp(self.norm3(x))


class FrameDecoder(nn.Module):
    """A stack of frame blocks and a projection to the feature width."""

    def __init__(self, dim: int, output_dim: int, config: HeadsConfig):
        super().__init__()
        self.blocks = nn.ModuleList(FrameBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.output = DefaultLinear(dim, output_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(F, P, D) -> (F, P, C)."""
        return self.output(self.features(x, cos, sin))

    def features(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the projection reads: (F, P, D) -> (F, P, D)."""
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


class ContextDecoder(nn.Module):
    """Like `FrameDecoder`, each block also reading the undecoded tokens of a context view."""

    def __init__(self, dim: int, output_dim: int, config: HeadsConfig):
        super().__init__()
        self.blocks = nn.ModuleList(ContextBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.output = DefaultLinear(dim, output_dim)

    def forward(self, x: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and context (F, P, D) -> (F, P, C)."""
        for block in self.blocks:
            x = block(x, context, cos, sin)
        return self.output(x)


class PixelHead(nn.Module):
    """One linear layer from a patch to its pixels, in float32."""

    def __init__(self, feature_dim: int, channels: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = DefaultLinear(feature_dim, channels * patch_size * patch_size)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """(F, P, C) -> (F, H, W, channels); output c * 196 + y * 14 + x of a patch is channel c of its pixel (y, x)."""
        maps = self.proj(features.to(self.proj.weight.dtype)).float().transpose(1, 2).unflatten(-1, grid)
        return F.pixel_shuffle(maps, self.patch_size).permute(0, 2, 3, 1)


class ResidualMlp(nn.Module):
    """x + relu(L3 relu(L2 relu(L1 x)))."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.ModuleList(DefaultLinear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        branch = x
        for layer in self.layers:
            branch = F.relu(layer(branch))
        return x + branch


class CameraHead(nn.Module):
    """Residual MLPs, mean over the view, MLP, then translation and a 9-D rotation, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.residuals = nn.ModuleList(ResidualMlp(dim) for _ in range(2))
        self.mlp = nn.ModuleList(DefaultLinear(dim, dim) for _ in range(2))
        self.translation = DefaultLinear(dim, 3)
        self.rotation = DefaultLinear(dim, 9)

    def forward(self, features: Tensor) -> Tensor:
        """(F, P, C) -> cam_to_world (F, 4, 4), float32; the world frame is common to a scene and otherwise free."""
        x = features.to(self.translation.weight.dtype)
        for residual in self.residuals:
            x = residual(x)
        x = x.mean(dim=1)  # (F, C)
        for layer in self.mlp:
            x = F.relu(layer(x))
        return rigid(rotation_from_9d(self.rotation(x).float()), self.translation(x).float())


class GeometryHeads(nn.Module):
    """The decoders of local points, camera and (auxiliary) global points, and their output layers."""

    def __init__(self, config: G2VLMConfig):
        super().__init__()
        heads, dim, patch = config.heads, config.decoder.hidden_size, config.geometry_encoder.patch_size
        self.config = heads
        self.rotary_dim = dim // heads.num_heads
        self.point_decoder = FrameDecoder(dim, heads.point_dim, heads)
        self.point_head = PixelHead(heads.point_dim, 3, patch)
        self.camera_decoder = FrameDecoder(dim, heads.camera_dim, heads)
        self.camera_head = CameraHead(heads.camera_dim)
        if heads.normals == "learned":
            self.normal_head = PixelHead(heads.point_dim, 3, patch)
        if heads.global_points:
            self.global_points_decoder = ContextDecoder(dim, heads.point_dim, heads)
            self.global_point_head = PixelHead(heads.point_dim, 3, patch)
        if heads.confidence:
            self.confidence_decoder = FrameDecoder(dim, heads.point_dim, heads)
            self.confidence_head = PixelHead(heads.point_dim, 1, patch)

    def forward(self, hidden: Tensor, grid: tuple[int, int], context: Tensor | None) -> GeometryPrediction:
        """Decode views of one grid.

        Args:
            hidden: (F, P, D) the geometric expert's output.
            grid: rows and columns of patches.
            context: (F, P, D) the first view of each view's scene, to predict global points; None to leave them out.
        """
        cos, sin = grid_rope_table(*grid, self.rotary_dim, self.config.rope_base, device=hidden.device)
        features = self.point_decoder(hidden, cos, sin)
        local_points = _local_points(self.point_head(features, grid))
        confidence = None
        if self.config.confidence:
            confidence = self.confidence_head(self.confidence_decoder(hidden, cos, sin), grid).squeeze(-1)
        return GeometryPrediction(
            local_points=local_points,
            cam_to_world=self.camera_head(self.camera_decoder(hidden, cos, sin)),
            normals=self._normals(features, local_points, grid),
            global_points=None if context is None else self._global_points(hidden, context, cos, sin, grid),
            confidence=confidence,
        )

    def camera_features(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """The camera decoder's features of views of one grid, in the decoder's width: (F, P, D) -> (F, P, D)."""
        cos, sin = grid_rope_table(*grid, self.rotary_dim, self.config.rope_base, device=hidden.device)
        return self.camera_decoder.features(hidden, cos, sin)

    def _normals(self, features: Tensor, local_points: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.config.normals == "learned":
            return F.normalize(self.normal_head(features, grid), dim=-1)
        return normals_from_points(local_points)[0]

    def _global_points(
        self, hidden: Tensor, context: Tensor, cos: Tensor, sin: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        return self.global_point_head(self.global_points_decoder(hidden, context, cos, sin), grid)


def _local_points(raw: Tensor) -> Tensor:
    """(u, v, s) -> (u z, v z, z) with z = exp(s): camera points with positive depth, (..., 3)."""
    z = torch.exp(raw[..., 2:])
    return torch.cat([raw[..., :2] * z, z], dim=-1)
