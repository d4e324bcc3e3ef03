"""Heads on single tokens and token maps: camera, scale, feature alignment, correspondence, lifting.

All give float32, whatever the dtype of the input and of the weights.

Shapes: ... any batch, h w tokens of a view, d their width, S views.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.model.layers import RMSNorm
from g2vlm.supervision.activations import Activation, identity, inverse_log
from g2vlm.supervision.dense_head import DEFAULT_WIDTHS, DensePrediction, DPTHead, DPTWidths
from geometry.losses.features import resize_to_grid


class TokenMLP(nn.Module):
    """Linear layers with GELU between them, an optional LayerNorm before the first and an activation after the last.

    Args:
        dims: widths from input to output; one layer less than widths.
        norm: whether a LayerNorm precedes.
        activation: of the output.
    """

    def __init__(self, dims: Sequence[int], *, norm: bool = False, activation: Activation = identity):
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"dims: given {list(dims)}, expected at least an input and an output width")
        self.norm = nn.LayerNorm(dims[0]) if norm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(dims))
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., first width) -> (..., last width), float32."""
        x = self.norm(tokens.to(next(self.parameters()).dtype))
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.activation(self.layers[-1](x).float())


class CameraHead(nn.Module):
    """A camera from the state of its probe token, as nine numbers (GeoVR 3.3).

    LayerNorm, two layers with GELU, then one layer each for the translation (3), the quaternion (4, scalar last, of any
    length) and the vertical and horizontal field of view (2, ReLU, radians).

    Args:
        hidden_size: d.
        inner_dim: width of the two layers.
        initial_fov: bias of the field of view at the start, in radians; a ReLU that starts below zero never learns.
    """

    def __init__(self, hidden_size: int, inner_dim: int = 1536, initial_fov: float = 1.0):
        super().__init__()
        self.trunk = TokenMLP([hidden_size, inner_dim, inner_dim], norm=True, activation=F.gelu)
        self.translation = nn.Linear(inner_dim, 3)
        self.quaternion = nn.Linear(inner_dim, 4)
        self.fov = nn.Linear(inner_dim, 2)
        nn.init.constant_(self.fov.bias, initial_fov)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., d) -> (..., 9) float32: translation, quaternion x y z w, field of view h w."""
        x = self.trunk(tokens).to(self.fov.weight.dtype)
        return torch.cat([self.translation(x).float(), self.quaternion(x).float(), F.relu(self.fov(x).float())], dim=-1)


class ScaleHead(nn.Module):
    """Metres per unit from the state of the scale token, always positive (GeoVR 3.5)."""

    def __init__(self, hidden_size: int, inner_dim: int = 512):
        super().__init__()
        self.mlp = TokenMLP([hidden_size, inner_dim, 1], norm=True, activation=torch.exp)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., d) -> (...) float32."""
        return self.mlp(tokens).squeeze(-1)


class FeatureAlignmentHead(nn.Module):
    """Student tokens on the teacher's grid and in its width: bilinear resize, then a two-layer MLP (GeoVR eq. 5)."""

    def __init__(self, hidden_size: int, teacher_dim: int):
        super().__init__()
        self.mlp = TokenMLP([hidden_size, teacher_dim, teacher_dim], norm=True)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(..., h, w, d) -> (..., rows, columns, teacher_dim) float32, for `grid` = (rows, columns).

        Both grids cover the same image: cell borders coincide, not corner centres.
        """
        return self.mlp(resize_to_grid(tokens, grid))


class CorrespondenceHead(nn.Module):
    """Embeddings that match between views: RMSNorm, Linear to 2 r, GELU, Linear to r (GASP); not normalised.

    Args:
        hidden_size: d.
        embed_dim: r.
        norm_eps: of the RMSNorm, as the decoder block has it.
    """

    def __init__(self, hidden_size: int, embed_dim: int = 256, norm_eps: float = 1e-6):
        super().__init__()
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.expand = nn.Linear(hidden_size, 2 * embed_dim)
        self.project = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., d) -> (..., r) float32."""
        x = self.norm(tokens.to(self.expand.weight.dtype))
        return self.project(F.gelu(self.expand(x))).float()


def query_basis(query_weight: Tensor, rank: int) -> Tensor:
    """Left singular vectors U_r of a query projection for its largest singular values.

    They are the eigenvectors of W W^T, which also span the directions that W does not reach.

    Args:
        query_weight: W (rows, d).
        rank: r.

    Returns:
        (rows, min(r, rows)) float64, orthonormal columns by falling singular value.
    """
    weight = query_weight.detach().double()
    _, vectors = torch.linalg.eigh(weight @ weight.T)  # by rising eigenvalue
    return vectors.flip(-1)[:, :rank]


@torch.no_grad()
def init_from_query(
    head: CorrespondenceHead, query_weight: Tensor, query_bias: Tensor | None, norm_weight: Tensor
) -> None:
    """Start a correspondence head as E = Q U_r, the block's queries seen along r directions (GASP, SVD initialisation).

    With A = U_r^T W and a = U_r^T b the first layer is [A; -A] with bias [a; -a] and the second [I, -I]: as
    GELU(x) - GELU(-x) = x, the head starts linear and A^T A is the best rank-r approximation of W^T W. Embedding
    dimensions beyond the rows of W start at zero, which changes no similarity, and are free to learn.

    Args:
        head: is filled in place.
        query_weight: W (rows, d), all heads concatenated, before any rotation.
        query_bias: b (rows,), or None.
        norm_weight: (d,) of the RMSNorm whose output the projection sees.

    Raises:
        ValueError: shapes that do not fit the head.
    """
    dim, embed_dim = head.expand.in_features, head.project.out_features
    rows = query_weight.shape[0]
    given = {"query_weight": query_weight, "norm_weight": norm_weight, "query_bias": query_bias}
    expected = {"query_weight": (rows, dim), "norm_weight": (dim,), "query_bias": (rows,)}
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name}: given shape {tuple(tensor.shape)}, expected {expected[name]}")

    basis = query_basis(query_weight, embed_dim)  # (rows, min(r, rows))
    missing = embed_dim - basis.shape[1]
    weight = F.pad(basis.T @ query_weight.double(), (0, 0, 0, missing))  # A, (r, d)
    bias = torch.zeros_like(basis[:, 0]) if query_bias is None else query_bias.double()
    bias = F.pad(basis.T @ bias, (0, missing))  # a, (r,)
    eye = torch.eye(embed_dim)
    head.norm.weight.copy_(norm_weight)
    head.expand.weight.copy_(torch.cat([weight, -weight]))
    head.expand.bias.copy_(torch.cat([bias, -bias]))
    head.project.weight.copy_(torch.cat([eye, -eye], dim=1))
    head.project.bias.zero_()


class LiftProjectors(nn.Module):
    """From decoder layers to features for dense heads: one two-layer MLP per layer (SpatialSV)."""

    def __init__(self, hidden_size: int, output_dim: int = 1024, num_layers: int = 4):
        super().__init__()
        self.output_dim = output_dim
        self.projectors = nn.ModuleList(TokenMLP([hidden_size, output_dim, output_dim]) for _ in range(num_layers))

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Maps (..., h, w, d) -> maps (..., h, w, output_dim), float32."""
        return [projector(layer) for projector, layer in zip(self.projectors, layers, strict=True)]


class SharedLiftProjector(nn.Module):
    """As `LiftProjectors`, with one MLP for all layers (ablation)."""

    def __init__(self, hidden_size: int, output_dim: int = 1024):
        super().__init__()
        self.output_dim = output_dim
        self.projector = TokenMLP([hidden_size, output_dim, output_dim])

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Maps (..., h, w, d) -> maps (..., h, w, output_dim), float32."""
        return [self.projector(layer) for layer in layers]


@dataclass(frozen=True)
class LiftTask:
    """What a lifting head predicts per pixel."""

    channels: int
    activation: Activation


LIFT_TASKS = {
    "depth": LiftTask(1, torch.exp),
    "ray": LiftTask(6, identity),  # origin (3), direction (3) with z = 1 in the camera frame
    "point": LiftTask(3, inverse_log),
}


class LiftHeads(nn.Module):
    """Depth, rays and points with confidences, from four decoder layers (SpatialSV).

    Args:
        projectors: of the layers, shared by all tasks.
        tasks: names of `LIFT_TASKS`; one DPT head each.
        widths: of the DPT bodies.
    """

    def __init__(
        self,
        projectors: LiftProjectors | SharedLiftProjector,
        tasks: Sequence[str] = tuple(LIFT_TASKS),
        widths: DPTWidths = DEFAULT_WIDTHS,
    ):
        super().__init__()
        unknown = [name for name in tasks if name not in LIFT_TASKS]
        if unknown:
            raise ValueError(f"tasks: given {unknown}, allowed are {', '.join(LIFT_TASKS)}")
        self.projectors = projectors
        self.heads = nn.ModuleDict()
        for name in tasks:
            task = LIFT_TASKS[name]
            self.heads[name] = DPTHead(
                projectors.output_dim,
                channels=task.channels,
                activation=task.activation,
                confidence=True,
                widths=widths,
            )

    def forward(self, layers: Sequence[Tensor], size: tuple[int, int]) -> dict[str, DensePrediction]:
        """Four token maps (..., h, w, d), shallow to deep -> predictions of `size` = (H, W) by task."""
        features = self.projectors(layers)
        return {name: head(features, size) for name, head in self.heads.items()}
