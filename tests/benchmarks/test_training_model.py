"""The cost of training steps against PyTorch's own FLOP counter on real forward and backward passes."""

import math
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training_model import training_flops
from benchmarks.work_model import Flops, Workload, total_flops
from g2vlm.config import G2VLMConfig
from g2vlm.model.decoder import MoTLayer
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import sequence_builder
from g2vlm.sequence import GeometryViews, SemanticImage, Text
from tests.benchmarks.test_work_model import SDPA, aten, config_with, sdpa_flops
from train.trainable import set_trainable

SDPA_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward

RECON = Workload(3, 28, 42, prompt_tokens=5, global_points=True)
CHAT = Workload(2, 28, 56, 6, images=((4, 6), (8, 4)), question_tokens=9, num_logits=4, geometry=False)
BOTH = Workload(2, 28, 56, 6, images=((4, 6),), question_tokens=9, num_logits=4, global_points=True)

GEOMETRY = ("projection", "geometric_expert", "geometry_heads")
ANSWERS = ("semantic_expert", "embeddings", "lm_head")
CASES = {
    "stage 1": (RECON, ("geometry_encoder", *GEOMETRY)),
    "stage 1, DINO frozen": (RECON, GEOMETRY),
    "expert alone": (RECON, ("geometric_expert",)),
    "CE": (CHAT, ANSWERS),
    "CE with its tower": (CHAT, (*ANSWERS, "semantic_encoder")),
    "CE, expert alone": (CHAT, ("semantic_expert",)),
    "CE + CE": (CHAT, (*ANSWERS, "geometric_expert", "projection")),
    "VG + CE": (BOTH, (*ANSWERS, *GEOMETRY)),
}


def sdpa_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Four products: scores are not counted again."""
    return 2 * sdpa_flops(query, key, value)


def counted(config: G2VLMConfig, work: Workload, trained: tuple[str, ...], cut: bool) -> Flops:
    """FLOPs of a forward and a backward that run."""
    model = G2VLMForConditionalGeneration(config)
    set_trainable(model, dict.fromkeys(trained, 1.0))
    grid = work.grid(config.geometry_encoder.patch_size)
    images = [SemanticImage(image) for image in work.images]
    text = [Text((5,) * work.question_tokens)] if work.question_tokens else []
    segments = [Text((4,) * work.prompt_tokens), GeometryViews((grid,) * work.num_views), *images, *text]
    sequence = sequence_builder(config).build([segments])
    costs = {SDPA: sdpa_flops, SDPA_BACKWARD: sdpa_backward_flops}
    frozen = MoTLayer._is_frozen if cut else lambda *arguments: False
    with (
        FlopCounterMode(display=False, custom_mapping=costs) as counter,
        mock.patch.object(MoTLayer, "_is_frozen", frozen),
    ):
        output = model(
            sequence=sequence,
            views=[torch.rand(work.num_views, 3, work.height, work.width)],
            pixel_values=torch.randn(sum(map(math.prod, work.images)), 1176) if work.images else None,
            image_grid_thw=torch.tensor([[1, *image] for image in work.images]) if work.images else None,
            logits_at=torch.arange(work.num_logits) if work.num_logits else None,
            predict_geometry=work.geometry,
            predict_global_points=work.global_points,
        )
        found = [output.logits] if output.logits is not None else []
        for scene in output.geometry or ():
            found += [scene.local_points, scene.cam_to_world, scene.normals]
            found += [scene.global_points] if scene.global_points is not None else []
        torch.stack([value.square().sum() for value in found]).sum().backward()
    total = Counter(counter.get_flop_counts()["Global"])
    del total[aten.bmm]  # the cameras' 3 x 3 products
    attention = total.pop(SDPA) + total.pop(SDPA_BACKWARD)
    return Flops(sum(total.values()), attention)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_run(name: str, layers: int) -> None:
    config, (work, trained) = config_with(decoder={"num_layers": layers}), CASES[name]
    assert training_flops(config, work, trained) == counted(config, work, trained, cut=True)


@pytest.mark.parametrize("name", ["CE", "CE with its tower"])
def test_flops_of_a_differentiated_frozen_expert(name: str) -> None:
    config, (work, trained) = config_with(), CASES[name]
    found = training_flops(config, work, trained, cut=False)
    assert found == counted(config, work, trained, cut=False)
    assert found.attention > training_flops(config, work, trained).attention
    assert found.linear > training_flops(config, work, trained).linear


def test_the_paper_s_strategies() -> None:
    """Eight views at 518 px, their images at 756 px and 300 tokens of text: forward 131 TFLOP, backward through the
    semantic queries and the tower 147 with 2.5 times the attention, which is 2 here."""
    config, tower = G2VLMConfig.paper_2b(), "semantic_encoder"
    work = Workload(8, 518, 518, 30, images=((54, 54),) * 8, question_tokens=270, num_logits=30, geometry=False)
    forward = total_flops(config, work).total
    ce, through = (training_flops(config, work, (*ANSWERS, tower), cut).total - forward for cut in (True, False))
    sr = training_flops(config, work, (*ANSWERS, tower, "geometric_expert", "projection")).total - forward
    assert forward == pytest.approx(131e12, rel=0.02)
    assert ce == pytest.approx(147e12, rel=0.03)
    assert 1.4 * ce < through < sr < 2 * ce


def test_the_single_encoder_is_not_counted() -> None:
    with pytest.raises(ValueError, match="two encoders"):
        training_flops(config_with(encoders="single"), RECON, GEOMETRY)
