"""VLM-3R's fusion: image tokens read what a reconstruction model knows of the same frame (VLM-3R section 4.1, eq. 2).

Shapes: F frames of one size, N image tokens and M geometry tokens of a frame, D and C their widths, H heads, V image
tokens of all frames.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2vlm.fusion_config import DropoutOn, FusionConfig, FusionInit
from g2vlm.model.layers import DefaultLinear


class NoFusion(nn.Module):
    """Image tokens stay as they are; no parameters."""

    def forward(self, visual: Tensor, geometry: Tensor, valid: Tensor | None = None) -> Tensor:
        """`visual`, whatever the geometry."""
        return visual


class SpatialVisualViewFusion(nn.Module):
    """One cross-attention block from the image tokens of a frame to its camera and geometry tokens.

    As in the released code: both inputs are normed and projected, then projected a second time inside the attention;
    a linear layer and a norm close the branch; it is added to the image tokens as they came; dropout acts on the sum.

    Args:
        visual_dim: D.
        geometry_dim: C.
        head_dim: width of a head; it divides D. VLM-3R has 18 heads of 64.
        init, norm_out, dropout, dropout_on: as in `FusionConfig`. With `zero` the branch's last layer starts at zero:
            the norm's weight, which then works as a gate per channel, or the output layer if there is no norm. (Behind
            a zero output layer a norm amplifies by 1 / sqrt(eps), so that a few steps would lead to unit variance.)

    Raises:
        ValueError: `head_dim` does not divide D.
    """

    def __init__(
        self,
        visual_dim: int,
        geometry_dim: int,
        head_dim: int = 64,
        init: FusionInit = "vlm3r",
        norm_out: bool = True,
        dropout: float = 0.1,
        dropout_on: DropoutOn = "sum",
    ):
        super().__init__()
        self.visual_norm = nn.LayerNorm(visual_dim)
        self.geometry_norm = nn.LayerNorm(geometry_dim)
        self.query = DefaultLinear(visual_dim, visual_dim)
        self.key = DefaultLinear(geometry_dim, visual_dim)
        self.value = DefaultLinear(geometry_dim, visual_dim)
        self.attention = MultiheadAttention(visual_dim, head_dim)
        self.output = BranchOutput(visual_dim, zero_init=init == "zero" and not norm_out)
        self.output_norm = BranchNorm(visual_dim, zero_init=init == "zero") if norm_out else nn.Identity()
        self.branch_dropout = nn.Dropout(dropout) if dropout_on == "branch" else nn.Identity()
        self.sum_dropout = nn.Dropout(dropout) if dropout_on == "sum" else nn.Identity()

    def forward(self, visual: Tensor, geometry: Tensor, valid: Tensor | None = None) -> Tensor:
        """Fuse frames.

        Args:
            visual: (F, N, D) image tokens.
            geometry: (F, M, C) camera and geometry tokens, in any order.
            valid: (F, M) bool, the tokens to read, at least one per frame; None for all.

        Returns:
            (F, N, D).
        """
        source = self.geometry_norm(geometry)
        query = self.query(self.visual_norm(visual))
        attended = self.attention(query, self.key(source), self.value(source), valid)
        branch = self.output_norm(self.output(attended))
        return self.sum_dropout(visual + self.branch_dropout(branch))


class MultiheadAttention(nn.Module):
    """What torch's `MultiheadAttention` computes, with its start, and its packed input weights as three layers."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"heads of width {head_dim} do not fill {dim}")
        self.head_dim = head_dim
        self.q_proj = AttentionInput(dim)
        self.k_proj = AttentionInput(dim)
        self.v_proj = AttentionInput(dim)
        self.out_proj = AttentionOutput(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
        """query (F, N, D), key and value (F, M, D), valid (F, M) or None -> (F, N, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (F, H, N or M, head_dim)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None if valid is None else valid[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class AttentionInput(DefaultLinear):
    """A third of torch's packed input projection (3 D, D): Xavier's bound is that of the whole, the bias zero."""

    def __init__(self, dim: int):
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        """Uniform within sqrt(6 / (D + 3 D))."""
        bound = math.sqrt(6 / (4 * self.in_features))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


class AttentionOutput(DefaultLinear):
    """torch's output projection: a linear layer's usual weight, the bias zero."""

    def reset_parameters(self) -> None:
        """PyTorch's weight, no bias."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class BranchOutput(DefaultLinear):
    """The linear layer behind the attention; with `zero_init` the branch starts at zero."""

    def __init__(self, dim: int, zero_init: bool):
        self.zero_init = zero_init
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        """PyTorch's own, or zero."""
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)


class BranchNorm(nn.LayerNorm):
    """The norm that closes the branch; with `zero_init` its weight starts at zero."""

    def __init__(self, dim: int, zero_init: bool):
        self.zero_init = zero_init
        super().__init__(dim)

    def reset_parameters(self) -> None:
        """Weight one or zero, bias zero."""
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.weight)


Fusion = NoFusion | SpatialVisualViewFusion


def build_fusion(config: FusionConfig | None, visual_dim: int, expert_dim: int) -> Fusion:
    """The fusion of a config.

    Args:
        config: None for none.
        visual_dim: width of the image tokens.
        expert_dim: width of the geometric expert's hidden states.
    """
    if config is None:
        return NoFusion()
    return SpatialVisualViewFusion(
        visual_dim,
        expert_dim if config.source == "geometric_expert" else config.token_dim,
        config.head_dim,
        config.init,
        config.norm_out,
        config.dropout,
        config.dropout_on,
    )


def frame_sizes(grid_thw: Tensor, merge_size: int) -> list[int]:
    """Image tokens of every frame of images and videos with grids (images, 3): a video has one frame per time step."""
    return [rows * columns // merge_size**2 for time, rows, columns in grid_thw.tolist() for _ in range(time)]


def fuse_frames(
    fuse: Callable[[Tensor, Tensor], Tensor], visual: Tensor, sizes: Sequence[int], geometry: Sequence[Tensor | None]
) -> Tensor:
    """Fuse frames of any sizes; those of equal sizes in one batch.

    Args:
        fuse: the block.
        visual: (V, D) image tokens, frame after frame.
        sizes: image tokens of every frame.
        geometry: the tokens (M, C) of every frame, in any precision; None for a frame that stays as it is.

    Returns:
        (V, D).

    Raises:
        ValueError: another number of frames than of their geometry tokens.
    """
    if len(geometry) != len(sizes):
        raise ValueError(f"{len(sizes)} frames of images and geometry tokens of {len(geometry)} frames do not pair")
    frames = list(visual.split(list(sizes)))
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (size, tokens) in enumerate(zip(sizes, geometry, strict=True)):
        if tokens is not None:
            alike.setdefault((size, tokens.shape[0]), []).append(index)
    for members in alike.values():
        tokens = torch.stack([tokens for index in members if (tokens := geometry[index]) is not None])
        fused = fuse(torch.stack([frames[index] for index in members]), tokens.to(visual))
        for index, frame in zip(members, fused.unbind(), strict=True):
            frames[index] = frame
    return torch.cat(frames)


def untouched(fusion: Fusion, visual: Tensor) -> Tensor:
    """Image tokens (V, D) as they are, in a graph with the fusion: its gradients are then zero, not absent.

    Sharded processes add up gradients of the same parameters, so one that fuses nothing in a step needs them too.
    """
    if isinstance(fusion, NoFusion) or not len(visual):
        return visual
    nothing = visual.new_zeros(1, 1, fusion.key.in_features)
    return visual + 0 * fusion(visual[None, :1], nothing).sum()


class GivenFrames:
    """Geometry tokens that wait for the images they are fused with, so that a model's forward needs no argument more.

    with model.given_frames.use(tokens.frames("frame")):
        model(**inputs)
    """

    def __init__(self) -> None:
        self._waiting: list[Tensor | None] | None = None

    @contextmanager
    def use(self, frames: Sequence[Tensor | None]) -> Iterator[None]:
        """Let the forwards inside fuse their images with `frames`, first come, first served.

        Args:
            frames: per frame of images, videos' steps included, the tokens (M, C) it reads; None to leave it.

        Raises:
            ValueError: frames are in use already, or some met no image.
        """
        if self._waiting is not None:
            raise ValueError("frames are in use already; leave that context first")
        self._waiting = list(frames)
        try:
            yield
            if self._waiting:
                raise ValueError(f"{len(self._waiting)} of {len(frames)} given frames met no image")
        finally:
            self._waiting = None

    def take(self, count: int) -> list[Tensor | None] | None:
        """The next `count` frames; None if nothing was given.

        Raises:
            ValueError: fewer are left.
        """
        if self._waiting is None:
            return None
        if len(self._waiting) < count:
            raise ValueError(f"{count} frames of images; geometry tokens of {len(self._waiting)} frames are left")
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken
