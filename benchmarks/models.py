"""Models with random weights, made on the device that runs them."""

import argparse

import torch
from torch import Tensor

from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from geometry import GeometryPrediction

FLOAT32_PARTS = tuple(f"heads.{name}." for name in G2VLMForConditionalGeneration._keep_in_fp32_modules_strict or ())


def add_preset_option(parser: argparse.ArgumentParser) -> None:
    """Let the command line choose the model."""
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: paper_2b on a GPU, else tiny")


def chosen_preset(args: argparse.Namespace, device: torch.device) -> str:
    """The preset that a parsed command line names."""
    return args.preset or ("paper_2b" if device.type == "cuda" and not args.tiny else "tiny")


def chosen_dtype(device: torch.device) -> torch.dtype:
    """Of weights that are not trained: bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def chosen_model(
    args: argparse.Namespace, device: torch.device
) -> tuple[G2VLMForConditionalGeneration, dict[str, object]]:
    """The model that a parsed command line names, equal in every run, and what a result says about it."""
    preset, dtype = chosen_preset(args, device), chosen_dtype(device)
    torch.manual_seed(0)
    settings: dict[str, object] = {"preset": preset, "dtype": str(dtype), "weights": "random"}
    return random_model(PRESETS[preset](), device, dtype), settings


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
