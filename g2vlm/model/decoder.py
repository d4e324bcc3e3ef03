"""The Mixture-of-Transformers decoder: two experts, one shared attention (G2VLM section 3.1).

The tokens lie in the expert layout: all geometry tokens, then all semantic tokens, each in sequence order. The two
residual streams stay separate from the first layer to the last; only queries, keys and values meet.

Shapes: G geometry tokens, U semantic tokens, T = G + U, D width, B rows that are decoded together.
"""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from g2vlm.config import DecoderConfig
from g2vlm.model.attention import AttnPlan, attend
from g2vlm.model.cache import KVCache, LayerCache, Rows
from g2vlm.model.experts import Expert
from g2vlm.model.layers import RMSNorm
from g2vlm.model.rope import mrope_table

MATCHING_GAIN = 3.0
"""Of the first queries of `geometric_init: matching`; 1 leaves attention too even to find anything (docs/adr/0005)."""


class MoTLayer(nn.Module):
    """One decoder layer: each expert projects its tokens, all tokens attend together, each updates its stream."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.geometric = Expert(config, config.geometric_qk_norm, config.geometric_layer_scale)
        self.semantic = Expert(config, config.semantic_qk_norm, layer_scale=None)

    def forward(
        self,
        geometry: Tensor,
        semantic: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: AttnPlan,
        backend: str | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Streams (G, D) and (U, D), rotary tables (T, K) -> the streams after the layer; `cache` grows."""
        if cache is None and self._is_frozen(geometry):
            return self._forward_frozen(geometry, semantic, cos, sin, plan, backend)
        num_geometry = geometry.shape[0]
        geometric_qkv = self.geometric.project(geometry, cos[:num_geometry], sin[:num_geometry])
        semantic_qkv = self.semantic.project(semantic, cos[num_geometry:], sin[num_geometry:])
        q, k, v = (torch.cat(pair) for pair in zip(geometric_qkv, semantic_qkv, strict=True))
        if cache is not None:
            k, v = cache.extend(k, v)
        attended = attend(q, k, v, plan, backend=backend)  # (T, N, K)
        return (
            self.geometric.update(geometry, attended[:num_geometry]),
            self.semantic.update(semantic, attended[num_geometry:]),
        )

    def decode(self, tokens: Tensor, cos: Tensor, sin: Tensor, rows: Rows, index: int) -> Tensor:
        """One text token per row (B, D), rotary tables (B, K) -> the stream after this layer, the `index`-th."""
        attended = rows.attend(index, *self.semantic.project(tokens, cos, sin))
        return self.semantic.update(tokens, attended)

    def _is_frozen(self, geometry: Tensor) -> bool:
        """Whether nothing that makes the geometry stream is trained while the semantic one is."""
        makers = (geometry, *self.geometric.parameters())
        return torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in makers)

    def _forward_frozen(
        self, geometry: Tensor, semantic: Tensor, cos: Tensor, sin: Tensor, plan: AttnPlan, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """The same values; no gradient flows through the geometry stream, and nothing is kept for it.

        That stream sees text before the views, so without this the loss would reach the semantic expert through it (the
        released trainer cuts it as well, by detaching).
        """
        num_geometry = geometry.shape[0]
        before, after = plan.split(num_geometry)
        semantic_qkv = self.semantic.project(semantic, cos[num_geometry:], sin[num_geometry:])
        with torch.no_grad():
            geometric_qkv = self.geometric.project(geometry, cos[:num_geometry], sin[:num_geometry])
            k, v = (torch.cat(pair) for pair in zip(geometric_qkv[1:], semantic_qkv[1:], strict=True))
            if num_geometry:
                geometry = self.geometric.update(geometry, attend(geometric_qkv[0], k, v, before, backend=backend))
        k, v = (torch.cat(pair) for pair in zip(geometric_qkv[1:], semantic_qkv[1:], strict=True))
        attended = attend(semantic_qkv[0], k, v, after, backend=backend)
        return geometry, self.semantic.update(semantic, attended)


class MoTDecoder(nn.Module):
    """The stack of layers and each expert's final norm."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_layers))
        self.geometric_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.semantic_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def look_for_alike(self) -> None:
        """Let the geometric expert start by finding tokens that are alike, within a view and across views."""
        for layer in self.layers:
            assert isinstance(layer, MoTLayer)
            layer.geometric.attention.look_for_alike(MATCHING_GAIN)

    @torch.no_grad()
    def copy_semantic_to_geometric(self) -> None:
        """Start the geometric expert as a copy of the semantic one; its residual scales and extra norms stay."""
        for layer in self.layers:
            assert isinstance(layer, MoTLayer)
            targets = dict(layer.geometric.named_parameters())
            for name, source in layer.semantic.named_parameters():
                if name in targets:
                    targets[name].copy_(source)
        self.geometric_norm.weight.copy_(self.semantic_norm.weight)

    def forward(
        self,
        geometry: Tensor,
        semantic: Tensor,
        position_ids: Tensor,
        plan: AttnPlan,
        backend: str | None = None,
        deepstack: Sequence[Tensor] = (),
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run both streams.

        Args:
            geometry: (G, D) input embeddings of the geometry tokens.
            semantic: (U, D) input embeddings of text, markers and semantic image tokens.
            position_ids: (3, T) time, row and column of every token, expert layout.
            plan: who sees whom, expert layout.
            backend: attention backend; None chooses.
            deepstack: (U, D) each, added to the semantic stream after the first layers, one per layer (Qwen3-VL).
            cache: what the tokens continue; their own keys and values are appended to it.

        Returns:
            The two streams after their final norms.
        """
        cos, sin = self._rotary(position_ids)
        dtype, stream_dtype = self.semantic_norm.weight.dtype, self._stream_dtype
        geometry, semantic = geometry.to(stream_dtype), semantic.to(stream_dtype)
        caches = () if cache is None else cache.layers
        for layer, layer_cache, added in zip_longest(self.layers, caches, deepstack):
            geometry, semantic = layer(geometry, semantic, cos, sin, plan, backend, layer_cache)
            semantic = semantic if added is None else semantic + added
        return self.geometric_norm(geometry).to(dtype), self.semantic_norm(semantic).to(dtype)

    def decode(self, tokens: Tensor, rows: Rows) -> Tensor:
        """One text token per row (B, D) at each row's next position -> its stream after the final norm (B, D)."""
        cos, sin = self._rotary(rows.positions.expand(3, -1))
        x = tokens.to(self._stream_dtype)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, MoTLayer)
            x = layer.decode(x, cos, sin, rows, index)
        rows.advance()
        return self.semantic_norm(x).to(self.semantic_norm.weight.dtype)

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        interleaved = config.mrope_layout == "interleaved"
        return mrope_table(position_ids, config.head_dim, config.rope_theta, config.mrope_sections, interleaved)

    @property
    def _stream_dtype(self) -> torch.dtype:
        weights = self.semantic_norm.weight.dtype
        return torch.promote_types(weights, getattr(torch, self.config.residual_dtype))
