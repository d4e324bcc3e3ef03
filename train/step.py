"""One training step: forward, objectives, the rules about bad batches, backward, clipping, optimizer.

The terms of a step are means over the entries of all ranks. Each rank scales its own mean by its share of the entries,
so that the averaged gradient is that of the joined batch.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from g2vlm.errors import TrainingAborted
from g2vlm.model.outputs import G2VLMOutput
from train.config import GuardConfig
from train.engine import Engine
from train.objectives.report import Batch, LossReport, Objective


@dataclass(frozen=True)
class StepResult:
    """What a step did, equal on all ranks.

    Args:
        loss: total over all ranks.
        terms: unweighted means over all ranks.
        counts: how many entries each is the mean of.
        grad_norm: before clipping.
        dropped: None; `spike`: it contributed zero; `nonfinite`: nothing was changed.
        stop: some rank was asked to stop.
        bad: unreadable scenes of all ranks.
    """

    loss: float
    terms: dict[str, float]
    counts: dict[str, float]
    grad_norm: float
    dropped: str | None
    stop: bool
    bad: int


@dataclass
class Trainer:
    """A wrapped model, its optimizer and its objectives.

    Args:
        engine: how it trains.
        model: what the engine's `wrap` returned.
        optimizer: over the trained parameters.
        objectives: their terms are added up.
        clip: largest gradient norm.
    """

    engine: Engine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    objectives: Sequence[Objective]
    clip: float = 1.0

    def step(
        self,
        inputs: Mapping[str, Any],
        batch: Batch,
        spike: float | None = None,
        stop: bool = False,
        bad: int = 0,
    ) -> StepResult:
        """Train on one batch.

        Backward always runs, on all ranks; the loss is multiplied by zero where the spike rule applies (G2VLM,
        implementation details), and the optimizer is passed over when the joined loss or the gradient is not finite.

        Args:
            inputs: keyword arguments of the model's forward.
            batch: this rank's, on its device.
            spike: joined loss above which the batch contributes zero; None: never.
            stop: this rank was asked to stop.
            bad: scenes that this rank could not read.
        """
        output = self.model(**inputs)
        report: LossReport = {}
        for objective in self.objectives:
            report |= objective(output, batch)
        joined, counts, loss, notes = self._join(report, (float(stop), float(bad)))
        total = torch.stack([joined[name] * term.factor for name, term in report.items()]).sum()
        spiked = torch.zeros_like(total, dtype=torch.bool) if spike is None else total > spike
        self.engine.backward(torch.where(spiked, 0.0, 1.0) * loss)
        norm = self.engine.clip(self._parameters(), self.clip)
        # what a step needs the device for is waited for here, once
        values = torch.stack([total, norm.to(total), spiked.to(total), *notes, *joined.values(), *counts]).tolist()
        finite = all(torch.tensor(values[:2]).isfinite().tolist())
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dropped = "nonfinite" if not finite else "spike" if values[2] else None
        terms = dict(zip(joined, values[5 : 5 + len(joined)], strict=True))
        numbers = dict(zip(joined, values[5 + len(joined) :], strict=True))
        return StepResult(values[0], terms, numbers, values[1], dropped, stop=values[3] > 0, bad=int(values[4]))

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Any], batch: Batch) -> tuple[dict[str, float], G2VLMOutput]:
        """The joined loss of a batch with its terms, those without entries left out, and this rank's output."""
        output = self.model(**inputs)
        report: LossReport = {}
        for objective in self.objectives:
            report |= objective(output, batch)
        joined, counts, *_ = self._join(report)
        total = sum(joined[name].item() * term.factor for name, term in report.items())
        entries = dict(zip(joined, counts.tolist(), strict=True))
        return {"loss": total, **{name: value.item() for name, value in joined.items() if entries[name]}}, output

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _join(
        self, report: LossReport, notes: Sequence[float] = ()
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, list[Tensor]]:
        """Each term's mean and count over all ranks; this rank's loss, to be averaged; the notes summed over ranks."""
        values = torch.stack([term.value for term in report.values()])  # (terms,)
        counts = torch.stack([term.count for term in report.values()]).to(values)
        factors = torch.tensor([term.factor for term in report.values()]).to(values)
        own = torch.cat([values.detach() * counts, counts, counts.new_tensor(notes)])
        sums, totals, noted = self.engine.sum(own).split([len(values), len(values), len(notes)])
        shares = totals.clamp_min(1)
        loss = (values * factors * counts * self.engine.world / shares).sum()
        return dict(zip(report, (sums / shares).unbind(), strict=True)), totals, loss, list(noted.unbind())


@dataclass
class Guard:
    """Remembers dropped steps and stops a run that drops too many (DESIGN 2.18).

    `recent` holds, for the last `window` steps, whether each was dropped; it is part of the run's state.
    """

    config: GuardConfig
    recent: deque[bool] = field(default_factory=deque)
    dropped: int = 0
    scenes: int = 0
    bad_scenes: int = 0

    def check_step(self, step: int, reason: str | None) -> None:
        """Take note of a step.

        Raises:
            TrainingAborted: too many dropped steps in the window, or in a row.
        """
        self.recent.append(reason is not None)
        self.dropped += reason is not None
        while len(self.recent) > self.config.window:
            self.recent.popleft()
        in_a_row = next((i for i, bad in enumerate(reversed(self.recent)) if not bad), len(self.recent))
        share = sum(self.recent) / self.config.window
        if share > self.config.max_dropped_share or in_a_row > self.config.max_dropped_in_a_row:
            raise TrainingAborted(
                f"training stopped at step {step}: {sum(self.recent)} of the last {len(self.recent)} steps were "
                f"dropped, {in_a_row} in a row",
                f"the last one was {reason}",
                "lower optim.lr, lengthen schedule.warmup, or look at the batches named in log.jsonl",
            )

    def check_scenes(self, scenes: int, bad: int) -> None:
        """Take note of scenes asked for and found unreadable.

        Raises:
            TrainingAborted: too many were unreadable.
        """
        self.scenes += scenes
        self.bad_scenes += bad
        if self.bad_scenes > max(self.config.max_bad_scenes_share * self.scenes, 1):
            raise TrainingAborted(
                f"{self.bad_scenes} of {self.scenes} scenes could not be read",
                f"guards.max_bad_scenes_share is {self.config.max_bad_scenes_share}; see bad_samples.jsonl",
                "repair or remove those scenes: g2vlm data check finds them",
            )

    def state(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "recent": [int(bad) for bad in self.recent],
            "dropped": self.dropped,
            "scenes": self.scenes,
            "bad_scenes": self.bad_scenes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """From what `state` gave."""
        self.recent = deque(bool(bad) for bad in state["recent"])
        self.dropped, self.scenes, self.bad_scenes = state["dropped"], state["scenes"], state["bad_scenes"]
