"""Dense heads: from the token maps of four decoder layers to a map of values per pixel (GeoVR 3.4 and Table 5).

Three heads with one `forward`: `DenseHead` (DPT body, pixel shuffle), `DPTHead` (DPT body, convolutions) and `MLPHead`.
Activations, and everything after the output layer, are float32 whatever the weights are.

Shapes: ... any batch, F maps of the flattened batch, h w student tokens, d their width, C channels, H W output pixels,
p pixels per side of an output patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.supervision.activations import Activation, one_plus_exp

DepthHeadKind = Literal["dense", "dpt", "mlp"]
NUM_LEVELS = 4
UV_SCALE = 0.1
FREQUENCY_BASE = 100.0
INITIAL_CONFIDENCE = 1.05


@dataclass(frozen=True, eq=False)
class DensePrediction:
    """What a dense head predicts.

    Attributes:
        values: (..., H, W, C) float32, activated.
        confidence: (..., H, W) float32, above 1; None without a confidence output.
    """

    values: Tensor
    confidence: Tensor | None


@dataclass(frozen=True)
class DPTWidths:
    """Channels of the DPT body: of each level before the fusion, and of the fused map."""

    levels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    fused: int = 256


DEFAULT_WIDTHS = DPTWidths()


def uv_grid(height: int, width: int, aspect: float, device: torch.device | None = None) -> Tensor:
    """Positions of cell centres on a rectangle of unit half-diagonal with sides in the ratio `aspect` = width : height.

    Returns:
        (height, width, 2) float32: u grows to the right, v downwards, both zero at the centre.
    """
    half_diagonal = math.hypot(aspect, 1.0)
    u = _centres(width, device) * (aspect / half_diagonal)
    v = _centres(height, device) * (1.0 / half_diagonal)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def _centres(count: int, device: torch.device | None) -> Tensor:
    """Centres of `count` equal cells of [-1, 1]: (count,)."""
    return (2 * torch.arange(count, dtype=torch.float32, device=device) + 1 - count) / count


def uv_embedding(grid: Tensor, dim: int) -> Tensor:
    """Sine and cosine of every position at dim / 4 frequencies 100^(-4 k / dim).

    Args:
        grid: (height, width, 2) float32.
        dim: a multiple of 4.

    Returns:
        (height, width, dim): [sin u | cos u | sin v | cos v].
    """
    if dim % 4:
        raise ValueError(f"dim: given {dim}, must be a multiple of 4 to hold sine and cosine of two coordinates")
    exponents = torch.arange(dim // 4, dtype=torch.float32, device=grid.device) / (dim // 4)
    angles = grid[..., None] * FREQUENCY_BASE**-exponents  # (height, width, 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def add_uv_embedding(maps: Tensor, aspect: float) -> Tensor:
    """Maps (F, C, height, width) plus 0.1 times the embedding of their cells' positions."""
    channels, height, width = maps.shape[1:]
    embedding = uv_embedding(uv_grid(height, width, aspect, maps.device), channels).permute(2, 0, 1)
    return maps + UV_SCALE * embedding.to(maps.dtype)


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of `size` = (H, W).

    Raises:
        ValueError: a side is not a multiple of the patch size.
    """
    if size[0] % patch_size or size[1] % patch_size:
        raise ValueError(f"size: given {size}, both sides must be multiples of the patch size {patch_size}")
    return size[0] // patch_size, size[1] // patch_size


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation of (F, C, h, w) to `size` = (height, width), corner pixels staying where they are."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(F, C, h, w) -> (F, C, h, w)."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """One step from coarse to fine: add the refined level, refine, resize, mix channels (RefineNet)."""

    def __init__(self, dim: int, lateral: bool):
        super().__init__()
        self.lateral = ResidualUnit(dim) if lateral else None
        self.refine = ResidualUnit(dim)
        self.output = nn.Conv2d(dim, dim, 1)

    def forward(self, coarse: Tensor, level: Tensor | None, size: Sequence[int]) -> Tensor:
        """The map so far (F, C, h, w) and the level of the same size -> (F, C, *size)."""
        if self.lateral is not None:
            assert level is not None
            coarse = coarse + self.lateral(level)
        return self.output(resize(self.refine(coarse), size))


class DPTBody(nn.Module):
    """Token maps of four layers, shallow to deep, fused into one map of four times their grid (DPT).

    1. one LayerNorm for all layers, a 1x1 convolution per layer, plus the UV embedding;
    2. levels of 4, 2, 1 and 1/2 times the token grid;
    3. a 3x3 convolution per level to the fused width;
    4. fusion from the coarsest level to the finest; the finest is not enlarged again.
    """

    def __init__(self, hidden_size: int, widths: DPTWidths):
        super().__init__()
        finest, fine, _, coarsest = widths.levels
        self.norm = nn.LayerNorm(hidden_size)
        self.projects = nn.ModuleList(nn.Conv2d(hidden_size, dim, 1) for dim in widths.levels)
        self.resizes = nn.ModuleList([
            nn.ConvTranspose2d(finest, finest, 4, stride=4),
            nn.ConvTranspose2d(fine, fine, 2, stride=2),
            nn.Identity(),
            nn.Conv2d(coarsest, coarsest, 3, stride=2, padding=1),
        ])  # fmt: skip
        self.levels = nn.ModuleList(nn.Conv2d(dim, widths.fused, 3, padding=1, bias=False) for dim in widths.levels)
        self.fusions = nn.ModuleList(
            Fusion(widths.fused, lateral=level < NUM_LEVELS - 1) for level in range(NUM_LEVELS)
        )

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """Four maps (F, h, w, d), shallow to deep -> (F, fused width, 4 h, 4 w)."""
        levels = [self._level(index, tokens) for index, tokens in enumerate(layers)]  # finest first
        sizes = [level.shape[-2:] for level in levels]
        fused = self.fusions[-1](levels[-1], None, sizes[-2])
        for index in range(NUM_LEVELS - 2, -1, -1):
            fused = self.fusions[index](fused, levels[index], sizes[max(index - 1, 0)])
        return fused

    def _level(self, index: int, tokens: Tensor) -> Tensor:
        """(F, h, w, d) -> (F, fused width, height of the level, width of the level)."""
        height, width = tokens.shape[1:3]
        maps = self.norm(tokens.to(self.norm.weight.dtype)).permute(0, 3, 1, 2)  # (F, d, h, w)
        maps = add_uv_embedding(self.projects[index](maps), width / height)
        return self.levels[index](self.resizes[index](maps))


def _confidence_layer(input_dim: int, output_dim: int) -> nn.Conv2d:
    """A 1x1 convolution whose first confidence 1 + exp(output) is 1.05 everywhere."""
    layer = nn.Conv2d(input_dim, output_dim, 1)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, math.log(INITIAL_CONFIDENCE - 1))  # pyright: ignore[reportArgumentType]
    return layer


class PixelShuffleTail(nn.Module):
    """The fused map at 4 x 4 cells per output patch, then one linear layer from a cell to its pixels (GeoVR)."""

    def __init__(self, input_dim: int, patch_size: int, channels: int, confidence: bool):
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"patch_size: given {patch_size}, must be a multiple of 4")
        self.patch_size = patch_size
        self.cell = patch_size // 4
        self.values = nn.Conv2d(input_dim, channels * self.cell**2, 1)
        self.confidence = _confidence_layer(input_dim, self.cell**2) if confidence else None

    def forward(self, fused: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(F, D, 4 h, 4 w) -> values (F, C, H, W) and confidence (F, 1, H, W), before activation, float32.

        Raises:
            ValueError: a side of `size` is not a multiple of the patch size.
        """
        rows, columns = patch_grid(size, self.patch_size)
        cells = add_uv_embedding(resize(fused, (4 * rows, 4 * columns)), size[1] / size[0])
        values = F.pixel_shuffle(self.values(cells).float(), self.cell)
        if self.confidence is None:
            return values, None
        return values, F.pixel_shuffle(self.confidence(cells).float(), self.cell)


class ConvTail(nn.Module):
    """DPT's output convolutions: 3x3 to half the width, resize, 3x3 to 32 channels, ReLU, 1x1."""

    def __init__(self, input_dim: int, channels: int, confidence: bool, inner_dim: int = 32):
        super().__init__()
        self.reduce = nn.Conv2d(input_dim, input_dim // 2, 3, padding=1)
        self.mix = nn.Conv2d(input_dim // 2, inner_dim, 3, padding=1)
        self.values = nn.Conv2d(inner_dim, channels, 1)
        self.confidence = _confidence_layer(inner_dim, 1) if confidence else None

    def forward(self, fused: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(F, D, 4 h, 4 w) -> values (F, C, H, W) and confidence (F, 1, H, W), before activation, float32."""
        maps = add_uv_embedding(resize(self.reduce(fused), size), size[1] / size[0])
        maps = F.relu(self.mix(maps))
        return self.values(maps).float(), None if self.confidence is None else self.confidence(maps).float()


class DPT(nn.Module):
    """A body that fuses four layers and a tail that turns the fused map into values."""

    def __init__(self, body: DPTBody, tail: PixelShuffleTail | ConvTail, activation: Activation):
        super().__init__()
        self.body = body
        self.tail = tail
        self.activation = activation

    def forward(self, layers: Sequence[Tensor], size: tuple[int, int]) -> DensePrediction:
        """Values for every pixel.

        Args:
            layers: four token maps (..., h, w, d), shallow to deep, of any floating dtype.
            size: (H, W) of the result.

        Raises:
            ValueError: other than four layers, layers of different shapes, or a size that the tail cannot give.
        """
        maps, batch = flatten_layers(layers)
        values, confidence = self.tail(self.body(maps), size)
        return _prediction(values, confidence, self.activation, batch)


class DenseHead(DPT):
    """DPT body and pixel shuffle, for sizes in multiples of the patch: GeoVR's published head.

    Args:
        hidden_size: d.
        patch_size: p, the pixels per side of an output patch: 28 for VGGT and DA3, 32 for VGGT-Omega.
        channels: C.
        activation: of the values.
        confidence: whether to predict one.
        widths: of the body.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        *,
        channels: int = 1,
        activation: Activation = torch.exp,
        confidence: bool = False,
        widths: DPTWidths = DEFAULT_WIDTHS,
    ):
        tail = PixelShuffleTail(widths.fused, patch_size, channels, confidence)
        super().__init__(DPTBody(hidden_size, widths), tail, activation)


class DPTHead(DPT):
    """DPT body and DPT's output convolutions, for any size; arguments as `DenseHead` has them."""

    def __init__(
        self,
        hidden_size: int,
        *,
        channels: int = 1,
        activation: Activation = torch.exp,
        confidence: bool = False,
        widths: DPTWidths = DEFAULT_WIDTHS,
    ):
        super().__init__(DPTBody(hidden_size, widths), ConvTail(widths.fused, channels, confidence), activation)


class MLPHead(nn.Module):
    """A three-layer MLP on the tokens, whose last layer gives the pixels of a patch; arguments as `DenseHead` has them.

    The first layer has one matrix per decoder layer, side by side; the tokens are resized to the output's patches
    before the last layer. GeoVR states only "a 3-layer MLP" of 13.6 M parameters; these widths have that count with
    d = 2048 and p = 32.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        *,
        channels: int = 1,
        activation: Activation = torch.exp,
        confidence: bool = False,
        inner_dim: int = 1024,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.activation = activation
        self.norm = nn.LayerNorm(hidden_size)
        self.inputs = nn.ModuleList(nn.Linear(hidden_size, inner_dim) for _ in range(NUM_LEVELS))
        self.inner = nn.Linear(NUM_LEVELS * inner_dim, inner_dim)
        self.values = nn.Conv2d(inner_dim, channels * patch_size**2, 1)
        self.confidence = _confidence_layer(inner_dim, patch_size**2) if confidence else None

    def forward(self, layers: Sequence[Tensor], size: tuple[int, int]) -> DensePrediction:
        """As `DPT.forward`; both sides of `size` must be multiples of the patch size."""
        maps, batch = flatten_layers(layers)
        tokens = [self.norm(tokens.to(self.norm.weight.dtype)) for tokens in maps]
        inputs = torch.cat([linear(part) for linear, part in zip(self.inputs, tokens, strict=True)], dim=-1)
        inner = F.gelu(self.inner(F.gelu(inputs))).permute(0, 3, 1, 2)  # (F, D, h, w)
        patches = F.interpolate(inner, size=patch_grid(size, self.patch_size), mode="bilinear", align_corners=False)
        values = F.pixel_shuffle(self.values(patches).float(), self.patch_size)
        confidence = None
        if self.confidence is not None:
            confidence = F.pixel_shuffle(self.confidence(patches).float(), self.patch_size)
        return _prediction(values, confidence, self.activation, batch)


def depth_head(
    kind: DepthHeadKind,
    hidden_size: int,
    patch_size: int,
    *,
    confidence: bool,
    widths: DPTWidths = DEFAULT_WIDTHS,
    mlp_dim: int = 1024,
) -> DPT | MLPHead:
    """One of the three depth heads of GeoVR's Table 5.

    Args:
        kind: which.
        hidden_size: d.
        patch_size: p, without effect on `dpt`.
        confidence: whether to predict one.
        widths: of `dense` and `dpt`.
        mlp_dim: inner width of `mlp`.

    Raises:
        ValueError: no such kind.
    """
    if kind == "dense":
        return DenseHead(hidden_size, patch_size, confidence=confidence, widths=widths)
    if kind == "dpt":
        return DPTHead(hidden_size, confidence=confidence, widths=widths)
    if kind == "mlp":
        return MLPHead(hidden_size, patch_size, confidence=confidence, inner_dim=mlp_dim)
    raise ValueError(f"depth head: given {kind!r}, must be one of {', '.join(get_args(DepthHeadKind))}")


def flatten_layers(layers: Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
    """Four maps (..., h, w, d) as (F, h, w, d), and their batch shape.

    Raises:
        ValueError: other than four layers, or layers of different shapes.
    """
    shapes = [tuple(layer.shape) for layer in layers]
    if len(shapes) != NUM_LEVELS or len(set(shapes)) != 1:
        raise ValueError(f"layers: given shapes {shapes}, expected {NUM_LEVELS} equal shapes (..., h, w, d)")
    return [layer.reshape(-1, *layer.shape[-3:]) for layer in layers], layers[0].shape[:-3]


def _prediction(
    values: Tensor, confidence: Tensor | None, activation: Activation, batch: torch.Size
) -> DensePrediction:
    """Activate values (F, C, H, W) and confidence (F, 1, H, W), channels last, in the batch shape."""
    values = activation(values.permute(0, 2, 3, 1))
    values = values.reshape(*batch, *values.shape[1:])
    if confidence is None:
        return DensePrediction(values, None)
    return DensePrediction(values, one_plus_exp(confidence).reshape(*batch, *confidence.shape[-2:]))
