"""One expert's half of a decoder layer. A layer holds two, of equal shape, and runs one attention over both.

Shapes: T tokens of this expert, D width, N query heads, M key/value heads, K head width.
"""

import torch
from torch import Tensor, nn

from g2vlm.config import DecoderConfig
from g2vlm.model.layers import LayerScale, RMSNorm, SwiGLU
from g2vlm.model.rope import apply_rotary


class ExpertAttention(nn.Module):
    """The projections around the shared attention: bias on q, k, v; optional RMS norm of q and k."""

    def __init__(self, config: DecoderConfig, qk_norm: bool):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, D), rotary tables (T, K) -> q (T, N, K), k and v (T, M, K); q and k normed, then rotated."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return apply_rotary(self.q_norm(q), cos, sin), apply_rotary(self.k_norm(k), cos, sin), v

    @torch.no_grad()
    def look_for_alike(self, gain: float) -> None:
        """Start with queries that are the keys' projection times a gain, so that a token attends to those like it."""
        keys = self.k_proj.weight.unflatten(0, (-1, self.head_dim))  # (M, K, D)
        per_key = self.q_proj.out_features // self.k_proj.out_features
        self.q_proj.weight.copy_(keys.repeat_interleave(per_key, dim=0).flatten(0, 1))
        (self.q_norm if isinstance(self.q_norm, RMSNorm) else self.q_proj).weight.mul_(gain)


class Expert(nn.Module):
    """Pre-norm attention and SwiGLU branches with optional residual scales.

    Args:
        config: the decoder's sizes.
        qk_norm: normalise queries and keys over the head width.
        layer_scale: initial residual scale; None for no scale (the semantic expert).
    """

    def __init__(self, config: DecoderConfig, qk_norm: bool, layer_scale: float | None):
        super().__init__()
        dim = config.hidden_size
        self.input_norm = RMSNorm(dim, config.rms_norm_eps)
        self.attention = ExpertAttention(config, qk_norm)
        self.attention_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.post_attention_norm = RMSNorm(dim, config.rms_norm_eps)
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.mlp_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream (T, D) -> queries, keys and values of this expert's tokens."""
        return self.attention(self._compute_dtype(self.input_norm(x)), cos, sin)

    def update(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream (T, D) and attention output (T, N, K) -> the stream after this layer (T, D)."""
        x = x + self.attention_scale(self.attention.o_proj(attended.flatten(-2)))
        return x + self.mlp_scale(self.mlp(self._compute_dtype(self.post_attention_norm(x))))

    def _compute_dtype(self, x: Tensor) -> Tensor:
        return x.to(self.attention.o_proj.weight.dtype)
