"""Models with random weights, made on the device that runs them."""

import torch
from torch import Tensor

from g2vlm.config import G2VLMConfig
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from geometry import GeometryPrediction

FLOAT32_PARTS = tuple(f"heads.{name}." for name in G2VLMForConditionalGeneration._keep_in_fp32_modules_strict or ())


def random_model(config: G2VLMConfig, device: torch.device, dtype: torch.dtype) -> G2VLMForConditionalGeneration:
    """A model whose weights were drawn on the device, heads in float32 as after loading a checkpoint."""
    with torch.device(device):
        model = G2VLMForConditionalGeneration(config)
    return cast_weights(model.eval(), dtype)


@torch.no_grad()
def cast_weights(model: G2VLMForConditionalGeneration, dtype: torch.dtype) -> G2VLMForConditionalGeneration:
    """Change the weights' precision in place; buffers and the output heads stay in float32."""
    for name, parameter in model.named_parameters():
        if not name.startswith(FLOAT32_PARTS):
            parameter.data = parameter.data.to(dtype)
    return model


def random_views(num_views: int, height: int, width: int, device: torch.device) -> Tensor:
    """Views (S, 3, H, W) in [0, 1], the same in every run: smooth random fields."""
    generator = torch.Generator().manual_seed(num_views)
    coarse = torch.rand(num_views, 3, 8, 8, generator=generator).to(device)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def prediction_tensors(prediction: GeometryPrediction) -> list[Tensor]:
    """What a reconstruction is compared by."""
    return [prediction.local_points, prediction.cam_to_world, prediction.normals]
