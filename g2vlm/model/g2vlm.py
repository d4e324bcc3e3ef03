"""The whole model: two encoders, the Mixture-of-Transformers decoder, the geometry heads and the language head.

Shapes: S views of a scene, P patches of a view, G geometry tokens, U semantic tokens, T = G + U, D width, V merged
semantic image tokens, B rows that are decoded together.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from timm.layers import LayerScale as TimmLayerScale  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from g2vlm.compat import (
    TOWER_BLOCKS,
    PackedGenerationMixin,
    TowerOutput,
    build_vision_tower,
    complete_generation_config,
    run_vision_tower,
)
from g2vlm.config import G2VLMConfig
from g2vlm.encoders.dinov2 import DinoV2
from g2vlm.encoders.shared_tower import SharedTower
from g2vlm.errors import InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.geometry_tokens import own_frames
from g2vlm.model import loading
from g2vlm.model.cache import KVCache, Rows
from g2vlm.model.decoder import MoTDecoder
from g2vlm.model.fusion import GivenFrames, build_fusion, frame_sizes, fuse_frames, untouched
from g2vlm.model.heads import GeometryHeads
from g2vlm.model.layers import DefaultLinear, GeometryProjection, LayerScale, RMSNorm
from g2vlm.model.outputs import G2VLMOutput
from g2vlm.sequence import PackedSequence
from g2vlm.weights import TensorSpec
from geometry import GeometryPrediction


class G2VLMForConditionalGeneration(PreTrainedModel, PackedGenerationMixin):
    """A geometry-grounded vision-language model (G2VLM section 3).

    The forward pass:
        1. embeds text and markers;
        2. encodes semantic images with a Qwen-VL tower, fuses them with geometry tokens if the config says so, and puts
           them into their slots;
        3. encodes the views of each geometry segment and projects them to the decoder's width;
        4. runs both experts over the expert layout with one shared attention;
        5. predicts logits at the requested semantic tokens;
        6. decodes points, cameras and normals of each geometry segment.
    """

    config_class = G2VLMConfig
    config: G2VLMConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = ""
    main_input_name = "sequence"
    _no_split_modules = ["MoTLayer", "Block", *TOWER_BLOCKS, "FrameBlock", "ContextBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["point_head", "global_point_head", "camera_head", "normal_head", "confidence_head"]  # noqa: RUF012

    def __init__(self, config: G2VLMConfig):
        super().__init__(config)
        dim = config.decoder.hidden_size
        self.embed_tokens = nn.Embedding(config.decoder.vocab_size, dim)
        self.semantic_encoder = build_vision_tower(config.semantic_encoder, dim)
        self.geometry_encoder = self._build_geometry_encoder(config)
        zero_init = config.geometry_encoder.projection_init == "zero"
        self.geometry_projection = GeometryProjection(self.geometry_encoder.config.hidden_size, dim, zero_init)
        self.decoder = MoTDecoder(config.decoder)
        self.lm_head = nn.Linear(dim, config.decoder.vocab_size, bias=False)
        self.heads = GeometryHeads(config)
        self.fusion = build_fusion(config.fusion, dim, dim)
        self.given_frames = GivenFrames()
        self.post_init()
        complete_generation_config(self.generation_config, config.tokens)
        if config.decoder.geometric_init == "matching":
            self.decoder.look_for_alike()

    @classmethod
    def tensor_specs(cls, config: G2VLMConfig) -> dict[str, TensorSpec]:
        """The tensors that a checkpoint of this config holds, without allocating any."""
        with torch.device("meta"):
            state = cls(config).state_dict()
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint in our layout: transformers' method, with its arguments, but strict.

        The files of a local folder are checked before any weight is allocated.

        Raises:
            CheckpointError: damaged files, an unusable config, or tensors that do not fit it, every one listed.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        loading.check_folder(cls, source, kwargs)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(source, *args, **kwargs)
        model, info = loaded
        loading.check_report(info, source)
        complete_generation_config(model.generation_config, model.config.tokens)
        if isinstance(model.geometry_encoder, DinoV2):  # transformers makes every loaded tensor trainable
            model.geometry_encoder.mask_token.requires_grad_(False)
        return (model, info) if with_info else model

    def add_fusion(self, config: FusionConfig) -> None:
        """Give a loaded model a fusion, as it starts, in place of the one that it has or has not.

        Raises:
            ValueError: it does not fit the model's width and depth.
        """
        config.require_fits(self.config.hidden_size, self.config.decoder.num_layers)
        self.config.fusion = config
        self.fusion = build_fusion(config, self.config.hidden_size, self.config.hidden_size)
        self.fusion.to(self.device, self.dtype).train(self.training)

    def _build_geometry_encoder(self, config: G2VLMConfig) -> DinoV2 | SharedTower:
        if config.encoders == "single":
            return SharedTower(config.semantic_encoder, self.semantic_encoder)
        return DinoV2(config.geometry_encoder)

    def forward(
        self,
        sequence: PackedSequence,
        views: Sequence[Tensor] = (),
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        logits_at: Tensor | None = None,
        predict_geometry: bool = True,
        predict_global_points: bool = False,
        backend: str | None = None,
        cache: KVCache | None = None,
        use_cache: bool = False,
    ) -> G2VLMOutput:
        """Run the model over packed samples, or over what continues cached ones.

        Args:
            sequence: tokens, positions and attention plan of all samples.
            views: per geometry segment, normalised images (S, 3, H, W).
            pixel_values: (patches, 6 * patch_size^2) of all semantic images and videos in order; None without any.
            image_grid_thw: (images, 3) their grids in patches.
            logits_at: (n,) semantic tokens to predict the next token at; None for no logits.
            predict_geometry: run the geometry heads.
            predict_global_points: also run the auxiliary global-point head (training, or asked for).
            backend: attention backend; None chooses.
            cache: keys and values of the tokens that the sequence continues; it is not changed.
            use_cache: return the keys and values of all tokens, these included.
        """
        semantic, deepstack = self.embed_semantic(sequence, pixel_values, image_grid_thw, views)
        geometry = self.embed_views(views)
        self._check(sequence, geometry, cache)
        grown = None
        if cache is not None or use_cache:
            grown = KVCache.empty(self.config.decoder.num_layers) if cache is None else cache.copy()
        geometry, semantic = self.decoder(
            geometry, semantic, sequence.position_ids, sequence.plan, backend, deepstack, grown
        )
        predictions = None
        if predict_geometry and sequence.num_geometry:
            predictions = self.decode_geometry(geometry, sequence, predict_global_points)
        return G2VLMOutput(
            logits=None if logits_at is None else self.lm_head(semantic[logits_at]),
            geometry=predictions,
            geometric_hidden=geometry,
            semantic_hidden=semantic,
            cache=grown if use_cache else None,
        )

    def decode(self, ids: Tensor, rows: Rows) -> Tensor:
        """Feed one text token per row, ids (B,), and predict the next: logits (B, vocab). The rows grow."""
        return self.lm_head(self.decoder.decode(self.embed_tokens(ids), rows))

    def embed_semantic(
        self,
        sequence: PackedSequence,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        views: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Text and marker embeddings with the merged image tokens in their slots, and a tower's deep-stack features.

        Returns:
            (U, D), and per deep-stack layer (U, D) that is zero outside the image slots.
        """
        embeddings = self.embed_tokens(sequence.semantic_ids)
        if pixel_values is None or image_grid_thw is None:
            merged, deepstack = embeddings.new_zeros(0, embeddings.shape[1]), ()
        else:
            _, merged, deepstack = self.encode_images(pixel_values, image_grid_thw)
        if merged.shape[0] != sequence.image_slots.shape[0]:
            raise ValueError(
                f"pixel_values give {merged.shape[0]} image tokens; "
                f"the sequence has {sequence.image_slots.shape[0]} slots"
            )
        if image_grid_thw is not None:
            merged = self._fused(merged, sequence, image_grid_thw, views)
        slots, zeros = sequence.image_slots, torch.zeros_like(embeddings)
        added = [zeros.index_copy(0, slots, features.to(zeros.dtype)) for features in deepstack]
        return embeddings.index_copy(0, slots, merged.to(embeddings.dtype)), added

    def _fused(self, merged: Tensor, sequence: PackedSequence, grid_thw: Tensor, views: Sequence[Tensor]) -> Tensor:
        """Image tokens (V, D) of a pack after fusion with given geometry tokens, or else with the model's own."""
        config = self.config.fusion
        if config is None:
            return merged
        sizes = frame_sizes(grid_thw, self.config.semantic_encoder.merge_size)
        frames = self.given_frames.take(len(sizes))
        if frames is None and config.source == "given":
            raise InputError(
                "no geometry tokens for the images",
                "the model's fusion reads what another model knows of them (fusion.source: given)",
                "in Python: with model.given_frames.use(frames): ...",
            )
        if frames is None:
            frames = own_frames(self, config, sequence, views, sizes)
        if self.training and all(own is None for own in frames):
            return untouched(self.fusion, merged)
        return fuse_frames(self.fusion, merged, sizes, frames)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> TowerOutput:
        """Patches (n, 6 * patch_size^2) of images and videos with grids (images, 3) -> the tower's features."""
        return run_vision_tower(self.semantic_encoder, pixel_values, image_grid_thw)

    def embed_views(self, views: Sequence[Tensor]) -> Tensor:
        """Geometry tokens of all segments, view by view, row by row: (G, D)."""
        if not views:
            return self.geometry_projection.weight.new_zeros(0, self.config.decoder.hidden_size)
        if self.geometry_encoder.keeps_images_apart:
            views = join_equal_sizes(views)
        features = [self.geometry_encoder(images).flatten(0, 1) for images in views]
        return self.geometry_projection(torch.cat(features))

    def decode_geometry(
        self, hidden: Tensor, sequence: PackedSequence, predict_global_points: bool = False
    ) -> tuple[GeometryPrediction, ...]:
        """Points, cameras and normals of every geometry segment from the geometric expert's output (G, D).

        The heads work view by view, so all views of one grid are decoded together.
        """
        grids = [segment[0] for segment in sequence.view_grids]  # all views of a segment have one size
        sizes = [len(segment) * rows * cols for segment, (rows, cols) in zip(sequence.view_grids, grids, strict=True)]
        tokens = hidden.split(sizes)
        predictions: dict[int, GeometryPrediction] = {}
        for grid in dict.fromkeys(grids):
            members = [i for i, own in enumerate(grids) if own == grid]
            scenes = [tokens[i].unflatten(0, (-1, grid[0] * grid[1])) for i in members]  # each (S, P, D)
            context = torch.cat([scene[:1].expand_as(scene) for scene in scenes]) if predict_global_points else None
            decoded = self.heads(torch.cat(scenes), grid, context)
            predictions |= zip(members, decoded.split([len(scene) for scene in scenes]), strict=True)
        return tuple(predictions[i] for i in range(len(grids)))

    def _check(self, sequence: PackedSequence, geometry: Tensor, cache: KVCache | None) -> None:
        if geometry.shape[0] != sequence.num_geometry:
            raise ValueError(
                f"views give {geometry.shape[0]} geometry tokens; the sequence was built for {sequence.num_geometry}"
            )
        cached, expected = 0 if cache is None else cache.num_tokens, sequence.num_keys - sequence.num_tokens
        if cached != expected:
            raise ValueError(f"the cache holds {cached} tokens; the sequence continues {expected}")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of one module that holds parameters, as the released model starts.

        Linear layers and tables normal(0, initializer_range), norms one, scales their configured value; the heads keep
        PyTorch's default.
        """
        std = self.config.decoder.initializer_range
        if isinstance(module, DefaultLinear | GeometryProjection | TimmLayerScale):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.value)
        elif isinstance(module, DinoV2):
            nn.init.zeros_(module.mask_token)
            for table in (module.cls_token, module.register_tokens, module.position_embeddings):
                nn.init.normal_(table, std=std)


AutoConfig.register(G2VLMConfig.model_type, G2VLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(G2VLMConfig, G2VLMForConditionalGeneration, exist_ok=True)


def join_equal_sizes(views: Sequence[Tensor]) -> list[Tensor]:
    """Neighbouring scenes (S, 3, H, W) of one image size as one batch of images, in the same order."""
    return [torch.cat(list(scenes)) for _, scenes in groupby(views, key=lambda images: images.shape[1:])]
