"""Learned probe tokens that a camera and a scale are read from (GeoVR)."""

import torch
from torch import Tensor, nn


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
        self.first_camera = nn.Parameter(torch.empty(hidden_size))
        self.later_camera = nn.Parameter(torch.empty(hidden_size))
        self.scale = nn.Parameter(torch.empty(hidden_size))
        for vector in self.parameters():
            nn.init.normal_(vector, std=initializer_range)

    def forward(self, num_views: int) -> Tensor:
        """Camera tokens (S, d) of a clip; the scale token is `scale` (d,).

        Raises:
            ValueError: fewer than one view.
        """
        if num_views < 1:
            raise ValueError(f"num_views: given {num_views}, must be at least 1")
        return torch.cat([self.first_camera[None], self.later_camera.expand(num_views - 1, -1)])
