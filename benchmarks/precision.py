"""bfloat16 against float32 on the same device: how far points, cameras and normals of a random model move.

Both choices of the residual stream's precision are measured; nothing is timed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import Report, argument_parser, chosen_attention, parse_device, relative_error
from benchmarks.models import cast_weights, random_model, random_views
from g2vlm.config import PRESETS, G2VLMConfig
from g2vlm.processing import recon_inputs
from geometry import GeometryPrediction, geodesic_angle, relative_cam

RESIDUALS = ("bfloat16", "float32")


@torch.inference_mode()
def predict(config: G2VLMConfig, views: Tensor, dtype: torch.dtype) -> GeometryPrediction:
    """The prediction of a model with the same random weights in every call, cast to `dtype`."""
    torch.manual_seed(0)
    model = cast_weights(random_model(config, views.device, torch.float32), dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        (prediction,) = model(**recon_inputs(views, config, views.device)).geometry
    return prediction


def compare(given: GeometryPrediction, expected: GeometryPrediction) -> dict[str, object]:
    """Relative errors of points and translations, angles of relative rotations and normals in degrees."""
    relative, reference = (relative_cam(p.cam_to_world) for p in (given, expected))
    rotation = geodesic_angle(relative[..., :3, :3], reference[..., :3, :3]).rad2deg()
    chord = (given.normals - expected.normals).norm(dim=-1)  # (S, H, W)
    normal = 2 * (chord / 2).clamp(max=1).asin().rad2deg()
    return {
        "point error": f"{relative_error(given.local_points, expected.local_points):.1e}",
        "translation error": f"{relative_error(relative[..., :3, 3], reference[..., :3, 3]):.1e}",
        "rotation max deg": round(float(rotation.max()), 3),
        "normal median deg": round(float(normal.median()), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and report."""
    parser = argument_parser("precision", __doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: small; with --tiny: tiny")
    args = parser.parse_args(arguments)
    device = parse_device(args)
    preset = args.preset or ("tiny" if args.tiny else "small")
    config = PRESETS[preset]()
    side = 56 if args.tiny else 224
    report = Report("precision", device, {"preset": preset, "weights": "random"}, chosen_attention())
    for num_views in (2,) if args.tiny else (1, 4, 8):
        views = random_views(num_views, side, side, device)
        expected = predict(config, views, torch.float32)
        for residual in RESIDUALS:
            half = PRESETS[preset](decoder=replace(config.decoder, residual_dtype=residual))
            errors = compare(predict(half, views, torch.bfloat16), expected)
            report.rows.append({"size": f"{side}x{side}", "views": num_views, "residual": residual, **errors})
    report.publish(args.output, args.note)


if __name__ == "__main__":
    main()
