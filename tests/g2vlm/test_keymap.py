"""The key map's engine, and the released layout's map at the released size (which is described, never allocated)."""

import pytest
import torch

from g2vlm.config import G2VLMConfig, HeadsConfig
from g2vlm.convert.g2vlm_release import KEYMAP
from g2vlm.convert.keymap import KeyMap, Recipe, Translated, rule
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from tests.g2vlm.test_weights import Memory

MAP = KeyMap(
    [
        rule([f"block.{{i}}.{name}.{{tail}}" for name in "qkv"], "layers.{i}.qkv.{tail}"),
        rule("block.{i}.out.weight", "layers.{i}.proj.weight"),
        rule("head.{tail}", "top.{tail}"),
    ]
)
THEIRS = {f"block.{i}.{name}.weight": torch.randn(2, 3) for i in (0, 11) for name in "qkv"} | {
    "block.11.out.weight": torch.randn(4),
    "head.a.b": torch.randn(1),
}


def test_there_and_back() -> None:
    ours = Translated(Memory(THEIRS), MAP.to_ours(THEIRS))
    assert sorted(ours.specs) == ["layers.0.qkv.weight", "layers.11.proj.weight", "layers.11.qkv.weight", "top.a.b"]
    fused = torch.cat([THEIRS[f"block.11.{name}.weight"] for name in "qkv"])
    assert torch.equal(ours.load("layers.11.qkv.weight"), fused)
    assert all(tuple(ours.load(name).shape) == spec.shape for name, spec in ours.specs.items())
    back = Translated(ours, MAP.to_theirs(ours.specs))
    assert back.specs == Memory(THEIRS).specs
    assert all(torch.equal(back.load(name), tensor) for name, tensor in THEIRS.items())


def test_unknown_and_incomplete_names_make_nothing() -> None:
    assert MAP.to_ours(["block.x.q.weight", "head", "block.0.q.weight", "block.0.k.weight"]) == {}
    assert MAP.to_theirs(["layers.0.qkv", "elsewhere"]) == {}


def test_joined_types_are_promoted() -> None:
    mixed = Memory({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(1)})
    recipe = Recipe(("a", "b"))
    assert recipe.spec(mixed.specs) == (torch.float32, (3,))
    assert recipe.make(mixed).dtype == torch.float32


@pytest.fixture(scope="module")
def paper_specs():
    config = G2VLMConfig.paper_2b(heads=HeadsConfig(confidence=True))
    return G2VLMForConditionalGeneration.tensor_specs(config)


def test_released_names_and_ours_are_one_to_one(paper_specs) -> None:
    theirs = KEYMAP.their_specs(paper_specs)
    back = KEYMAP.to_ours(theirs)
    assert {name: recipe.spec(theirs) for name, recipe in back.items()} == paper_specs
    used = [source for recipe in back.values() for source in recipe.sources]
    assert sorted(used) == sorted(theirs)


def test_released_size(paper_specs) -> None:
    """The counts that the specification measured on the released modules, without the confidence decoder."""
    theirs = {name: s for name, s in KEYMAP.their_specs(paper_specs).items() if not name.startswith("conf_")}
    assert len(theirs) == 1947
    assert sum(torch.Size(spec.shape).numel() for spec in theirs.values()) == 4_538_215_076


RELEASED = {
    "language_model.model.embed_tokens.weight": (151936, 1536),
    "language_model.lm_head.weight": (151936, 1536),
    "language_model.model.norm_moe_geo.weight": (1536,),
    "language_model.model.layers.27.ls1.gamma": (1536,),
    "language_model.model.layers.0.post_attention_layernorm_moe_geo.weight": (1536,),
    "language_model.model.layers.0.self_attn.k_proj_moe_geo.weight": (256, 1536),
    "language_model.model.layers.0.self_attn.q_norm.weight": (128,),
    "language_model.model.layers.0.mlp_moe_geo.down_proj.weight": (1536, 8960),
    "dino_model.embeddings.position_embeddings": (1, 1370, 1024),
    "dino_model.encoder.layer.23.attention.attention.query.bias": (1024,),
    "dino_model.encoder.layer.0.layer_scale2.lambda1": (1024,),
    "dino2llm.weight": (1536, 1024),
    "global_points_decoder.blocks.4.cross_attn.q_proj.weight": (1536, 1536),
    "camera_decoder.linear_out.weight": (512, 1536),
    "camera_head.res_conv.1.res_conv3.weight": (512, 512),
    "camera_head.more_mlps.2.weight": (512, 512),
    "camera_head.fc_rot.bias": (9,),
    "vit_model.merger.mlp.2.weight": (1536, 5120),
    "conf_head.proj.weight": (196, 1024),
}


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_released_names(paper_specs, name: str) -> None:
    assert KEYMAP.their_specs(paper_specs)[name].shape == RELEASED[name]
