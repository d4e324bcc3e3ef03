"""The work model against PyTorch's own FLOP counter on real models, part by part, and against real parameter counts."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.work_model import (
    Ceilings,
    Flops,
    Workload,
    active_parameters,
    attention_plan,
    forward_flops,
    kv_bytes,
    main,
    parameters,
    peak_bytes,
    roofline_seconds,
    table_row,
    total_flops,
)
from g2vlm.config import (
    PRESETS,
    DecoderConfig,
    G2VLMConfig,
    GeometryEncoderConfig,
    HeadsConfig,
    SemanticEncoderConfig,
)
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import sequence_builder
from g2vlm.sequence import GeometryViews, SemanticImage, Text

aten = torch.ops.aten
SDPA = aten._scaled_dot_product_flash_attention_for_cpu

# What of the model belongs to each part; the encoders of views are told apart by their own prefix.
PARTS = {
    "embedding": ("embed_tokens",),
    "semantic_encoder": ("semantic_encoder",),
    "geometry_encoder": ("geometry_encoder",),
    "projection": ("geometry_projection",),
    "decoder": ("decoder",),
    "frame_decoders": ("heads.point_decoder", "heads.camera_decoder", "heads.confidence_decoder"),
    "global_points": ("heads.global_points_decoder", "heads.global_point_head"),
    "heads": ("heads.point_head", "heads.normal_head", "heads.camera_head", "heads.confidence_head"),
    "lm_head": ("lm_head",),
}


BASE = {
    "decoder": DecoderConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mrope_sections=(2, 3, 3),
    ),
    "semantic_encoder": SemanticEncoderConfig(hidden_size=16, num_layers=3, num_heads=2),
    "geometry_encoder": GeometryEncoderConfig(24, num_layers=2, num_heads=2, image_size=42, windows="per_image"),
    "heads": HeadsConfig(depth=2, num_heads=4, point_dim=12, camera_dim=20, normals="learned"),
    "tokens": G2VLMConfig.tiny().tokens,
}


def config_with(**changes) -> G2VLMConfig:
    """The base config; a part given as a dictionary changes only these fields."""
    parts = {name: replace(BASE[name], **change) for name, change in changes.items() if name in BASE}
    return G2VLMConfig(**{**BASE, **changes, **parts})


CONFIGS = {
    "one_key_head": config_with(decoder={"num_kv_heads": 1}),
    "as_many_key_heads": config_with(decoder={"num_heads": 2, "num_layers": 1}),
    "wide_heads": config_with(decoder={"num_heads": 8, "num_kv_heads": 4, "semantic_qk_norm": False}),
    "official_windows": config_with(geometry_encoder={"windows": "official", "num_registers": 2}),
    "derived_normals": config_with(heads={"normals": "derived"}),
    "no_global_points": config_with(heads={"global_points": False}),
    "confidence": config_with(heads={"confidence": True, "depth": 1, "mlp_ratio": 2.0}),
    "causal_images": config_with(semantic_image_attention="causal"),
}
EVERYTHING = Workload(2, 56, 42, images=((4, 6), (8, 4)), question_tokens=5, num_logits=6, global_points=True)
WORKS = {
    "one_view": Workload(1, 28, 28, prompt_tokens=3),
    "views": Workload(3, 56, 84, prompt_tokens=7),
    "block_causal": Workload(3, 28, 56, geometry_attention="block_causal"),
    "frame": Workload(4, 56, 28, geometry_attention="frame"),
    "training": Workload(2, 84, 84, global_points=True),
    "everything": EVERYTHING,
}


def sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Scores and weighted sum over whole rectangles; key heads may be fewer than query heads."""
    batch, heads, num_queries, width = query
    return 4 * batch * heads * num_queries * key[2] * width


def counted(config: G2VLMConfig, work: Workload) -> dict[str, Flops]:
    """FLOPs per part, counted while a model with random weights runs."""
    model = G2VLMForConditionalGeneration(config).eval()
    builder = sequence_builder(config, work.geometry_attention)
    grid = work.grid(config.geometry_encoder.patch_size)
    segments = [Text((4,) * work.prompt_tokens), GeometryViews((grid,) * work.num_views)]
    segments += [SemanticImage(image) for image in work.images]
    segments += [Text((5,) * work.question_tokens)] if work.question_tokens else []
    counter = FlopCounterMode(display=False, depth=9, custom_mapping={SDPA: sdpa_flops})
    with torch.no_grad(), counter:
        model(
            sequence=builder.build([segments]),
            views=[torch.rand(work.num_views, 3, work.height, work.width)],
            pixel_values=torch.randn(sum(map(math.prod, work.images)), 1176) if work.images else None,
            image_grid_thw=torch.tensor([[1, *image] for image in work.images]) if work.images else None,
            logits_at=torch.arange(work.num_logits) if work.num_logits else None,
            predict_global_points=work.global_points and config.heads.global_points,
        )
    counts = counter.get_flop_counts()
    return {part: _part(counts, names) for part, names in PARTS.items()}


def _part(counts: dict[str, dict], names: tuple[str, ...]) -> Flops:
    total = Counter()
    for name in names:
        total.update(counts.get(f"G2VLMForConditionalGeneration.{name}", {}))
    del total[aten.bmm]  # the cameras' 3 x 3 products
    return Flops(sum(total.values()) - total[SDPA], total[SDPA])


def assert_counted(config: G2VLMConfig, work: Workload) -> None:
    expected = counted(config, work)
    assert forward_flops(config, work) == expected
    assert total_flops(config, work).total == sum(flops.total for flops in expected.values())


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_flops_of_every_part_are_those_that_run(work: Workload) -> None:
    assert_counted(config_with(), work)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_flops_follow_the_config(config: G2VLMConfig) -> None:
    assert_counted(config, EVERYTHING)


def test_flops_of_a_single_encoder() -> None:
    """The tower, counted under the semantic encoder's name, runs for the views."""
    config, work = config_with(encoders="single"), Workload(2, 28, 56)
    expected = counted(config, work)
    expected |= {"geometry_encoder": expected["semantic_encoder"], "semantic_encoder": Flops()}
    assert forward_flops(config, work) == expected


PARAMETER_CONFIGS = {
    **CONFIGS,
    "single_encoder": config_with(encoders="single"),
    **{name: preset() for name, preset in PRESETS.items()},
}


@pytest.mark.parametrize("config", PARAMETER_CONFIGS.values(), ids=PARAMETER_CONFIGS)
def test_parameters_of_every_part(config: G2VLMConfig) -> None:
    with torch.device("meta"):
        model = G2VLMForConditionalGeneration(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        (part,) = (part for part, prefixes in PARTS.items() if name.startswith(tuple(f"{p}." for p in prefixes)))
        counts[part] += parameter.numel()
    assert parameters(config) == counts


def test_the_released_model_has_the_published_number_of_parameters() -> None:
    assert sum(parameters(G2VLMConfig.paper_2b()).values()) == 4_538_215_076


@pytest.mark.parametrize("mode", ["global", "block_causal", "frame"])
@pytest.mark.parametrize("images", [(), ((4, 4),)])
def test_the_plan_is_the_model_s(mode, images) -> None:
    config = config_with()
    work = Workload(3, 28, 42, 5, geometry_attention=mode, images=images, question_tokens=2)
    segments = [Text((4,) * 5), GeometryViews(((2, 3),) * 3), *map(SemanticImage, images), Text((6, 7))]
    assert attention_plan(config, work) == sequence_builder(config, mode).build([segments]).plan


def test_closed_form_of_the_decoder() -> None:
    """93.6 MFLOP per token and layer, attention 4 S^2 D per layer when all see all."""
    flops = forward_flops(G2VLMConfig.paper_2b(), Workload(8, 518, 518, prompt_tokens=0))["decoder"]
    tokens = 8 * (37 * 37 + 2)
    assert flops == Flops(28 * tokens * 93_585_408, 28 * 4 * tokens**2 * 1536)


def test_memory_and_time() -> None:
    config, work = G2VLMConfig.paper_2b(), Workload(1, 518, 518)
    assert kv_bytes(config, 1) == 28_672
    assert peak_bytes(config, work) > 2 * sum(parameters(config).values())
    without = sum(parameters(config)[part] for part in ("embedding", "semantic_encoder", "global_points", "lm_head"))
    assert active_parameters(config, work) == sum(parameters(config).values()) - without
    flops = total_flops(config, work)
    compute, copy = Ceilings(1e12, 1e30, attention_flops=2e12), Ceilings(1e30, 1e9)
    assert roofline_seconds(config, work, compute) == pytest.approx(flops.linear / 1e12 + flops.attention / 2e12)
    assert roofline_seconds(config, work, copy) == pytest.approx(2 * active_parameters(config, work) / 1e9)
    assert roofline_seconds(config, work, Ceilings(1e12, 1e30)) == pytest.approx(flops.total / 1e12)


def test_table_of_the_paper_s_model() -> None:
    row = table_row(G2VLMConfig.paper_2b(), Workload(24, 518, 518, prompt_tokens=0))
    assert {"views": 24, "tokens": 32904, "encoder": 8, "lin": 27, "attn": 58, "dec": 7}.items() <= row.items()


def test_sizes_that_are_no_multiple_of_the_patch_are_named() -> None:
    with pytest.raises(ValueError, match="views of 30x28: sides must be multiples of 14"):
        forward_flops(config_with(), Workload(1, 28, 30))


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--preset", "paper_2b", "--width", "518", "--views", "1", "24"])
    out = capsys.readouterr().out
    assert "total 4,538,215,076 parameters" in out
    assert "no time below was measured" in out
