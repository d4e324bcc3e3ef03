"""How much the order of the views changes a reconstruction, for each position and window rule.

    python -m benchmarks.view_order --model tests/golden/g2vlm_tiny

Reports the largest difference between the outputs for permuted views, put back in order, and for straight views, as a
fraction of the output's largest value. Poses are compared relative to the first view.
"""

import argparse

import torch

from g2vlm.checkpoint import load_model
from g2vlm.config import Windows
from g2vlm.encoders.dinov2 import DinoV2
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs
from geometry import GeometryPrediction, invert_rigid

RULES: list[tuple[str, Windows]] = [
    ("sequential", "official"),
    ("sequential", "per_image"),
    ("shared", "official"),
    ("shared", "per_image"),
]


@torch.inference_mode()
def deviation(model: G2VLMForConditionalGeneration, images: torch.Tensor, order: torch.Tensor) -> tuple[float, float]:
    """Relative deviation of local points and of relative poses for views (S, 3, H, W)."""
    straight, permuted = (predict(model, views) for views in (images, images[order]))
    inverse = torch.argsort(order)
    points = relative_error(permuted.local_points[inverse], straight.local_points)
    poses = relative_error(*(to_first_view(p) for p in (permuted.cam_to_world[inverse], straight.cam_to_world)))
    return points, poses


def predict(model: G2VLMForConditionalGeneration, images: torch.Tensor) -> GeometryPrediction:
    (prediction,) = model(**recon_inputs(images, model.config, "cpu")).geometry
    return prediction


def to_first_view(cam_to_world: torch.Tensor) -> torch.Tensor:
    return invert_rigid(cam_to_world[:1]) @ cam_to_world


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--views", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=(56, 70), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    model = load_model(args.model, dtype=torch.float32).eval()
    assert isinstance(model.geometry_encoder, DinoV2)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.views, 3, *args.size, generator=generator)
    order = torch.randperm(args.views, generator=generator)
    print(f"{args.model}, {args.views} random views of {args.size[1]}x{args.size[0]}, order {order.tolist()}\n")
    print("| positions | DINOv2 windows | local points | relative poses |\n|---|---|---|---|")
    for positions, windows in RULES:
        model.config.view_positions = positions
        model.geometry_encoder.windows = windows
        points, poses = deviation(model, images, order)
        print(f"| {positions} | {windows} | {points:.1e} | {poses:.1e} |")


if __name__ == "__main__":
    main()
