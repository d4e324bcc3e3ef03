"""The layer as the released structure has it: tokens in sequence order, each expert's rows read and written by index.

Every projection, norm, residual scale and MLP zero-fills its output, reads each expert's rows by index and writes them
back by index. Shapes: T tokens, D width, K head width; `indices` hold the places of the geometry and of the other
tokens.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from g2vlm.model.decoder import MoTLayer
from g2vlm.model.rope import apply_rotary


def by_index(x: Tensor, indices: Sequence[Tensor], modules: Sequence[nn.Module]) -> Tensor:
    """x (T, ...) -> (T, ...), the rows of each index through its own module."""
    rows = [module(x[index]) for index, module in zip(indices, modules, strict=True)]
    out = x.new_zeros(x.shape[0], *rows[0].shape[1:])
    for index, values in zip(indices, rows, strict=True):
        out[index] = values
    return out


def gathered_projection(
    layer: MoTLayer, x: Tensor, cos: Tensor, sin: Tensor, indices: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Stream (T, D), rotary tables (T, K) -> queries, keys and values, normed and rotated."""
    normed = _each(layer, "input_norm", x, indices)
    q, k, v = (_each(layer, f"attention.{n}_proj", normed, indices).unflatten(-1, (-1, cos.shape[-1])) for n in "qkv")
    q, k = (_each(layer, f"attention.{n}_norm", value, indices) for n, value in (("q", q), ("k", k)))
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v


def gathered_update(layer: MoTLayer, x: Tensor, attended: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Stream (T, D) and attention output (T, heads, K) -> the stream after the layer."""
    out = _each(layer, "attention.o_proj", attended.flatten(-2), indices)
    x = x + _each(layer, "attention_scale", out, indices)
    out = _each(layer, "mlp", _each(layer, "post_attention_norm", x, indices), indices)
    return x + _each(layer, "mlp_scale", out, indices)


def _each(layer: MoTLayer, name: str, x: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """x (T, ...) through both experts' module of this name."""
    return by_index(x, indices, [expert.get_submodule(name) for expert in (layer.geometric, layer.semantic)])
