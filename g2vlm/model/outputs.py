"""What a forward pass returns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput  # pyright: ignore[reportPrivateImportUsage]

from g2vlm.model.cache import KVCache
from geometry import GeometryPrediction


@dataclass
class G2VLMOutput(ModelOutput):
    """Result of `G2VLMForConditionalGeneration.forward`.

    Args:
        logits: (n, vocab) float at the requested semantic tokens.
        geometry: one prediction per geometry segment of the sequence, views first: local_points (S, H, W, 3).
        geometric_hidden: (G, D) the geometric expert's final hidden states, expert layout.
        semantic_hidden: (U, D) the semantic expert's.
        cache: keys and values of all tokens so far, if they were asked for.
    """

    logits: Tensor | None = None
    geometry: tuple[GeometryPrediction, ...] | None = None
    geometric_hidden: Tensor | None = None
    semantic_hidden: Tensor | None = None
    cache: KVCache | None = None
