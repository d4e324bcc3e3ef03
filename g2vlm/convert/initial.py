"""An initial checkpoint: semantic half from a Qwen2-VL, geometry encoder from a DINOv2, the rest random."""

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
from g2vlm.errors import CheckpointError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.weights import TensorSource, cast, storage_dtype, subset


@dataclass(frozen=True)
class Initial:
    """An initial checkpoint and what it is made from, all under our names except `qwen.files`."""

    config: G2VLMConfig
    source: TensorSource
    qwen: Qwen2VL
    dinov2: TensorSource


def open_initial(
    qwen_folder: Path, dinov2: Path, geometric_init: Literal["random", "copy_semantic"] = "random", seed: int = 0
) -> Initial:
    """Put an initial checkpoint together without reading any weight yet.

    The semantic expert keeps a stock decoder's ways (no qk-norm, causal over image tokens); the geometry encoder's
    windows follow the images. New tensors are as `_init_weights` makes them, in the semantic half's storage type.

    Raises:
        CheckpointError: either source is damaged, incomplete, or of a kind that we do not compute.
    """
    qwen = open_qwen2_vl(qwen_folder, geometric_init=geometric_init)
    encoder, dinov2_source = open_dinov2(dinov2)
    try:
        config = G2VLMConfig(
            decoder=qwen.decoder,
            semantic_encoder=qwen.semantic_encoder,
            geometry_encoder=replace(encoder, windows="per_image"),
            tokens=qwen.tokens,
            semantic_image_attention="causal",
        )
    except ValueError as error:
        raise CheckpointError(f"cannot start from {qwen_folder}", str(error), "use another size") from None
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
    """The model's random initial values of everything that no public checkpoint gives: one module in memory at a time.

    A module's values depend on the seed and the module alone, not on what is asked for before.
    """

    def __init__(self, config: G2VLMConfig, seed: int, dtype: torch.dtype):
        with torch.device("meta"):
            self._model = G2VLMForConditionalGeneration(config)
        layers = [f"decoder.layers.{i}.geometric" for i in range(config.decoder.num_layers)]
        self._modules = [*layers, "decoder.geometric_norm", "geometry_projection", "heads"]
        self._seed = seed
        self._current: str | None = None
        specs = self._model.tensor_specs(config)
        prefixes = tuple(f"{module}." for module in self._modules)
        self.specs = cast(subset(specs, (name for name in specs if name.startswith(prefixes))), dtype)

    def load(self, name: str) -> Tensor:
        """A tensor of the model."""
        module = next(module for module in self._modules if name.startswith(f"{module}."))
        if module != self._current:
            self._fill(module)
        return self._model.get_parameter(name).detach().to(self.specs[name].dtype)

    def _fill(self, name: str) -> None:
        if self._current is not None:
            self._model.get_submodule(self._current).to_empty(device="meta")
        module = self._model.get_submodule(name).to_empty(device="cpu")
        self._current = name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._modules.index(name))
            module.apply(self._model._init_weights)
            self._model._init_weights(self._model)
