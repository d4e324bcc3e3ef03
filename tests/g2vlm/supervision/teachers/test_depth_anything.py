"""Depth teachers of transformers, with random weights."""

from pathlib import Path

import pytest
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from g2vlm.errors import CheckpointError, InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.teachers.registry import build_teacher
from tests.g2vlm.supervision.teachers.fakes import AnalyticScene


def network(kind: str) -> DepthAnythingForDepthEstimation:
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            head_hidden_size=8, depth_estimation_type=kind, max_depth=20,
        )
    )  # fmt: skip


def test_metric_depth_is_taken_frame_by_frame(tmp_path: Path) -> None:
    network("metric").save_pretrained(tmp_path / "w")
    teacher = build_teacher("depth_anything", weights=str(tmp_path / "w"))
    clip = AnalyticScene((30, 42), corner=False).clip()
    found = teacher.complete(clip, None)
    assert found.size == (28, 42)
    assert ((found.depth > 0) & (found.depth < 20)).all()
    assert float(found.metric_scale) == 1.0
    assert found.cam_to_world is None
    alone = teacher.complete(Clip(clip.images[1:2]), None)
    torch.testing.assert_close(alone.depth[0], found.depth[1], rtol=1e-4, atol=1e-5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = network("metric").eval()((teacher.prepare(clip.images) - mean) / std).predicted_depth
    torch.testing.assert_close(found.depth, expected, rtol=1e-4, atol=1e-5)
    assert not found.depth.requires_grad


def test_inverse_depth_is_refused(tmp_path: Path) -> None:
    network("relative").save_pretrained(tmp_path / "w")
    with pytest.raises(InputError, match="scale and shift"):
        build_teacher("depth_anything", weights=str(tmp_path / "w"))
    with pytest.raises(InputError, match="nothing is downloaded"):
        build_teacher("depth_anything")
    with pytest.raises(CheckpointError):
        build_teacher("depth_anything", weights=str(tmp_path / "nowhere"))
