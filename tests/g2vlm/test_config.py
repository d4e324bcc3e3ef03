"""The config tree: presets, strict keys, round trips."""

import pytest

from g2vlm.config import (
    PRESETS,
    TOWERS,
    DecoderConfig,
    G2VLMConfig,
    HeadsConfig,
    Qwen3VLTowerConfig,
    Qwen25VLTowerConfig,
)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_round_trip_through_a_folder(preset: str, tmp_path) -> None:
    config = PRESETS[preset](geometry_attention="mixed")
    config.save_pretrained(tmp_path)
    assert G2VLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("architecture", sorted(TOWERS))
def test_towers_survive_a_folder(architecture: str, tmp_path) -> None:
    config = G2VLMConfig.tiny(semantic_encoder={"architecture": architecture, "num_layers": 3})
    config.save_pretrained(tmp_path)
    again = G2VLMConfig.from_pretrained(tmp_path).semantic_encoder
    assert again == config.semantic_encoder
    assert type(again) is TOWERS[architecture]


def test_defaults_are_the_released_model() -> None:
    assert G2VLMConfig().to_dict() == G2VLMConfig.paper_2b().to_dict()
    decoder, heads = G2VLMConfig().decoder, G2VLMConfig().heads
    assert (decoder.num_layers, decoder.hidden_size, decoder.mrope_sections) == (28, 1536, (16, 24, 24))
    assert (heads.depth, heads.num_heads, heads.point_dim, heads.camera_dim) == (5, 16, 1024, 512)


def test_views_have_the_width_of_the_geometry_encoder_in_whole_patches() -> None:
    assert [PRESETS[name]().view_width for name in ("tiny", "small", "paper_2b")] == [84, 224, 518]
    assert G2VLMConfig(geometry_encoder={"image_size": 512}).view_width == 504


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decoder": {"hiden_size": 3}}, "decoder.hiden_size; did you mean decoder.hidden_size"),
        ({"semantic_encoder": {"architecture": "clip"}}, "semantic_encoder.architecture is 'clip'; allowed: qwen2_vl"),
        ({"semantic_encoder": {"window_size": 3}}, "unknown config key semantic_encoder.window_size"),
        ({"semantic_encoder": Qwen25VLTowerConfig(), "encoders": "single"}, "single needs a qwen2_vl tower"),
        (
            {"semantic_encoder": Qwen3VLTowerConfig(), "decoder": {"num_layers": 2}},
            r"deepstack_layers \(8, 16, 24\) feed more",
        ),
        ({"decoder": {"mrope_layout": "mixed"}}, "decoder.mrope_layout is 'mixed'"),
        ({"decoder": {"mrope_layout": "interleaved", "mrope_sections": (16, 20, 28)}}, "cannot take turns"),
        ({"heds": {}}, "unknown config key heds"),
        ({"geometry_attention": "local"}, "geometry_attention is 'local'; allowed: global"),
        ({"decoder": DecoderConfig(mrope_sections=(16, 24, 24), head_dim=128, hidden_size=1544)}, "multiple of 4"),
    ],
)
def test_wrong_values_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        G2VLMConfig(**kwargs)


def test_rotary_sections_must_fill_the_head() -> None:
    with pytest.raises(ValueError, match="must add up to head_dim / 2"):
        DecoderConfig(mrope_sections=(1, 2, 3))


def test_overrides_replace_a_part() -> None:
    config = G2VLMConfig.tiny(heads=HeadsConfig(depth=1, num_heads=4, point_dim=16, camera_dim=16))
    assert config.heads.depth == 1
    assert config.decoder == G2VLMConfig.tiny().decoder


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match="geometric_init is 'matchin'; allowed: random, copy_semantic, matching"):
        DecoderConfig(geometric_init="matchin")  # pyright: ignore[reportArgumentType]
