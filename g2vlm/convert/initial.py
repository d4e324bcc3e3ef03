"""An initial checkpoint: semantic half from a stock model, geometry encoder from a DINOv2, the rest random."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from g2vlm.compat import init_vision_tower_module
from g2vlm.config import G2VLMConfig, HeadsConfig
from g2vlm.convert.dinov2 import HEAD_DIM, open_dinov2
from g2vlm.convert.keymap import Translated
from g2vlm.convert.stock import Stock, copy_recipes, open_stock
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.loading import possible_config
from g2vlm.weights import TensorSource, cast, storage_dtype

GeometricInit = Literal["random", "copy_semantic"]


@dataclass(frozen=True)
class Initial:
    """An initial checkpoint and what it is made from, all under our names except `stock.files`."""

    config: G2VLMConfig
    source: TensorSource
    stock: Stock
    dinov2: TensorSource | None


def open_initial(
    path: Path,
    dinov2: Path | None = None,
    base: G2VLMConfig | None = None,
    geometric_init: GeometricInit = "random",
    seed: int = 0,
) -> Initial:
    """Put an initial checkpoint together without reading any weight yet.

    The semantic expert keeps a stock decoder's ways (causal over image tokens, qk-norm only where it has it); the
    geometry encoder's windows follow the images. New tensors are as `_init_weights` makes them, in the semantic half's
    storage type.

    Args:
        path: a Qwen-VL or a text model.
        dinov2: the geometry encoder; without one it is random, of the base's sizes.
        base: decides what neither of the two does; by default the released 2B model.
        geometric_init: how the geometric expert starts.
        seed: of the random tensors.

    Raises:
        CheckpointError: a source is damaged, incomplete, or of a kind that we do not compute.
    """
    base = G2VLMConfig.paper_2b() if base is None else base
    scale = base.decoder.geometric_layer_scale
    stock = open_stock(path, geometric_init=geometric_init, geometric_layer_scale=scale)
    encoder, dinov2_source = (base.geometry_encoder, None) if dinov2 is None else open_dinov2(dinov2)
    with possible_config(path):
        config = G2VLMConfig(
            decoder=stock.decoder,
            semantic_encoder=stock.semantic_encoder or base.semantic_encoder,
            geometry_encoder=replace(
                encoder, windows="per_image", projection_init=base.geometry_encoder.projection_init
            ),
            heads=_fitting(base.heads, stock.decoder.hidden_size),
            tokens=stock.vocabulary.tokens,
            semantic_image_attention="causal",
        )
        specs = G2VLMForConditionalGeneration.tensor_specs(config)
    stock.require_complete(specs)
    semantic = stock.source(specs)
    given: list[TensorSource] = [semantic] if dinov2_source is None else [semantic, dinov2_source]
    if geometric_init == "copy_semantic":
        given.insert(0, Translated(semantic, copy_recipes(semantic.specs, specs)))
    new = [name for name in specs if not any(name in source.specs for source in given)]
    random = RandomTensors(config, new, seed, storage_dtype(semantic.specs))
    return Initial(config, Layered(specs, [*given, random]), stock, dinov2_source)


def _fitting(heads: HeadsConfig, width: int) -> HeadsConfig:
    """The heads with as many attention heads as configured, or, where those do not divide the width, of 64 each."""
    fits = width % heads.num_heads == 0 and width // heads.num_heads % 4 == 0
    return heads if fits else replace(heads, num_heads=max(width // HEAD_DIM, 1))


class Layered:
    """Named tensors, each from the first source that has it."""

    def __init__(self, names: Iterable[str], sources: Sequence[TensorSource]):
        self._owner = {name: next(source for source in sources if name in source.specs) for name in names}
        self.specs = {name: source.specs[name] for name, source in self._owner.items()}

    def load(self, name: str) -> Tensor:
        """The tensor, from the source that owns it."""
        return self._owner[name].load(name)


class RandomTensors:
    """Initial values of all that no public checkpoint gives; a module's depend on the seed and its name alone."""

    def __init__(self, config: G2VLMConfig, names: Iterable[str], seed: int, dtype: torch.dtype):
        with torch.device("meta"):
            self._model = G2VLMForConditionalGeneration(config)
        self._seed = seed
        specs = self._model.tensor_specs(config)
        self.specs = cast({name: specs[name] for name in names}, dtype)

    def load(self, name: str) -> Tensor:
        """A tensor of the model."""
        path, _, parameter = name.rpartition(".")
        module = self._model.get_submodule(path).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + zlib.crc32(path.encode()))
            if path.startswith("semantic_encoder."):
                init_vision_tower_module(self._model.semantic_encoder, module)
            else:
                self._model._init_weights(module)
        value = module.get_parameter(parameter).detach().to(self.specs[name].dtype)
        module.to_empty(device="meta", recurse=False)
        return value
