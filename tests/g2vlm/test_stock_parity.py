"""With geometry off, a model that starts from a stock one computes what that one computes in transformers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer

from g2vlm.config import CLIP_MEAN, Qwen25VLTowerConfig
from g2vlm.convert import convert
from g2vlm.convert.stock import FAMILIES
from g2vlm.errors import CheckpointError, InputError
from g2vlm.processing import sequence_builder
from g2vlm.processor import G2VLMProcessor
from g2vlm.semantic_images import SemanticRule, semantic_pixels
from g2vlm.sequence import SemanticImage, SemanticVideo, Text
from tests.g2vlm.stock import (
    IMAGE,
    MARKERS,
    TEXT_FAMILIES,
    VIDEO,
    VISION,
    VOCABULARY,
    our_greedy,
    our_logits,
    start_from,
    text_model,
    vision_model,
    write_tokenizer,
)

NEW_TOKENS = 5
TEXTS = [(20, 21, 22), (30,), (33, 34)]
GRIDS = [(4, 8), (6, 4)]  # rows, columns in patches
WORDS = (20, 33, 47, 21, 60, 20, 35)


def pixels(*grids: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(map(math.prod, grids)), 1176, generator=torch.Generator().manual_seed(1))


def placeholders(token: int, *grid: int) -> list[int]:
    """The markers, and one placeholder for each merged token."""
    return [2, *[token] * (math.prod(grid) // 4), 3]


def assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=0)


def modalities(ids: Tensor) -> Tensor:
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def images_between_texts() -> tuple[list[Any], Tensor, dict[str, Tensor]]:
    """Our segments, transformers' ids, and the images that both take."""
    segments = [Text(TEXTS[0]), SemanticImage(GRIDS[0]), Text(TEXTS[1]), SemanticImage(GRIDS[1]), Text(TEXTS[2])]
    ids = [*TEXTS[0], *placeholders(IMAGE, *GRIDS[0]), *TEXTS[1], *placeholders(IMAGE, *GRIDS[1]), *TEXTS[2]]
    grids = torch.tensor([[1, *grid] for grid in GRIDS])
    return segments, torch.tensor([ids]), {"pixel_values": pixels(*GRIDS), "image_grid_thw": grids}


@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2_vl", False), ("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", True)]
)
@torch.no_grad()
def test_images_between_texts(tmp_path: Path, family: str, tied: bool) -> None:
    theirs = vision_model(family, tied)
    ours = start_from(theirs, tmp_path, check=True)
    segments, ids, images = images_between_texts()
    arguments = {"input_ids": ids, "mm_token_type_ids": modalities(ids), **images}
    assert_equal_logits(our_logits(ours, segments, **images), theirs(**arguments).logits[0])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    assert our_greedy(ours, segments, NEW_TOKENS, **images) == expected.tolist()


@pytest.mark.parametrize("family", sorted(VISION))
@torch.no_grad()
def test_processor_of_a_start(tmp_path: Path, family: str) -> None:
    """Images are prepared as the tower takes them, within the limits that lie beside the stock weights."""
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock/preprocessor_config.json").write_text('{"min_pixels": 784, "max_pixels": 3136}')
    ours = start_from(vision_model(family), tmp_path)
    processor = G2VLMProcessor.from_pretrained(tmp_path / "ours")
    assert processor.rule == SemanticRule.native(784, 3136).for_tower(ours.config.semantic_encoder)
    assert processor.rule.mean == ((0.5, 0.5, 0.5) if family == "qwen3_vl" else CLIP_MEAN)
    patches, grids = map(torch.from_numpy, semantic_pixels([np.zeros((28, 56, 3), np.uint8)], processor.rule))
    assert ours.encode_images(patches, grids).merged.shape == (2, ours.config.hidden_size)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_short_video(tmp_path: Path, family: str) -> None:
    """An image, then a video of two steps, one second apart, that spans no more in time than in space."""
    theirs = vision_model(family)
    ours = start_from(theirs, tmp_path)
    times = ours.config.semantic_encoder.video_times(2, seconds_per_step=1.0)
    assert times == ((0, 2) if family == "qwen2_5_vl" else (0, 1))
    still, grid = GRIDS[1], (2, *GRIDS[0])
    segments = [Text(TEXTS[0]), SemanticImage(still), SemanticVideo(GRIDS[0], times), Text(TEXTS[2])]
    ids = torch.tensor([[*TEXTS[0], *placeholders(IMAGE, *still), *placeholders(VIDEO, *grid), *TEXTS[2]]])
    patches, rows = pixels(still, grid), math.prod(still)
    timing = {"second_per_grid_ts": torch.tensor([1.0])} if family == "qwen2_5_vl" else {}
    expected = theirs(
        input_ids=ids, mm_token_type_ids=modalities(ids), pixel_values=patches[:rows],
        image_grid_thw=torch.tensor([[1, *still]]), pixel_values_videos=patches[rows:],
        video_grid_thw=torch.tensor([grid]), **timing,
    ).logits[0]  # fmt: skip
    grids = torch.tensor([[1, *still], grid])
    assert_equal_logits(our_logits(ours, segments, pixel_values=patches, image_grid_thw=grids), expected)


@torch.no_grad()
def test_a_long_video_in_fractions_of_a_second(tmp_path: Path) -> None:
    """Text goes on after the largest position, which here is one of time."""
    theirs = vision_model("qwen2_5_vl")
    ours = start_from(theirs, tmp_path)
    times = ours.config.semantic_encoder.video_times(5, seconds_per_step=0.75)
    assert times == (0, 1, 3, 4, 6)
    grid = (5, *GRIDS[1])
    segments = [Text(TEXTS[0]), SemanticVideo(GRIDS[1], times), Text(TEXTS[2])]
    positions = sequence_builder(ours.config).build([segments]).position_ids
    assert positions[0].tolist() == [0, 1, 2, 3] + [4 + t for t in times for _ in range(6)] + [11, 12, 13]
    assert positions[1, 4:16].tolist() == [4, 4, 5, 5, 6, 6] * 2
    assert positions[2, 4:16].tolist() == [4, 5] * 6
    ids = torch.tensor([[*TEXTS[0], *placeholders(VIDEO, *grid), *TEXTS[2]]])
    video = {"pixel_values_videos": pixels(grid), "video_grid_thw": torch.tensor([grid])}
    expected = theirs(input_ids=ids, position_ids=positions[:, None], **video).logits[0]
    images = {"pixel_values": video["pixel_values_videos"], "image_grid_thw": video["video_grid_thw"]}
    assert_equal_logits(our_logits(ours, segments, **images), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
@torch.no_grad()
def test_text(tmp_path: Path, family: str, tied: bool) -> None:
    theirs = text_model(family, tied)
    ours = start_from(theirs, tmp_path)
    ids = torch.tensor([WORDS])
    assert_equal_logits(our_logits(ours, [Text(WORDS)]), theirs(input_ids=ids).logits[0])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(WORDS) :]
    assert our_greedy(ours, [Text(WORDS)], NEW_TOKENS) == expected.tolist()
    assert ours.config.decoder.semantic_qk_norm == (family == "qwen3")
    assert all(tensor.isfinite().all() for tensor in ours.state_dict().values())


@torch.no_grad()
def test_markers_that_a_text_model_lacks_are_added(tmp_path: Path) -> None:
    """The tables grow; no new token is ever the most probable one, and nothing else changes."""
    theirs = text_model("llama")
    (tmp_path / "stock").mkdir()
    write_tokenizer(tmp_path / "stock", MARKERS[:2])
    ours = start_from(theirs, tmp_path, check=True)
    tokens = ours.config.tokens
    assert (tokens.bos, tokens.eos, tokens.vision_start, tokens.vision_end) == (0, 1, VOCABULARY, VOCABULARY + 1)
    assert tokens.recon_prompt == (10, 11, 12, 13, 14)
    assert ours.config.vocab_size == 128
    logits, expected = our_logits(ours, [Text(WORDS)]), theirs(input_ids=torch.tensor([WORDS])).logits[0]
    assert_equal_logits(logits[:, :VOCABULARY], expected)
    assert (logits[:, VOCABULARY:].amax(1) < expected.amax(1)).all()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.convert_tokens_to_ids(MARKERS[2:]) == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer.eos_token == "<|im_end|>"
    processor = G2VLMProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.chat.ids.vision_start, processor.chat.ids.vision_end) == (VOCABULARY, VOCABULARY + 1)
    assert processor.rule == SemanticRule.native(max_pixels=84 * 84)


def test_added_markers_never_share_an_id(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    gaps = Tokenizer(models.WordLevel({"a": 0, "?": 2}, unk_token="?"))
    gaps.save(str(tmp_path / "stock" / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="gaps"):
        start_from(text_model("llama"), tmp_path)


def test_times_follow_the_clock_only_where_the_model_does() -> None:
    tower = Qwen25VLTowerConfig(tokens_per_second=2)
    assert tower.video_times(4, 0.25) == (0, 0, 1, 1)
    assert tower.video_times(3, 2.0) == (0, 4, 8)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}, "sliding"),
    ],
)
def test_text_models_that_compute_something_else(tmp_path: Path, family: str, changes: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        start_from(text_model(family, **changes), tmp_path)
    assert not (tmp_path / "ours").exists()


def test_scaled_rotation_is_refused(tmp_path: Path) -> None:
    model = text_model("llama")
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(CheckpointError, match="rope_type is 'linear'"):
        start_from(model, tmp_path)


def test_preset_of_a_stock_model_only(tmp_path: Path) -> None:
    start_from(text_model("llama"), tmp_path)
    with pytest.raises(InputError, match="no preset huge"):
        convert(tmp_path / "stock", tmp_path / "other", preset="huge")
    with pytest.raises(InputError, match="drop --preset"):
        convert(tmp_path / "ours", tmp_path / "other", preset="tiny")


def test_every_family_is_tested() -> None:
    assert {*VISION, *TEXT_FAMILIES} == set(FAMILIES)
