from dataclasses import replace
from pathlib import Path

import pytest

from g2vlm.data.chat import registry as chat_registry
from g2vlm.data.registry import build_source
from g2vlm.data.rooms import RoomsSource, heldout_v1
from g2vlm.errors import InputError
from g2vlm.semantic_images import SemanticRule
from train.config import RunConfig, load_config, parse, save_config
from train.start import preset_with
from train.trainable import GROUPS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*stage1*.yaml")) + sorted((ROOT / "configs/ablations").glob("[!j]*.yaml"))
JOINT = [
    path for name in ("*stage2*", "*words*", "joint*") for path in sorted((ROOT / "configs").rglob(f"{name}.yaml"))
]


@pytest.mark.parametrize("file", CONFIGS + JOINT, ids=lambda file: file.stem)
def test_every_config_parses(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert config.trainable.keys() <= GROUPS.keys()
    if isinstance(config.model, dict):
        assert preset_with(dict(config.model)).to_dict() != preset_with({}).to_dict()
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_the_default_config_is_the_defaults() -> None:
    assert load_config(ROOT / "configs/tiny_stage1.yaml") == RunConfig() == parse([])[0]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_validation_is_like_the_heldout_set_and_apart_from_it(file: Path) -> None:
    """Rooms sources of different seeds share no scene; rooms-heldout-v1 is of seed 0."""
    validation = load_config(file).data.validation
    if validation is None:
        return
    kept = heldout_v1.source()
    source = build_source(validation.name, **validation.options)
    assert (validation.options["split"], validation.options["cameras"]) == ("heldout", heldout_v1.CAMERAS)
    names = {rooms.scene(0).name for rooms in (kept, source, RoomsSource(source.law))}
    assert len(names) == 3
    assert validation.options["seed"] != 0


def test_paper_scale_values() -> None:
    low, high = (load_config(ROOT / f"configs/stage1_{size}.yaml") for size in (224, 518))
    assert (low.runtime.steps, low.optim.lr, low.schedule.warmup) == (100_000, 2e-4, 5000)
    assert (high.runtime.steps, high.optim.lr, high.data.width, high.data.aspect) == (20_000, 5e-4, 518, (0.5, 1.0))
    for config in (low, high):
        assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.95), 1e-15, 0)
        assert config.schedule.final_lr == 1e-7
        assert config.objectives.geometry is not None
        assert (config.objectives.geometry.translation, config.objectives.geometry.camera) == (200, 0.2)


@pytest.mark.parametrize("name", ["tiny_stage2", "stage2_g2vlm"])
def test_joint_strategies(name: str) -> None:
    """Released flags (g2vlm_model section 16.3): what trains, and by which loss."""
    vg_ce = "tiny_stage2_vg_ce" if name.startswith("tiny") else "stage2_vg_ce"
    ce, ce_ce, both = (load_config(ROOT / f"configs/{own}.yaml") for own in (name, f"{name}_sr", vg_ce))
    geometric = {"geometric_expert", "projection"}
    assert {"semantic_expert", "embeddings", "lm_head"} <= ce.trainable.keys()
    assert not (geometric | {"geometry_encoder"}) & ce.trainable.keys()
    assert ce_ce.trainable.keys() == ce.trainable.keys() | geometric
    assert both.trainable.keys() == ce_ce.trainable.keys() | {"geometry_heads"}
    assert ce.objectives.geometry is ce_ce.objectives.geometry is None
    assert both.objectives.geometry is not None
    for config in (ce, ce_ce, both):
        assert replace(config, trainable={}, objectives=ce.objectives) == replace(ce, trainable={})
        assert config.objectives.language is not None
        assert config.data.chat is not None
        for source in (*config.data.chat.sources, *config.data.chat.validation):
            assert source.name in chat_registry.SOURCES
        assert (source.name in chat_registry.NEEDS_NO_ROOT) == (source.root is None)


def test_joint_paper_scale_values() -> None:
    config = load_config(ROOT / "configs/stage2_g2vlm.yaml")
    assert config.data.chat is not None
    assert (config.runtime.steps, config.optim.lr, config.schedule.warmup) == (16_000, 2e-5, 400)
    assert (config.data.chat.tokens_per_pack, config.data.chat.view_size) == (40_960, (518, 518))
    assert config.data.chat.images == SemanticRule.official()
    assert (config.optim.eps, config.schedule.final_lr, config.optim.clip) == (1e-15, 1e-7, 1.0)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {lr: 5e-4, clip: 2}\nobjectives: {geometry: {camera: 0.3}}\n")
    config, _ = parse(["--config", str(tmp_path / "run.yaml"), "--optim.lr", "1e-4", "--data.views", "[3, 5]"])
    default = RunConfig()
    assert config.optim == replace(default.optim, lr=1e-4, clip=2.0)
    assert config.objectives.geometry == replace(default.objectives.geometry, camera=0.3)
    assert config.data == replace(default.data, views=(3, 5))


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("optm: {lr: 1}", "optim.lr"),
        ("optim: {lrr: 1}", "optim.lr"),
        ("objectives: {geometry: {camra: 1}}", "objectives.geometry.camera"),
        ("data: {source: {nam: rooms}}", "data.source.name"),
        ("runtime: {step: 3}", "runtime.steps"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, text: str, near: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "run.yaml")
    assert caught.value.fix == f"did you mean {near}?"
    assert caught.value.what.startswith("unknown config key")


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean optim\.lr\?"):
        parse(["--optim.lrr", "1e-4"])


@pytest.mark.parametrize(
    "text", ["optim: {lr: fast}", "runtime: {steps: 1.5}", "runtime: {resume: yes}", "optim: [", "3"]
)
def test_wrong_values_are_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "run.yaml")
    assert caught.value.what
    assert "\n" not in caught.value.why


def test_model_overrides_on_the_command_line() -> None:
    config, _ = parse(["--model.preset", "tiny", "--model.decoder.num_layers", "2", "--model.heads.mlp_ratio", "2"])
    assert config.model == {"preset": "tiny", "decoder": {"num_layers": 2}, "heads": {"mlp_ratio": 2}}
    assert preset_with(dict(config.model)).heads.mlp_ratio == 2


def test_model_overrides() -> None:
    config = preset_with({"preset": "tiny", "encoders": "single", "decoder": {"num_layers": 2}})
    assert (config.encoders, config.decoder.num_layers, config.decoder.hidden_size) == ("single", 2, 128)
    for wrong in (
        {"encoder": "single"},
        {"decoder": {"layers": 2}},
        {"preset": "huge"},
        {"decodr": {"num_layers": 2}},
        {"decoder": {"num_layers": "two"}},
        {"decoder": {"num_layers": 2.5}},
        {"heads": {"confidence": 1}},
    ):
        with pytest.raises(InputError):
            preset_with(wrong)
