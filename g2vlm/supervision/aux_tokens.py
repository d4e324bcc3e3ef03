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
    """

    def __init__(self, hidden_size: int, initializer_range: float = 0.02):
        super().__init__()
        self.camera = nn.Parameter(torch.empty(2, hidden_size))
        self.scale = nn.Parameter(torch.empty(hidden_size))
        for vector in self.parameters():
            nn.init.normal_(vector, std=initializer_range)

    def forward(self) -> Probes:
        """What a backbone inserts."""
        return Probes(self.camera, self.scale)
