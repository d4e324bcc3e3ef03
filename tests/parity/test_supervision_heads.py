"""Heads of geometric supervision against the released ones, with their weights (tests/golden/supervision/README.md)."""

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from g2vlm.supervision.dense_head import DenseHead, DPTWidths, uv_embedding, uv_grid
from g2vlm.supervision.heads import FeatureAlignmentHead
from tests.parity import golden

pytestmark = pytest.mark.parity

DENSE = golden.cases("supervision/dense_head*.safetensors")
ALIGNMENT = golden.cases("supervision/feature_alignment*.safetensors")
DENSE_TOLERANCE = 1e-4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}

# Patterns of the released names -> ours; levels there count from 1.
DENSE_NAMES = [
    (r"^dense_head\.", ""),
    (r"^(norm|projects)\b", r"body.\1"),
    (r"^resize_layers\b", "body.resizes"),
    (r"^scratch\.layer(\d)_rn", lambda match: f"body.levels.{int(match[1]) - 1}"),
    (r"^scratch\.refinenet(\d)", lambda match: f"body.fusions.{int(match[1]) - 1}"),
    ("resConfUnit1", "lateral"),
    ("resConfUnit2", "refine"),
    ("out_conv", "output"),
    (r"^proj\b", "tail.values"),
]
ALIGNMENT_NAMES = {"head.norm": "mlp.norm", "head.fc1": "mlp.layers.0", "head.fc2": "mlp.layers.1"}


def our_dense_name(name: str) -> str:
    for pattern, replacement in DENSE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def released_dense_head(tensors: dict[str, Tensor]) -> DenseHead:
    weights = {our_dense_name(name): value for name, value in tensors.items() if name.startswith("dense_head.")}
    levels = tuple(weights[f"body.projects.{level}.weight"].shape[0] for level in range(4))
    fused = weights["body.levels.0.weight"].shape[0]
    patch_size = 4 * math.isqrt(weights["tail.values.weight"].shape[0])
    head = DenseHead(len(weights["body.norm.weight"]), patch_size, widths=DPTWidths(levels, fused))
    head.load_state_dict(weights)
    return head


def token_grid(path: Path) -> tuple[int, int]:
    with safe_open(path, "pt") as file:
        height, width, patch = map(int, re.findall(r"\d+", file.metadata()["input_hw"])[:3])
    return height // patch, width // patch


@pytest.mark.parametrize("path", DENSE)
def test_dense_head(path: Path) -> None:
    tensors = load_file(path)
    head = released_dense_head(tensors)
    layers = [tensors[f"hidden{level}"].unflatten(-2, token_grid(path)) for level in range(4)]
    outputs = {name: value for name, value in tensors.items() if name.startswith("depth_")}
    assert outputs
    for name, expected in outputs.items():
        height, width = map(int, name.removeprefix("depth_").split("x"))
        depth = head(layers, (height, width)).values.squeeze(-1)
        torch.testing.assert_close(depth, expected, rtol=DENSE_TOLERANCE, atol=DENSE_TOLERANCE)


@pytest.mark.parametrize("path", DENSE)
def test_position_embedding(path: Path) -> None:
    tensors = load_file(path)
    expected = tensors["uv_grid"]
    height, width = expected.shape[:2]
    corner = expected[-1, -1] * torch.tensor([width / (width - 1), height / (height - 1)])  # of the rectangle
    grid = uv_grid(height, width, aspect=(corner[0] / corner[1]).item())
    torch.testing.assert_close(grid, expected, **TOLERANCE)
    torch.testing.assert_close(
        uv_embedding(expected, tensors["pos_embed"].shape[-1]), tensors["pos_embed"], **TOLERANCE
    )


@pytest.mark.parametrize("path", ALIGNMENT)
@pytest.mark.parametrize("output", ["projected", "projected_pool2"])
def test_feature_alignment_head(path: Path, output: str) -> None:
    tensors = load_file(path)
    student, expected = tensors["student"], tensors[output]
    weights = {}
    for theirs, ours in ALIGNMENT_NAMES.items():
        weights |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    head = FeatureAlignmentHead(student.shape[-1], expected.shape[-1])
    head.load_state_dict(weights)
    torch.testing.assert_close(head(student, expected.shape[1:3]), expected, **TOLERANCE)
