"""Released layout -> ours -> released layout changes no value, and a damaged release is refused by name.

For any release-layout fixture: nothing about its sizes is written here.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2vlm.checkpoint import inspect, load_model, read_config, save_model
from g2vlm.convert import convert, verify
from g2vlm.convert.g2vlm_release import CONFIG_FILES
from g2vlm.errors import CheckFailed, CheckpointError, InputError
from g2vlm.weights import WEIGHTS, WeightFiles
from tests.parity import golden

pytestmark = pytest.mark.parity
CASES = golden.cases("g2vlm_*/model.safetensors")
COPIED = (WEIGHTS, "special_ids.json", *CONFIG_FILES)
UNSTORED = {"dtype": None, "architectures": None}  # what only our config.json states


@pytest.fixture
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a fixture's checkpoint that a test may damage."""
    folder = tmp_path / "release"
    folder.mkdir()
    for name in COPIED:
        if (request.param.parent / name).is_file():
            shutil.copyfile(request.param.parent / name, folder / name)
    return folder


def for_each_release(test: Callable) -> Callable:
    return pytest.mark.parametrize("release", CASES, indirect=True)(test)


def first_case(test: Callable) -> Callable:
    return pytest.mark.parametrize("release", CASES[:1], indirect=True)(test)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)


def assert_equal_files(first: Path, second: Path) -> None:
    a, b = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert torch.equal(a[name], b[name]), name


def assert_equal_configs(first: Path, second: Path) -> None:
    """Equal meaning; and no value that both files state differs."""
    assert read_config(first).to_dict() == read_config(second).to_dict()
    for name in CONFIG_FILES:
        a, b = (json.loads((folder / name).read_text()) for folder in (first, second))
        assert {key: a[key] for key in a.keys() & b.keys()} == {key: b[key] for key in a.keys() & b.keys()}, name


@for_each_release
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_there_and_back(release: Path, tmp_path: Path, stored: torch.dtype) -> None:
    rewrite(release, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    there = convert(release, tmp_path / "ours", check=True)
    back = convert(tmp_path / "ours", tmp_path / "back", check=True)
    assert_equal_files(release, tmp_path / "back")
    assert_equal_configs(release, tmp_path / "back")
    assert there.num_parameters == back.num_parameters == sum(t.numel() for t in load_file(release / WEIGHTS).values())
    assert back.num_tensors == len(inspect(release))
    assert f"{len(inspect(release))} tensors convert back to equal values" in there.checks
    assert "identical reconstruction of two random views" in there.checks


@for_each_release
def test_both_layouts_load_to_the_same_model(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "ours")
    first, second = load_model(release), load_model(tmp_path / "ours")
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items())
    assert read_config(release).to_dict() == {**read_config(tmp_path / "ours").to_dict(), **UNSTORED}
    assert first.config.geometry_encoder.windows == "official"
    assert first.config.heads.normals == "derived"
    assert first.geometry_encoder.mask_token.ne(0).any()


@for_each_release
def test_widening_and_rounding(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "wide", dtype=torch.float32)
    assert {spec.dtype for spec in inspect(tmp_path / "wide").values()} == {torch.float32}
    convert(tmp_path / "wide", tmp_path / "narrow", dtype=torch.bfloat16, check=True)
    assert {spec.dtype for spec in inspect(tmp_path / "narrow").values()} == {torch.bfloat16}
    values, original = load_file(tmp_path / "narrow" / WEIGHTS), load_file(release / WEIGHTS)
    assert all(torch.equal(values[name], t.to(torch.bfloat16)) for name, t in original.items())


@first_case
def test_a_saved_model_converts_back(release: Path, tmp_path: Path) -> None:
    save_model(load_model(release), tmp_path / "saved", dtype="bfloat16", max_shard_size="2MB")
    convert(tmp_path / "saved", tmp_path / "back")
    values, original = load_file(tmp_path / "back" / WEIGHTS), load_file(release / WEIGHTS)
    assert all(torch.equal(values[name], t.to(torch.bfloat16)) for name, t in original.items())


@first_case
def test_confidence_head_survives(release: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        points = {name: t for name, t in tensors.items() if name.startswith("point_decoder.")}
        tensors |= {name.replace("point_", "conf_", 1): t * 2 for name, t in points.items()}
        width = tensors["point_head.proj.weight"].shape[1]
        tensors |= {"conf_head.proj.weight": torch.ones(196, width), "conf_head.proj.bias": torch.ones(196)}

    rewrite(release, add)
    convert(release, tmp_path / "ours", check=True)
    assert load_model(tmp_path / "ours").config.heads.confidence
    convert(tmp_path / "ours", tmp_path / "back")
    assert_equal_files(release, tmp_path / "back")


@first_case
def test_heads_of_other_sizes(release: Path, tmp_path: Path) -> None:
    """Depth and width of the geometry decoders follow the tensors."""

    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if "_decoder.blocks.4." in name:
                del tensors[name]
        for name in ("point_decoder.linear_out.weight", "global_points_decoder.linear_out.weight",
                     "point_decoder.linear_out.bias", "global_points_decoder.linear_out.bias"):  # fmt: skip
            tensors[name] = tensors[name][:96]
        for name in ("point_head.proj.weight", "global_point_head.proj.weight"):
            tensors[name] = tensors[name][:, :96]

    rewrite(release, shrink)
    convert(release, tmp_path / "ours", check=True)
    heads = read_config(tmp_path / "ours").heads
    assert (heads.depth, heads.point_dim) == (4, 96)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_equal_files(release, tmp_path / "back")


@first_case
def test_companion_files_travel(release: Path, tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "merges.txt", "preprocessor_config.json"):
        (release / name).write_text(f'{{"of": "{name}"}}')
    (release / "modeling_evil.py").write_text("raise SystemExit")
    convert(release, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer_config.json", "merges.txt", "preprocessor_config.json", "special_ids.json"):
        assert (tmp_path / "back" / name).read_bytes() == (release / name).read_bytes()
    assert not (tmp_path / "ours" / "modeling_evil.py").exists()


@first_case
def test_ids_survive_without_any_tokenizer_file(release: Path, tmp_path: Path) -> None:
    ids = json.loads((release / "special_ids.json").read_text())
    (release / "special_ids.json").write_text(json.dumps({**ids, "recon_prompt": [7, 8, 9]}))
    convert(release, tmp_path / "ours")
    (tmp_path / "ours" / "special_ids.json").unlink()
    convert(tmp_path / "ours", tmp_path / "back")
    assert read_config(tmp_path / "back").tokens == read_config(release).tokens
    assert read_config(release).tokens.recon_prompt == (7, 8, 9)


@first_case
def test_settings_that_the_release_cannot_store(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["geometry_encoder"]["windows"] = "per_image"
    config["semantic_image_attention"] = "causal"
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    result = convert(tmp_path / "ours", tmp_path / "back", check=True)
    assert "windows=per_image" in str(result)
    assert "semantic_image_attention=causal" in str(result)
    assert any("not compared" in check for check in result.checks)


def test_presets_with_other_heads_do_not_fit(tmp_path: Path) -> None:
    save_model(load_model("tiny"), tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"normals are learned; heads\.num_heads is 4"):
        convert(tmp_path / "tiny", tmp_path / "released")


@first_case
def test_destination_is_not_overwritten_unasked(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "ours")
    before = (tmp_path / "ours" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="not empty"):
        convert(release, tmp_path / "ours", dtype=torch.float32)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == before
    convert(release, tmp_path / "ours", dtype=torch.float32, overwrite=True)
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() != before
    with pytest.raises(InputError, match="same folder"):
        convert(release, release, overwrite=True)


@first_case
@pytest.mark.parametrize(("function", "words"), [("_equal_bits", "point_head"), ("output_difference", "other outputs")])
def test_failed_check_writes_nothing(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, words: str
) -> None:
    monkeypatch.setattr(verify, function, lambda *args: function == "output_difference" and 1e-3)
    with pytest.raises(CheckFailed, match=words) as caught:
        convert(release, tmp_path / "ours", check=True)
    assert caught.value.code == 1
    assert sorted(tmp_path.iterdir()) == [release]


@first_case
def test_check_compares_values(release: Path, tmp_path: Path) -> None:
    """One changed value is found, by tensor and by output."""
    convert(release, tmp_path / "ours")
    name = "heads.point_head.proj.bias"
    changed = load_file(tmp_path / "ours" / WEIGHTS)
    changed[name][0] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    first, second = WeightFiles(tmp_path / "ours"), WeightFiles(tmp_path / "changed.safetensors")
    assert verify.differing_tensors(first, second) == [name]
    assert verify.differing_tensors(first, first) == []
    config = read_config(tmp_path / "ours")
    assert verify.output_difference((config, first), (config, second)) > 0


# Damage


def expect_refusal(release: Path, tmp_path: Path, *words: str) -> None:
    """Loading and converting both refuse with exit code 5, name the damage, and leave nothing behind."""
    before = sorted(tmp_path.iterdir())
    for action in (load_model, lambda folder: convert(folder, tmp_path / "ours")):
        with pytest.raises(CheckpointError) as caught:
            action(release)
        assert caught.value.code == 5
        assert caught.value.fix
        for word in words:
            assert word in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@first_case
def test_missing_and_extra_tensors_are_all_listed(release: Path, tmp_path: Path) -> None:
    gone = ["language_model.lm_head.weight", "dino_model.encoder.layer.0.attention.attention.key.bias",
            "point_decoder.blocks.4.norm1.weight", "camera_head.res_conv.1.res_conv3.bias"]  # fmt: skip

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in gone:
            del tensors[name]
        tensors |= {"surplus.weight": torch.ones(1), "vit_model.blocks.99.norm1.bias": torch.ones(1)}
        tensors["point_decoder.blocks.5.norm1.weight"] = torch.ones(1)

    rewrite(release, damage)
    extra = ["surplus.weight", "vit_model.blocks.99.norm1.bias", "point_decoder.blocks.5.norm1.weight"]
    expect_refusal(release, tmp_path, "4 missing", "3 unexpected", *gone, *extra)


def names_to_damage() -> list[str]:
    """A spread over all parts of the first fixture."""
    path = CASES[0].values[0]
    return sorted(inspect(path.parent))[::29] if path else []


@pytest.mark.parametrize("name", names_to_damage())
@pytest.mark.parametrize("way", ["absent", "misshapen", "integer"])
@first_case
def test_any_single_damaged_tensor_is_named(release: Path, name: str, way: str) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if way == "misshapen":
            tensors[name] = torch.cat([tensor, tensor])
        if way == "integer":
            tensors[name] = tensor.to(torch.int32)

    rewrite(release, damage)
    with pytest.raises(CheckpointError) as caught:
        load_model(release)
    assert name in str(caught.value)
    assert str(caught.value).startswith(f"the weights of {release} do not fit")
    assert "\n  why: 1 " in str(caught.value), "one damaged tensor makes one finding"


@first_case
def test_registers_inside_the_language_model(release: Path, tmp_path: Path) -> None:
    rewrite(release, lambda tensors: tensors.update(register_token=torch.ones(1, 1, 5, 4)))
    expect_refusal(release, tmp_path, "register_token")


@first_case
@pytest.mark.parametrize("name", [*CONFIG_FILES, WEIGHTS])
def test_missing_file(release: Path, tmp_path: Path, name: str) -> None:
    (release / name).unlink()
    expect_refusal(release, tmp_path)


@first_case
@pytest.mark.parametrize("keep", [100, -1, 0])
def test_truncated_weights(release: Path, tmp_path: Path, keep: int) -> None:
    (release / WEIGHTS).write_bytes((release / WEIGHTS).read_bytes()[:keep])
    expect_refusal(release, tmp_path, WEIGHTS)


@first_case
def test_text_as_weights(release: Path, tmp_path: Path) -> None:
    (release / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 18152860304\n")
    expect_refusal(release, tmp_path, WEIGHTS)


class Bomb:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@first_case
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_pickles_never_run(release: Path, tmp_path: Path, name: str) -> None:
    (release / WEIGHTS).unlink()
    (release / name).write_bytes(pickle.dumps(Bomb(release / "executed")))
    expect_refusal(release, tmp_path, name)
    assert not (release / "executed").exists()


@first_case
@pytest.mark.parametrize("name", CONFIG_FILES)
@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_garbage_config(release: Path, tmp_path: Path, name: str, text: str) -> None:
    (release / name).write_bytes(text.encode("latin-1"))
    expect_refusal(release, tmp_path, name)


@first_case
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("text_config.json", "hidden_act", "relu"),
        ("text_config.json", "num_hidden_layers", "three"),
        ("text_config.json", "num_attention_heads", 0),
        ("text_config.json", "vocab_size", True),
        ("text_config.json", "rope_scaling", {"type": "yarn", "mrope_section": [2, 3, 3]}),
        ("text_config.json", "rope_scaling", {"type": "mrope", "mrope_section": [1, 2]}),
        ("vit_config.json", "in_channels", 4),
        ("vit_config.json", "hidden_size", 7),
        ("vit_config.json", "num_heads", -2),
        ("dino_config.json", "use_swiglu_ffn", True),
        ("dino_config.json", "hidden_act", "silu"),
        ("dino_config.json", "qkv_bias", False),
        ("dino_config.json", "patch_size", 16),
        ("dino_config.json", "num_attention_heads", 5),
        ("special_ids.json", "bos", 10**9),
        ("special_ids.json", "eos", "text"),
    ],
)
def test_refused_config_values(release: Path, tmp_path: Path, name: str, key: str, value: object) -> None:
    values = json.loads((release / name).read_text())
    (release / name).write_text(json.dumps({**values, key: value}))
    expect_refusal(release, tmp_path)


@first_case
@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("text_config.json", "num_hidden_layers", "language_model.model.layers."),
        ("vit_config.json", "depth", "vit_model.blocks."),
        ("dino_config.json", "num_hidden_layers", "dino_model.encoder.layer."),
        ("text_config.json", "intermediate_size", "mlp_moe_geo.up_proj.weight"),
    ],
)
def test_config_of_another_size(release: Path, tmp_path: Path, name: str, key: str, words: str) -> None:
    values = json.loads((release / name).read_text())
    (release / name).write_text(json.dumps({**values, key: values[key] + 1}))
    expect_refusal(release, tmp_path, words)


@first_case
def test_missing_section_falls_back_only_to_the_released_one(release: Path, tmp_path: Path) -> None:
    values = json.loads((release / "text_config.json").read_text())
    del values["rope_scaling"]
    (release / "text_config.json").write_text(json.dumps(values))
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    if head_dim == 128:
        assert read_config(release).decoder.mrope_sections == (16, 24, 24)
    else:
        expect_refusal(release, tmp_path, "mrope_section")
