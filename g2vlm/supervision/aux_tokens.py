"""Learned probe tokens that a camera and a scale are read from (GeoVR)."""

import torch
from torch import nn

from g2vlm.supervision.backbones.base import Probes


class AuxTokens(nn.Module):
    """Embeddings of the camera tokens, one per view, and of the scale token, one per clip.

    The first view has a camera vector of its own: it is the one that the others' poses refer to.

    Args:
        hidden_size: d, the decoder's width.
        initializer_range: standard deviation of the first values; the decoder's own keeps probes at the scale of other
            embeddings.
        camera, scale: which of them there are; at least one.
    """

    def __init__(self, hidden_size: int, initializer_range: float = 0.02, *, camera: bool = True, scale: bool = True):
        super().__init__()
        self.camera = _vector(initializer_range, 2, hidden_size) if camera else None
        self.scale = _vector(initializer_range, hidden_size) if scale else None

    def forward(self) -> Probes:
        """What a backbone inserts."""
        return Probes(self.camera, self.scale)


def _vector(std: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)
