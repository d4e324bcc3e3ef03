"""The single-encoder ablation (G2VLM section 4.3): geometry tokens from the semantic encoder's patch features.

Shapes: S views, P = gh * gw patches, D tower width.
"""

import torch
from torch import Tensor, nn

from g2vlm.compat import run_vision_tower
from g2vlm.config import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, VisionTowerConfig


class SharedTower(nn.Module):
    """Feeds views to a Qwen2-VL vision tower that another module owns, and returns its features before the merger."""

    keeps_images_apart = True

    def __init__(self, config: VisionTowerConfig, tower: nn.Module):
        super().__init__()
        self.config = config
        self._tower = (tower,)  # in a tuple: the owner registers the parameters

    def forward(self, images: Tensor) -> Tensor:
        """ImageNet-normalised images (S, 3, H, W), sides multiples of 28 -> patch features (S, P, D), row-major."""
        patch, merge = self.config.patch_size, self.config.merge_size
        num_views, _, height, width = images.shape
        if height % (patch * merge) or width % (patch * merge):
            raise ValueError(f"views of {width}x{height}; the single encoder needs sides that are multiples of 28")
        rows, cols = height // patch // merge, width // patch // merge
        pixels = _imagenet_to_clip(images).reshape(num_views, 3, rows, merge, patch, cols, merge, patch)
        pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (S, rows, cols, merge, merge, 3, patch, patch)
        pixels = pixels.unsqueeze(6).expand(*[-1] * 6, self.config.temporal_patch_size, -1, -1)
        grid_thw = torch.tensor([[1, rows * merge, cols * merge]] * num_views, device=images.device)
        patches = pixels.reshape(-1, pixels[0, 0, 0, 0, 0].numel())
        features = run_vision_tower(self._tower[0], patches, grid_thw).patches
        features = features.reshape(num_views, rows, cols, merge, merge, -1).transpose(2, 3)
        return features.reshape(num_views, rows * cols * merge * merge, -1)


def _imagenet_to_clip(images: Tensor) -> Tensor:
    """Change the per-channel normalisation of (S, 3, H, W)."""
    mean, std, clip_mean, clip_std = (
        images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD)
    )
    return (images * std + mean - clip_mean) / clip_std
