"""Pose, scale, feature and matching losses against the peers' numbers (golden family `supervision`)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from g2vlm.supervision.layers import proportional_layers
from geometry.losses import contrastive, features, matching, metric_scale, pose
from geometry.losses.masked import masked_mean
from geometry.losses.matching import Matches
from tests.parity import golden
from tests.parity.test_supervision_dense import assert_gradient, assert_value

pytestmark = pytest.mark.parity

TAU = {"007": 0.07, "01": 0.1}


@pytest.mark.parametrize("path", golden.cases("supervision/pose_loss*.safetensors"))
def test_pose(path: Path) -> None:
    case = load_file(path)
    prediction, target = case["pred"].requires_grad_(), case["gt"]
    valid = torch.ones_like(target[..., 0], dtype=torch.bool)
    l1, l2 = (loss(prediction, target, valid, sign_invariant=False) for loss in (pose.pose_l1, pose.pose_l2))
    for prefix, terms in {"geovr_loss": l1, "l1": l1, "l2": l2}.items():
        assert_value(terms.translation, case[f"{prefix}_T"])
        assert_value(terms.rotation, case[f"{prefix}_R"])
        assert_value(terms.field_of_view, case[f"{prefix}_FL"])
    total = l1.total(pose.PoseWeights(1.0, 1.0, 0.5))
    assert_value(total, case["geovr_loss_camera"])
    assert_gradient(torch.autograd.grad(total, prediction)[0], case["geovr_grad_pred"])


@pytest.mark.parametrize("path", golden.cases("supervision/metric_scale*.safetensors"))
def test_metric_scale(path: Path) -> None:
    case = load_file(path)
    metric = metric_scale.metric_depth(case["metric_raw"], case["intrinsics"])
    assert_value(metric, case["metric_depth"])
    rule = metric_scale.MetricScaleRule(max_sky=0.3, min_pixels=10, min_metric_depth=1e-2, min_relative_depth=1e-3)
    maps = case["relative_depth"], case["relative_conf"], metric, case["sky_prob"]
    ours = metric_scale.fit_metric_scale(*(maps[i].flatten(0, 1) for i in range(4)), rule)  # one clip
    assert ours.valid
    assert_value(ours.least_confidence, case["median_conf"])
    assert torch.equal(ours.pixels, case["align_mask"].flatten(0, 1))
    assert_value(ours.scale, case["scale"])


@pytest.mark.parametrize("path", golden.cases("supervision/metric_scale*.safetensors"))
def test_scale_losses(path: Path) -> None:
    case = load_file(path)
    scales = case["pred_scale"], case["gt_scale"], torch.ones_like(case["gt_scale"], dtype=torch.bool)
    assert_value(metric_scale.log1p_scale_loss(*scales), case["scale_loss_log1p_l1"])
    assert_value(metric_scale.log_scale_loss(*scales), case["spec_scale_loss_log_l1"])


@pytest.mark.parametrize("path", golden.cases("supervision/feature_alignment*.safetensors"))
@pytest.mark.parametrize(("pool", "suffix"), [(1, "nopool"), (2, "pool2")])
def test_feature_alignment(path: Path, pool: int, suffix: str) -> None:
    case = load_file(path)
    teacher = features.pool_patches(case["teacher"], pool)

    def head(x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], case["head.norm.weight"], case["head.norm.bias"], eps=1e-5)
        x = F.gelu(F.linear(x, case["head.fc1.weight"], case["head.fc1.bias"]))
        return F.linear(x, case["head.fc2.weight"], case["head.fc2.bias"])

    student = head(features.resize_to_grid(case["student"], teacher.shape[1:3]))
    assert_value(student, case["projected" if pool == 1 else f"projected_{suffix}"])
    valid = torch.ones_like(teacher[..., 0], dtype=torch.bool)
    assert_value(features.cosine_loss(student, teacher, valid), case[f"loss_{suffix}"])


@pytest.mark.parametrize("path", golden.cases("supervision/info_nce*.safetensors"))
@pytest.mark.parametrize("chunk", [5, 1000])
def test_info_nce(path: Path, chunk: int) -> None:
    case = load_file(path)
    query, positive = case["query"].requires_grad_(), case["positive"]
    for suffix, tau in TAU.items():
        paired = contrastive.info_nce_paired(query, positive, case["negatives_paired"], tau, chunk=chunk).mean()
        shared = contrastive.info_nce_shared(query, positive, case["negatives_shared"], tau, chunk=chunk).mean()
        in_batch = contrastive.info_nce_in_batch(query, positive, tau, chunk=chunk).mean()
        assert_value(paired, case[f"paired_tau{suffix}"])
        assert_value(shared, case[f"shared_tau{suffix}"])
        assert_value(in_batch, case[f"offdiag_tau{suffix}"])
        if f"paired_tau{suffix}_dquery" in case:
            assert_gradient(torch.autograd.grad(paired, query)[0], case[f"paired_tau{suffix}_dquery"])


@pytest.mark.parametrize("path", golden.cases("supervision/gasp_spec_derived*.safetensors"))
def test_gasp_steps(path: Path) -> None:
    case = load_file(path)
    anchor, candidates = (features.unit_vectors(case[f"{name}_f64"]) for name in ("anchor", "candidates"))
    tau, valid = case["tau_f64"].item(), case["valid"]
    logits = features.cosines(anchor, candidates) / tau
    weights = matching.attention(logits, torch.ones_like(logits, dtype=torch.bool))
    assert_value(weights, case["attn_f64"])
    expected = matching.expected_depth(weights, case["cand_depth_f64"])
    assert_value(expected, case["expected_depth_f64"])
    error = matching.relative_depth_error(expected, case["gt_depth_f64"], epsilon=1e-6)
    assert_value(masked_mean(error, valid), case["depth_loss_f64"])


@pytest.mark.parametrize("path", golden.cases("supervision/gasp_spec_derived*.safetensors"))
@pytest.mark.parametrize("negatives", [matching.all_frames, matching.target_frame])
def test_gasp_of_a_clip(path: Path, negatives: matching.Negatives) -> None:
    """Anchors in frames of their own, of which no patch is a negative; the fixture's contrast counts every anchor."""
    case = load_file(path)
    anchor, candidates, valid = case["anchor_f64"], case["candidates_f64"], case["valid"]
    count, patches, tau = len(anchor), len(candidates), case["tau_f64"].item()
    padded = F.pad(anchor, (0, 0, 0, -count % patches))
    embeddings = torch.cat([padded, candidates]).unflatten(0, (-1, patches))  # (F, P, D)
    own = torch.arange(len(padded)).expand(count, -1)
    matches = Matches(own[0, :count], len(padded) + case["positive_index"], own, case["gt_depth_f64"], valid)
    depth = F.pad(case["cand_depth_f64"], (len(padded), 0)).unflatten(0, (-1, patches))
    ours = matching.match_losses(embeddings, matches, depth, depth > 0, tau, negatives)
    assert_value(ours.depth, case["depth_loss_f64"])
    matches = replace(matches, visible=torch.ones_like(valid))
    ours = matching.match_losses(embeddings, matches, depth, depth > 0, tau, negatives)
    assert_value(ours.contrast, case["nce_f64"])


@pytest.mark.parametrize("path", golden.cases("supervision/layer_mapping*.json"))
def test_layer_mapping(path: Path) -> None:
    for name, expected in json.loads(path.read_text(encoding="utf-8")).items():
        blocks, depths = name.split("of")
        teacher_depth, student_depth = map(int, depths.split("_to_"))
        ours = proportional_layers([int(block) for block in blocks.split(",")], teacher_depth, student_depth)
        assert list(ours) == expected
