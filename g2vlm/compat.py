"""Every use of transformers' model internals, so that a new version of it breaks one file and one test.

The contract is held by tests/g2vlm/test_compat.py on each supported version.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from g2vlm.config import SemanticEncoderConfig, TokenIds
from g2vlm.errors import InputError
from g2vlm.model.cache import Rows
from g2vlm.processing import sequence_builder
from g2vlm.sequence import PackedSequence, Text


def build_vision_tower(config: SemanticEncoderConfig, output_dim: int) -> nn.Module:
    """transformers' Qwen2-VL vision tower with a merger to `output_dim`."""
    tower_config = Qwen2VLVisionConfig(
        depth=config.num_layers,
        embed_dim=config.hidden_size,
        hidden_size=output_dim,
        hidden_act=config.hidden_act,
        mlp_ratio=config.mlp_ratio,
        num_heads=config.num_heads,
        patch_size=config.patch_size,
        spatial_merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
    )
    tower_config._attn_implementation = "sdpa"
    return Qwen2VisionTransformerPretrainedModel(tower_config)


def run_vision_tower(tower: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images.

    Args:
        tower: what `build_vision_tower` made.
        pixel_values: (patches of all images, 3 * 2 * 14 * 14) in 2x2 merge order.
        grid_thw: (images, 3) time, rows and columns in patches.

    Returns:
        Patch features before the merger (patches, width), and merged tokens (patches / 4, output_dim).
    """
    output = tower(pixel_values, grid_thw=grid_thw)
    return output.last_hidden_state, output.pooler_output


def complete_generation_config(config: GenerationConfig, tokens: TokenIds) -> None:
    """Fill in the special tokens that a generation config does not name."""
    for name, value in (("bos_token_id", tokens.bos), ("eos_token_id", tokens.eos), ("pad_token_id", tokens.eos)):
        if getattr(config, name) is None:
            setattr(config, name, value)


class PackedGenerationMixin(GenerationMixin):
    """transformers' `generate` for what the model's forward takes: `sequence`, `views`, `pixel_values`, ...

    One row of ids comes back for each sample of the pack (times `num_return_sequences`): the new tokens alone, as for
    models that are given embeddings. Greedy search and sampling; logits processors, stopping criteria, stop strings and
    streamers are transformers' own. With `use_cache=False` every token costs a whole forward.
    """

    config: Any
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the keys and values are kept in rows of our own."""
        return False

    def _prepare_model_inputs(
        self, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Tensor, str, dict[str, Any]]:
        """The last id of every sample (B, 1) stands for the context; the new ids start empty."""
        sequence = model_kwargs.get("sequence")
        if inputs is not None or not isinstance(sequence, PackedSequence):
            raise InputError("generate has no sequence", "it takes what forward takes", "pass sequence=...")
        last = sequence.semantic_ids[list(sequence.last_tokens)][:, None]
        return last, "sequence", {**model_kwargs, "input_ids": last[:, :0]}

    def _prepare_special_tokens(
        self,
        generation_config: GenerationConfig,
        kwargs_has_attention_mask: bool | None = None,
        device: Any = None,
        batch_size: int | None = None,
    ) -> None:
        """Every row's context is known, as with an attention mask, so padding with eos is no reason to warn."""
        parent: Any = super()
        parent._prepare_special_tokens(generation_config, True, device=device, batch_size=batch_size)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        """Only the ids are repeated; the context is computed once and its keys are repeated afterwards."""
        return input_ids.repeat_interleave(expand_size, dim=0), model_kwargs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        use_cache: bool = True,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search or sampling, until every row met a stopping criterion; ids (B, n), or an output if asked."""
        if synced_gpus:
            raise InputError("generate on sharded weights", "rows end at different times", "gather the weights first")
        begin = self._cached_steps if use_cache else self._uncached_steps
        inputs = {name: model_kwargs[name] for name in _CONTEXT if name in model_kwargs}
        logits, step = begin(inputs, input_ids.shape[0], generation_config.max_length)
        going = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        while True:
            raw = logits.to(dtype=torch.float32, copy=True)
            scores = logits_processor(input_ids, raw)
            ids = _chosen(scores, bool(generation_config.do_sample))
            ids = ids.where(going, generation_config.pad_token_id or 0)
            input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
            for name, value in (("scores", scores), ("logits", raw)):
                if getattr(generation_config, f"output_{name}"):
                    kept[name].append(value)
            if streamer is not None:
                streamer.put(ids.cpu())
            going &= ~stopping_criteria(input_ids, scores)
            if not going.any():
                break
            logits = step(input_ids)
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        found = {name: tuple(values) or None for name, values in kept.items()}
        return GenerateDecoderOnlyOutput(sequences=input_ids, **found)  # pyright: ignore[reportArgumentType]

    def _cached_steps(self: Any, inputs: dict[str, Any], num_rows: int, room: int) -> "_Steps":
        """The first logits, and the function from all new ids (B, n) to the next logits; keys and values are kept."""
        sequence: PackedSequence = inputs["sequence"]
        copies = num_rows // sequence.num_samples
        output = self(**inputs, logits_at=_ends(sequence), predict_geometry=False, use_cache=True)
        rows = Rows.after(sequence, output.cache, room).repeated(copies)
        return output.logits.repeat_interleave(copies, dim=0), lambda ids: self.decode(ids[:, -1], rows)

    def _uncached_steps(self: Any, inputs: dict[str, Any], num_rows: int, room: int) -> "_Steps":
        """The same with nothing kept from one token to the next."""
        context: PackedSequence = inputs["sequence"]
        copies = num_rows // context.num_samples
        parents = [row // copies for row in range(num_rows)]

        def step(ids: Tensor) -> Tensor:
            cache = self(**inputs, predict_geometry=False, use_cache=True).cache
            new = [[Text(tuple(row))] for row in ids.tolist()]
            sequence = sequence_builder(self.config).extend(context, new, parents).to(ids.device)
            return self(sequence=sequence, cache=cache, logits_at=_ends(sequence), predict_geometry=False).logits

        first = self(**inputs, logits_at=_ends(context), predict_geometry=False).logits
        return first.repeat_interleave(copies, dim=0), step


_CONTEXT = ("sequence", "views", "pixel_values", "image_grid_thw", "backend")
_Steps = tuple[Tensor, Callable[[Tensor], Tensor]]


def _ends(sequence: PackedSequence) -> Tensor:
    return torch.tensor(sequence.last_tokens, device=sequence.semantic_ids.device)


def _chosen(scores: Tensor, sample: bool) -> Tensor:
    """Scores (B, vocab) -> ids (B,)."""
    if not sample:
        return scores.argmax(dim=-1)
    return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
