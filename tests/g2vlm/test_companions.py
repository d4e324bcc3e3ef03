"""Tokenizer and processor beside weights: saved with presets, kept when a model is saved again, made by conversion."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from g2vlm.checkpoint import load_model, random_model, read_config, save_model
from g2vlm.companions import released_rule, stock_rule, write_companions
from g2vlm.config import G2VLMConfig, SemanticEncoderConfig, TokenIds
from g2vlm.convert import convert
from g2vlm.convert.g2vlm_release import CONFIG_FILES
from g2vlm.errors import CheckpointError
from g2vlm.processor import G2VLMProcessor
from g2vlm.prompts import EMBEDDED, SPECIAL_TOKENS, ChatTokenizer
from g2vlm.semantic_images import SemanticRule
from g2vlm.weights import WEIGHTS
from tests.g2vlm.test_prompts import write_bytes_tokenizer
from tests.parity import golden

NAMES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_preset_is_saved_with_the_embedded_tokenizer(tiny_weights: Path) -> None:
    assert names(tiny_weights) >= NAMES
    for file in EMBEDDED.iterdir():
        assert (tiny_weights / file.name).read_bytes() == file.read_bytes()
    processor = AutoProcessor.from_pretrained(tiny_weights)
    assert isinstance(processor, G2VLMProcessor)
    assert processor.rule == SemanticRule.native(max_pixels=84 * 84)
    assert processor.view_width == read_config(tiny_weights).view_width == 84


def test_a_model_keeps_the_companions_it_was_loaded_with(tiny_weights: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_weights, tmp_path / "own"))
    write_bytes_tokenizer(own, {token: 4 + i for i, token in enumerate(SPECIAL_TOKENS.values())})
    values = json.loads((own / "processor_config.json").read_text()) | {"view_width": 56}
    (own / "processor_config.json").write_text(json.dumps(values))
    save_model(load_model(own), tmp_path / "again")
    for name in NAMES:
        assert (tmp_path / "again" / name).read_bytes() == (own / name).read_bytes()


@pytest.mark.parametrize("overrides", [
    {"tokens": TokenIds(0, 1, 2, 3, recon_prompt=(4, 5))},
    {"decoder": dict(vars(G2VLMConfig.tiny().decoder), vocab_size=500)},
])  # fmt: skip
def test_another_vocabulary_gets_no_tokenizer(tmp_path: Path, overrides: dict) -> None:
    write_companions(tmp_path, G2VLMConfig.tiny(**overrides))
    assert names(tmp_path) == set()


def test_a_model_without_a_name_or_folder(tmp_path: Path) -> None:
    save_model(random_model(G2VLMConfig.tiny(), name="nowhere"), tmp_path / "model")
    assert names(tmp_path / "model") >= NAMES


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A golden checkpoint with a byte-level tokenizer."""
    folder = golden.DEFAULT / "g2vlm_tiny"
    copy = tmp_path / "release"
    copy.mkdir()
    for name in (WEIGHTS, *CONFIG_FILES):
        shutil.copyfile(folder / name, copy / name)
    write_bytes_tokenizer(copy, {token: 10 + i for i, token in enumerate(SPECIAL_TOKENS.values())})
    return copy


def test_a_converted_release_squashes_its_images(release: Path, tmp_path: Path) -> None:
    (release / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 50176}')
    convert(release, tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, G2VLMProcessor)
    assert processor.rule == SemanticRule.official(3136, 50176)
    assert processor.view_width == read_config(release).view_width
    assert processor.chat.ids == ChatTokenizer.open(release).ids
    convert(tmp_path / "ours", tmp_path / "back")
    assert "processor_config.json" not in names(tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()


def test_a_release_loaded_and_saved_is_as_converted(release: Path, tmp_path: Path) -> None:
    convert(release, tmp_path / "ours")
    save_model(load_model(release), tmp_path / "saved")
    stored = [json.loads((tmp_path / name / "processor_config.json").read_text()) for name in ("ours", "saved")]
    assert stored[0] == stored[1]


def test_without_a_tokenizer_there_is_no_processor(release: Path, tmp_path: Path) -> None:
    (release / "tokenizer.json").unlink()
    (release / "special_ids.json").write_text('{"bos": 1, "eos": 2, "vision_start": 3, "vision_end": 4}')
    convert(release, tmp_path / "ours")
    assert not names(tmp_path / "ours") & NAMES


@pytest.mark.parametrize(("stored", "limits"), [
    ({}, (3136, 1003520)),
    ({"min_pixels": 784, "max_pixels": 12845056}, (784, 12845056)),
    ({"size": {"shortest_edge": 784, "longest_edge": 2000}}, (784, 2000)),
    ({"size": None, "max_pixels": 5000}, (3136, 5000)),
])  # fmt: skip
def test_limits_of_the_image_processor(tmp_path: Path, stored: dict, limits: tuple[int, int]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    assert released_rule(tmp_path) == SemanticRule.official(*limits)
    assert stock_rule(tmp_path, SemanticEncoderConfig()) == SemanticRule.native(*limits)


@pytest.mark.parametrize("content", ["{", "[]", '{"max_pixels": "many"}', '{"max_pixels": 1}', '{"size": 3}'])
def test_a_damaged_image_processor_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        released_rule(tmp_path)
