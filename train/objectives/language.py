"""Cross-entropy of the answers (G2VLM stage 2).

Every token of an answer, its end included, is predicted from those before it. Shapes: L tokens with a label, C entries
of the vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from g2vlm.data.batch import SceneBatch
from g2vlm.model.outputs import G2VLMOutput
from train.config import LanguageConfig
from train.objectives.report import Batch, LossReport, Term


@dataclass(frozen=True)
class LanguageObjective:
    """The weighted mean cross-entropy of all supervised tokens of all ranks.

    With `token` every token weighs the same (the released trainer's default); with `sample_sqrt` those of an answer of
    n tokens weigh 1 / sqrt(n), and the sum is divided by the sum of the weights (its reweighting, off in its scripts).
    """

    config: LanguageConfig
    name: str = "language"

    def __call__(self, output: G2VLMOutput, batch: Batch) -> LossReport:
        """One term, 0 for a batch without labels."""
        assert not isinstance(batch, SceneBatch)
        assert output.logits is not None
        weights = batch.label_weights
        if self.config.reduction == "token":
            weights = (weights > 0).to(weights)
        losses = token_losses(output.logits, batch.label_ids)
        count = weights.sum()
        return {"language": Term((losses * weights).sum() / count.clamp_min(1), count, self.config.weight)}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in float32: logits (L, C), labels (L,) -> (L,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")
