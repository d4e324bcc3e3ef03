"""An initial checkpoint: semantic half from a Qwen2-VL, geometry encoder from a DINOv2, the rest random."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from g2vlm.config import G2VLMConfig
from g2vlm.convert.dinov2 import open_dinov2
from g2vlm.convert.keymap import Translated
from g2vlm.convert.qwen2_vl import Qwen2VL, copy_recipes, open_qwen2_vl
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.loading import possible_config
from g2vlm.weights import TensorSource, cast, storage_dtype

GeometricInit = Literal["random", "copy_semantic"]


@dataclass(frozen=True)
class Initial:
    """An initial checkpoint and what it is made from, all under our names except `qwen.files`."""

    config: G2VLMConfig
    source: TensorSource
    qwen: Qwen2VL
    dinov2: TensorSource


def open_initial(qwen_folder: Path, dinov2: Path, geometric_init: GeometricInit = "random", seed: int = 0) -> Initial:
    """Put an initial checkpoint together without reading any weight yet.

    The semantic expert keeps a stock decoder's ways (no qk-norm, causal over image tokens); the geometry encoder's
    windows follow the images. New tensors are as `_init_weights` makes them, in the semantic half's storage type.

    Raises:
        CheckpointError: either source is damaged, incomplete, or of a kind that we do not compute.
    """
    qwen = open_qwen2_vl(qwen_folder, geometric_init=geometric_init)
    encoder, dinov2_source = open_dinov2(dinov2)
    with possible_config(qwen_folder):
        config = G2VLMConfig(
            decoder=qwen.decoder,
            semantic_encoder=qwen.semantic_encoder,
            geometry_encoder=replace(encoder, windows="per_image"),
            tokens=qwen.tokens,
            semantic_image_attention="causal",
        )
        specs = G2VLMForConditionalGeneration.tensor_specs(config)
    qwen.require_complete(specs)
    semantic = qwen.source()
    sources = [semantic, dinov2_source, RandomTensors(config, seed, storage_dtype(semantic.specs))]
    if geometric_init == "copy_semantic":
        sources.insert(0, Translated(semantic, copy_recipes(semantic.specs, specs)))
    return Initial(config, Layered(specs, sources), qwen, dinov2_source)


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

    def __init__(self, config: G2VLMConfig, seed: int, dtype: torch.dtype):
        with torch.device("meta"):
            self._model = G2VLMForConditionalGeneration(config)
        self._seed = seed
        specs = self._model.tensor_specs(config)
        self.specs = cast({name: specs[name] for name in specs if _is_new(name)}, dtype)

    def load(self, name: str) -> Tensor:
        """A tensor of the model."""
        path, _, parameter = name.rpartition(".")
        module = self._model.get_submodule(path).to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + zlib.crc32(path.encode()))
            self._model._init_weights(module)
        value = module.get_parameter(parameter).detach().to(self.specs[name].dtype)
        module.to_empty(device="meta", recurse=False)
        return value


def _is_new(name: str) -> bool:
    return name.startswith(("geometry_projection.", "heads.")) or ".geometric" in name
