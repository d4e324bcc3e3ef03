"""Initial checkpoints: every tensor comes from its source unchanged, and computes what the source computes."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from g2vlm.checkpoint import load_model
from g2vlm.config import G2VLMConfig, TokenIds
from g2vlm.convert import convert
from g2vlm.convert.dinov2 import open_dinov2
from g2vlm.convert.initial import open_initial
from g2vlm.encoders.dinov2 import DinoV2
from g2vlm.errors import CheckpointError, InputError
from g2vlm.processing import sequence_builder
from g2vlm.semantic_images import SemanticRule
from g2vlm.sequence import SemanticImage, Text
from g2vlm.weights import WEIGHTS

SIZES = [(70, 70), (56, 84), (98, 28)]
VOCABULARY = 64


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})


# DINOv2


def timm_dino(registers: bool) -> torch.nn.Module:
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    sizes = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 70}
    return randomise(timm.create_model(name, pretrained=False, dynamic_img_size=True, num_classes=0, **sizes))


def loaded_dino(path: Path) -> DinoV2:
    config, source = open_dinov2(path)
    encoder = DinoV2(config)
    state = {name.removeprefix("geometry_encoder."): source.load(name) for name in source.specs}
    encoder.load_state_dict(state)
    return encoder.eval()


def per_image(encoder: DinoV2) -> DinoV2:
    encoder.windows = "per_image"
    return encoder


@pytest.mark.parametrize("registers", [True, False], ids=["folded with registers", "class position apart"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_timm_features(tmp_path: Path, registers: bool, size: tuple[int, int]) -> None:
    reference = timm_dino(registers)
    save_weights(reference.state_dict(), tmp_path)
    encoder = per_image(loaded_dino(tmp_path))
    images = torch.rand(2, 3, *size)
    expected = reference.forward_features(images)[:, 5 if registers else 1 :]
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    assert (encoder.position_embeddings[:, 0] == 0).all() == registers
    assert encoder.config.num_registers == (4 if registers else 0)


def huggingface_dino() -> Dinov2WithRegistersModel:
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    return randomise(Dinov2WithRegistersModel(config))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_transformers_features(tmp_path: Path, size: tuple[int, int]) -> None:
    reference = huggingface_dino()
    reference.save_pretrained(tmp_path)
    encoder = per_image(loaded_dino(tmp_path))
    images = torch.rand(2, 3, *size)
    expected = reference(images).last_hidden_state[:, 5:]
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(encoder.mask_token, reference.embeddings.mask_token)


def test_a_single_file_and_its_number_of_heads(tmp_path: Path) -> None:
    save_weights(timm_dino(True).state_dict(), tmp_path)
    assert open_dinov2(tmp_path / WEIGHTS)[0].num_heads == 2
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    assert open_dinov2(tmp_path / WEIGHTS)[0].num_heads == 4


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias"),
        (lambda s: s.update({"blocks.0.mlp.w12.weight": torch.ones(1)}), "w12"),
        (lambda s: s.update({"pos_embed": torch.ones(3)}), "pos_embed"),
        (lambda s: s.pop("pos_embed"), "pos_embed"),
        (lambda s: s.pop("cls_token"), "cls_token"),
        (lambda s: s.update({"reg_token": torch.ones(1, 4, 7)}), "reg_token"),
        (lambda s: s.update({"cls_token": torch.ones(1, 1, 127)}), "cls_token"),
    ],
)
def test_damaged_timm_weights(tmp_path: Path, damage, word: str) -> None:
    state = timm_dino(True).state_dict()
    damage(state)
    save_weights(state, tmp_path)
    with pytest.raises(CheckpointError, match=word):
        open_dinov2(tmp_path)


# Qwen2-VL


def tiny_qwen(tied: bool = False) -> Qwen2VLForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=5, tie_word_embeddings=tied)
    model = randomise(Qwen2VLForConditionalGeneration(config))
    model.tie_weights()
    return model


FLAT_CONFIG = {
    "model_type": "qwen2_vl", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "hidden_act": "silu",
    "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "in_chans": 3},
}  # fmt: skip


def newer_names(model: Qwen2VLForConditionalGeneration, tied: bool) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def older_names(model: Qwen2VLForConditionalGeneration, tied: bool) -> dict[str, Tensor]:
    renamed = {name.replace("model.visual.", "visual."): t for name, t in newer_names(model, tied).items()}
    return {name.replace("model.language_model.", "model."): t for name, t in renamed.items()}


def write_tokenizer(folder: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    words = {word: i for i, word in enumerate(["Reconstruct", "the", "3D", "scene", ".", "?"], start=10)}
    tokenizer = Tokenizer(models.WordLevel({**words, **{token: i for i, token in enumerate(special)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def dino_folder(tmp_path: Path) -> Path:
    huggingface_dino().save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def write_qwen(folder: Path, model: Qwen2VLForConditionalGeneration, newer: bool, tied: bool) -> dict[str, Tensor]:
    state = newer_names(model, tied) if newer else older_names(model, tied)
    save_weights(state, folder)
    if newer:
        model.config.save_pretrained(folder)
    else:
        config = {**FLAT_CONFIG, "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return state


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("newer", [True, False], ids=["newer names", "older names"])
def test_initial_checkpoint(tmp_path: Path, dino_folder: Path, newer: bool, tied: bool) -> None:
    qwen = tiny_qwen(tied)
    theirs = write_qwen(tmp_path / "qwen", qwen, newer, tied)
    result = convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder, check=tied)
    assert (f"{len(theirs)} Qwen2-VL tensors convert back" in str(result)) == tied
    model = load_model(tmp_path / "ours")
    assert_semantic_half(model.state_dict(), qwen)
    assert_geometry_encoder(model, dino_folder)
    config = model.config
    assert isinstance(config, G2VLMConfig)
    assert config.tokens == TokenIds(0, 1, 2, 3, recon_prompt=(10, 11, 12, 13, 14))
    assert config.semantic_image_attention == "causal"
    assert not config.decoder.semantic_qk_norm
    assert config.decoder.geometric_qk_norm
    assert config.decoder.rope_theta == 1e4
    assert config.geometry_encoder.windows == "per_image"
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert AutoProcessor.from_pretrained(tmp_path / "ours").rule == SemanticRule.native()


def assert_semantic_half(state: dict[str, Tensor], qwen: Qwen2VLForConditionalGeneration) -> None:
    """Names written out by hand, away from the map under test."""
    language, visual = qwen.model.language_model, qwen.model.visual
    pairs = {
        "embed_tokens.weight": language.embed_tokens.weight,
        "lm_head.weight": qwen.lm_head.weight,
        "decoder.semantic_norm.weight": language.norm.weight,
    }
    for i, layer in enumerate(language.layers):
        half = f"decoder.layers.{i}.semantic"
        pairs[f"{half}.input_norm.weight"] = layer.input_layernorm.weight
        pairs[f"{half}.post_attention_norm.weight"] = layer.post_attention_layernorm.weight
        pairs |= {f"{half}.mlp.{name}": parameter for name, parameter in layer.mlp.named_parameters()}
        pairs |= {f"{half}.attention.{name}": parameter for name, parameter in layer.self_attn.named_parameters()}
    pairs |= {f"semantic_encoder.{name}": parameter for name, parameter in visual.named_parameters()}
    mine = {name for name in state if ".semantic" in name or name.startswith(("embed", "lm_head", "semantic"))}
    assert mine == set(pairs)
    assert all(torch.equal(state[name], tensor) for name, tensor in pairs.items())


def assert_geometry_encoder(model, dino_folder: Path) -> None:
    encoder = loaded_dino(dino_folder)
    assert all(torch.equal(t, encoder.state_dict()[n]) for n, t in model.geometry_encoder.state_dict().items())


@torch.no_grad()
def test_logits_equal_the_source(tmp_path: Path, dino_folder: Path) -> None:
    """Text, an image, text: with everything on the semantic expert the model is the Qwen2-VL that it came from."""
    qwen = tiny_qwen()
    write_qwen(tmp_path / "qwen", qwen, newer=True, tied=False)
    convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)
    model = load_model(tmp_path / "ours")
    before, after, grid = (20, 21, 22), (30, 31), (4, 8)
    segments = [Text(before), SemanticImage(grid), Text(after)]
    sequence = sequence_builder(model.config).build([segments])
    pixels, grid_thw = torch.randn(grid[0] * grid[1], 1176), torch.tensor([[1, *grid]])
    logits = model(sequence, pixel_values=pixels, image_grid_thw=grid_thw, logits_at=torch.arange(15)).logits
    ids = torch.tensor([[*before, 2, *[5] * 8, 3, *after]])
    reference = qwen(
        input_ids=ids, pixel_values=pixels, image_grid_thw=grid_thw, mm_token_type_ids=(ids == 5).int()
    ).logits[0]
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)


def test_random_tensors_start_as_configured(tmp_path: Path, dino_folder: Path) -> None:
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=True, tied=False)
    first = open_initial(tmp_path / "qwen", dino_folder).source
    names = [name for name in first.specs if ".geometric" in name or name.startswith(("heads", "geometry_projection"))]
    assert first.load("geometry_projection.weight").eq(0).all()
    assert first.load("decoder.layers.0.geometric.mlp_scale.gamma").eq(0.01).all()
    assert first.load("decoder.layers.0.geometric.attention.q_norm.weight").eq(1).all()
    assert 0.01 < first.load("decoder.layers.0.geometric.mlp.up_proj.weight").std() < 0.03
    bound = 64**-0.5  # PyTorch's default, which the heads keep
    assert 0.9 * bound < first.load("heads.point_decoder.blocks.0.attn.proj.weight").abs().max() <= bound
    again, other = (open_initial(tmp_path / "qwen", dino_folder, seed=seed).source for seed in (0, 1))
    assert all(torch.equal(first.load(name), again.load(name)) for name in reversed(names))
    drawn = "decoder.layers.1.geometric.attention.k_proj.weight"
    assert not torch.equal(first.load(drawn), other.load(drawn))
    assert not torch.equal(first.load(drawn), first.load(drawn.replace(".1.", ".0.")))


def test_copied_geometric_expert(tmp_path: Path, dino_folder: Path) -> None:
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=True, tied=False)
    convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder, geometric_init="copy_semantic")
    model = load_model(tmp_path / "ours")
    copied = {name: t.clone() for name, t in model.decoder.state_dict().items()}
    model.decoder.copy_semantic_to_geometric()
    assert all(torch.equal(copied[name], t) for name, t in model.decoder.state_dict().items())
    assert copied["layers.0.geometric.attention_scale.gamma"].eq(0.01).all()
    assert model.config.decoder.geometric_init == "copy_semantic"


def test_shards_and_storage_type(tmp_path: Path, dino_folder: Path) -> None:
    qwen = tiny_qwen().to(torch.bfloat16)
    write_qwen(tmp_path / "qwen", qwen, newer=True, tied=False)
    (tmp_path / "qwen" / WEIGHTS).unlink()
    qwen.save_pretrained(tmp_path / "qwen", max_shard_size="50KB")
    assert len(list((tmp_path / "qwen").glob("model-*.safetensors"))) > 2
    convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)
    stored = load_file(tmp_path / "ours" / WEIGHTS)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["geometry_encoder.cls_token"].dtype == torch.float32
    assert torch.equal(stored["lm_head.weight"], qwen.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"vocab_size": 8}, "vocabulary"),
        ({"vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 63}}, "hidden_size is 63"),
    ],
)
def test_unusable_qwen(tmp_path: Path, dino_folder: Path, change: dict, words: str) -> None:
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=False, tied=False)
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({**FLAT_CONFIG, **change}))
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)
    assert not (tmp_path / "ours").exists()


def test_untied_without_a_head(tmp_path: Path, dino_folder: Path) -> None:
    qwen = tiny_qwen()
    write_qwen(tmp_path / "qwen", qwen, newer=True, tied=False)
    save_weights(newer_names(qwen, tied=True), tmp_path / "qwen")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)


def test_geometry_encoder_goes_with_qwen_only(tmp_path: Path, dino_folder: Path) -> None:
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=True, tied=False)
    with pytest.raises(InputError, match="--geometry-encoder"):
        convert(tmp_path / "qwen", tmp_path / "ours")
    convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)
    with pytest.raises(InputError, match="of its own"):
        convert(tmp_path / "ours", tmp_path / "more", geometry_encoder=dino_folder)


def test_a_stock_semantic_expert_does_not_fit_the_released_layout(tmp_path: Path, dino_folder: Path) -> None:
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=True, tied=False)
    convert(tmp_path / "qwen", tmp_path / "ours", geometry_encoder=dino_folder)
    with pytest.raises(CheckpointError, match="qk-norm"):
        convert(tmp_path / "ours", tmp_path / "released")


def test_dinov2_comparison(tmp_path: Path, dino_folder: Path) -> None:
    """A folded timm file equals the checkpoint that came from it, and another one differs by name."""
    write_qwen(tmp_path / "qwen", tiny_qwen(), newer=True, tied=False)
    reference = timm_dino(True)
    save_weights(reference.state_dict(), tmp_path / "timm")
    arguments = {"geometry_encoder": tmp_path / "timm", "dinov2": tmp_path / "timm"}
    result = convert(tmp_path / "qwen", tmp_path / "ours", **arguments)
    assert "equals" in result.checks[0]
    with torch.no_grad():
        reference.blocks[1].mlp.fc1.bias[3] += 0.01
    save_weights(reference.state_dict(), tmp_path / "other")
    arguments["dinov2"] = tmp_path / "other"
    result = convert(tmp_path / "qwen", tmp_path / "ours2", **arguments)
    assert result.checks == [
        f"the geometry encoder differs from {tmp_path / 'other'} in 1 tensors: blocks.1.mlp.fc1.bias"
    ]
    shutil.rmtree(tmp_path / "ours2")
