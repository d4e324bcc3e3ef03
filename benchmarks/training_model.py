"""What a training step costs by its shapes alone: the forward pass, and the backward pass of what is trained.

The conventions are those of `work_model`. Backward of a product with weights is the gradient of the weights where they
are trained, and that of the input where something before it is; each costs as much as the product. Backward of
attention is four products for the forward's two. Scores that a kernel computes again, and activations that
checkpointing does, are not counted: they are no work of the model.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from benchmarks.work_model import Flops, Workload, attention_plan, forward_flops, layout
from g2vlm.config import G2VLMConfig
from g2vlm.model.attention import AttnPlan


def training_flops(config: G2VLMConfig, work: Workload, trained: Collection[str], cut: bool = True) -> Flops:
    """Forward and backward of one sample whose loss is at its logits and at what the geometry heads give.

    Args:
        config: of the model.
        work: the sample.
        trained: groups of parameters, as in `trainable` of a run.
        cut: no gradient flows through the geometry stream when nothing that makes it is trained: the model's way.

    Raises:
        ValueError: the single encoder, whose tower serves two parts.
    """
    if config.encoders == "single":
        raise ValueError("training is counted for models with two encoders")
    forward, gradients = forward_flops(config, work), _gradients(trained, cut)
    heads = ("geometry_heads" in trained) + gradients.geometry
    backward = [
        _encoder_backward(forward["semantic_encoder"], _tower_input(config, work), "semantic_encoder" in trained),
        _encoder_backward(forward["geometry_encoder"], _dino_input(config, work), "geometry_encoder" in trained),
        forward["projection"] * (("projection" in trained) + ("geometry_encoder" in trained)),
        _decoder_backward(config, work, trained, gradients),
        *(_backward(forward[part], heads) for part in ("frame_decoders", "global_points", "heads")),
        forward["lm_head"] * (gradients.semantic + ("lm_head" in trained)),
    ]
    return sum((*forward.values(), *backward), Flops())


@dataclass(frozen=True)
class _Gradients:
    """Which streams of the decoder have a gradient: at its input, and after its first attention."""

    geometry_input: bool
    semantic_input: bool
    geometry: bool
    semantic: bool


def _gradients(trained: Collection[str], cut: bool) -> _Gradients:
    views = not {"geometry_encoder", "projection"}.isdisjoint(trained)
    words = not {"embeddings", "semantic_encoder"}.isdisjoint(trained)
    own = views or "geometric_expert" in trained
    semantic = own or words or "semantic_expert" in trained  # it sees the views
    return _Gradients(views, words, own or (semantic and not cut), semantic)


def _backward(forward: Flops, times: int) -> Flops:
    """Of a part whose products with weights have `times` gradients each."""
    return Flops(forward.linear * times, 2 * forward.attention * bool(times))


def _encoder_backward(forward: Flops, patches: int, trained: bool) -> Flops:
    """`patches` FLOPs of the patch embedding, whose input are pixels without a gradient."""
    return Flops(2 * forward.linear - patches, 2 * forward.attention) if trained else Flops()


def _tower_input(config: G2VLMConfig, work: Workload) -> int:
    tower = config.semantic_encoder
    values = 3 * tower.temporal_patch_size * tower.patch_size**2
    return 2 * sum(map(math.prod, work.images)) * values * tower.hidden_size


def _dino_input(config: G2VLMConfig, work: Workload) -> int:
    dino = config.geometry_encoder
    patches = work.num_views * math.prod(work.grid(dino.patch_size))
    return 2 * patches * 3 * dino.patch_size**2 * dino.hidden_size


def _decoder_backward(config: G2VLMConfig, work: Workload, trained: Collection[str], gradients: _Gradients) -> Flops:
    plan, num_geometry = attention_plan(config, work), layout(config, work).num_geometry
    num_semantic = plan.num_queries - num_geometry
    semantic = Flops()
    if gradients.semantic:
        fate = gradients.semantic_input, "semantic_expert" in trained, bool(work.num_logits)
        semantic = _stream_backward(config, num_semantic, *fate)
    if not gradients.geometry:
        return semantic + _attention_backward(config, plan.split(num_geometry)[1]) * gradients.semantic
    fate = gradients.geometry_input, "geometric_expert" in trained, work.geometry
    return semantic + _stream_backward(config, num_geometry, *fate) + _attention_backward(config, plan)


def _stream_backward(config: G2VLMConfig, num_tokens: int, has_input: bool, trained: bool, used: bool) -> Flops:
    """Products with weights of one expert over all layers.

    Args:
        config: of the model.
        num_tokens: of the expert.
        has_input: its input has a gradient; after the first layer it always has one.
        trained: its weights are, those of the norm before the first product among them.
        used: the loss is at its output; otherwise nothing follows the attention of the last layer.
    """
    decoder = config.decoder
    q_dim, kv_dim = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    before = 2 * num_tokens * decoder.hidden_size * (q_dim + 2 * kv_dim)
    after = 2 * num_tokens * decoder.hidden_size * (q_dim + 3 * decoder.intermediate_size)
    layers, gradients = decoder.num_layers, 1 + trained
    befores = before * (layers * gradients - (not has_input and not trained))
    return Flops(befores + after * gradients * (layers if used else layers - 1))


def _attention_backward(config: G2VLMConfig, plan: AttnPlan) -> Flops:
    pairs = sum(block.num_queries * block.num_keys for block in plan.blocks)
    decoder = config.decoder
    return Flops(attention=2 * 4 * pairs * decoder.num_heads * decoder.head_dim * decoder.num_layers)
