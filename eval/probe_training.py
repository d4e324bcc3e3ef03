"""The depth probe: one DPT head, trained on what a frozen model's layers hold (SpatialSV's analysis, Probe3D's form).

Shapes: F frames, H W pixels of a depth map.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.probe_data import Features
from g2vlm.supervision.dense_head import DPTHead, DPTWidths
from geometry.losses.dense import gradient_loss, regression_loss, residual_norm

EVALUATED = 64
"""Frames that are predicted together."""


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is made and trained.

    Args:
        steps: of AdamW.
        batch: frames of a step.
        lr: at its largest; it rises over the first twentieth and falls to zero as a cosine.
        weight_decay: of AdamW.
        channels: the head's fused width C; its levels have C, 2 C, 4 C and 4 C (256: those of the published heads).
        seed: of the weights and of the order of frames.
    """

    steps: int = 300
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    channels: int = 32
    seed: int = 0

    @property
    def widths(self) -> DPTWidths:
        """Of the head."""
        c = self.channels
        return DPTWidths((c, 2 * c, 4 * c, 4 * c), c)


@dataclass(frozen=True, eq=False)
class Probe:
    """A trained head.

    Args:
        head: depth alone, no confidence.
        curve: (steps, 2) step and mean absolute error in metres of its batch.
    """

    head: DPTHead
    curve: list[tuple[int, float]]

    @torch.inference_mode()
    def predict(self, features: Features) -> Tensor:
        """Depth (F, H, W) in metres."""
        self.head.eval()
        device = next(self.head.parameters()).device
        found = []
        for start in range(0, len(features), EVALUATED):
            layers = [part[start : start + EVALUATED].to(device) for part in features.layers]
            found.append(self.head(layers, features.size).values[..., 0].cpu())
        return torch.cat(found)


def train_probe(
    features: Features,
    config: ProbeConfig,
    device: torch.device | str = "cpu",
    watch: Callable[[int, Probe], None] = lambda step, probe: None,
) -> Probe:
    """Train a head on mean absolute error plus gradient matching, over shuffled frames.

    The head begins with a LayerNorm, so that one learning rate serves every model, and starts at about the mean depth.

    Args:
        features: of training rooms.
        config: how.
        device: of the head.
        watch: called after every step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = DPTHead(features.layers[0].shape[-1], widths=config.widths)
        start_at(head, features.depth[features.valid].log().mean())
        head.to(device).train()
        order = torch.Generator().manual_seed(config.seed)
        optimizer = torch.optim.AdamW(head.parameters(), config.lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_lr(step, config.steps))
        probe = Probe(head, [])
        waiting = torch.zeros(0, dtype=torch.int64)
        for step in range(1, config.steps + 1):
            if len(waiting) < config.batch:
                waiting = torch.randperm(len(features), generator=order)
            chosen, waiting = waiting[: config.batch], waiting[config.batch :]
            depth, valid = features.depth[chosen].to(device), features.valid[chosen].to(device)
            head.train()
            predicted = head([part[chosen].to(device) for part in features.layers], features.size).values
            error = regression_loss(residual_norm(predicted, depth[..., None], valid), valid)
            loss = error + gradient_loss(predicted[..., 0], depth, valid)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            probe.curve.append((step, float(error.detach())))
            watch(step, probe)
    return probe


def start_at(head: DPTHead, log_depth: Tensor) -> None:
    """Let the untrained head predict about this depth."""
    bias = head.tail.values.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(float(log_depth))


def share_of_lr(step: int, steps: int) -> float:
    """Of the largest learning rate."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
