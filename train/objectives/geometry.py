"""Points, normals and cameras of every scene of a batch (G2VLM eq. 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from g2vlm.config import G2VLMConfig
from g2vlm.data.batch import SceneBatch
from g2vlm.model.outputs import G2VLMOutput
from g2vlm.processing import normalise_views, recon_sequence
from g2vlm.sequence import GeometryAttention
from geometry import GeometryPrediction, geometry_losses
from geometry.losses import TERM_COUNTS
from train.config import GeometryConfig
from train.objectives.report import Batch, LossReport, Term, joined
from train.stock.batch import StockBatch


@dataclass(frozen=True)
class GeometryObjective:
    """The geometry loss; terms with weight 0 are left out of the report."""

    config: GeometryConfig
    name: str = "geometry"

    def __call__(self, output: G2VLMOutput, batch: Batch) -> LossReport:
        """Terms of a batch whose scenes are the geometry segments of the output, in order.

        A scene without depth has no entries; a batch without scenes (on all ranks: `Filling`) has no terms.
        """
        assert not isinstance(batch, StockBatch)
        geometry = output.geometry or ()
        return joined([self._report([geometry[i] for i in members], scenes) for members, scenes in batch.groups()])

    def _report(self, predictions: Sequence[GeometryPrediction], scenes: SceneBatch) -> LossReport:
        losses = geometry_losses(GeometryPrediction.stack(predictions), scenes.targets, self.config)
        factors = self.config.factors()
        return {
            name: Term(value, losses.counts[TERM_COUNTS[name]], self.config.weight * factors[name])
            for name, value in losses.terms.items()
            if factors[name]
        }


def recon_batch_inputs(batch: SceneBatch, config: G2VLMConfig, coin: bool, global_points: bool) -> dict[str, Any]:
    """Keyword arguments of the model's forward: the released reconstruction sequence for every scene.

    Args:
        batch: on the device of the model.
        config: the model's.
        coin: of this step; with `mixed` attention it chooses frame (True) or global attention for all layers.
        global_points: also predict global points.
    """
    views = batch.views
    attention = ("frame" if coin else "global") if config.geometry_attention == "mixed" else None
    sequence = recon_sequence(list(views), config, cast(GeometryAttention | None, attention))
    return {
        "sequence": sequence.to(views.device),
        "views": list(normalise_views(views)),
        "predict_global_points": global_points and config.heads.global_points,
    }
