"""What every patch of a view shows, and that the semantic encoder, and nothing else, learns it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from g2vlm.chat_model import processor_of
from g2vlm.checkpoint import load_model, save_model
from g2vlm.config import G2VLMConfig
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.types import ViewRequest
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.semantic_images import SemanticRule, semantic_pixels
from train.sight import CAMERAS, LAW, SIDE, VIEWS, Lessons, encode, lessons, main, patches, read, teach


@pytest.fixture(scope="module")
def shown() -> Lessons:
    return lessons(range(24), 0, 1)


@pytest.fixture
def model() -> G2VLMForConditionalGeneration:
    torch.manual_seed(0)
    return G2VLMForConditionalGeneration(G2VLMConfig.tiny())


def test_patches_are_told_in_the_order_of_the_encoder() -> None:
    """An image that shows in every pixel the number of the thing there gives the encoder's patches the same owners."""
    source = RoomsSource(LAW, "train", 0, CAMERAS)
    scene, room = source.load(3, ViewRequest(VIEWS, (SIDE, SIDE), 3)), source.scene(3)
    assert scene.instances is not None
    assert scene.depth is not None
    numbers = np.repeat(scene.instances.numpy()[..., None], 3, axis=-1)
    assert numbers.min() >= 0
    assert numbers.max() < 256
    rule = SemanticRule.native()
    pixels, _ = semantic_pixels(list(numbers.astype(np.uint8)), rule)
    seen = np.rint((pixels[:, : 14 * 14] * rule.std[0] + rule.mean[0]) * 255).astype(int)  # red, at the first time
    names = {thing.index: thing.category for thing in room.instances}
    owners, depths = patches(room, scene)
    most = [int(np.bincount(patch).argmax()) for patch in seen]
    assert owners == [names[number] for number in most]
    assert depths.shape == (VIEWS, 36)
    corner = scene.depth[0, :14, :14][scene.instances[0, :14, :14] == most[0]]
    assert depths[0, 0] == np.median(corner.numpy())


def cut(images: np.ndarray) -> np.ndarray:
    """(N, 84, 84, 3) -> (N, P, 196, 3), patches in the order of the encoder."""
    order = [
        (row + i, column + j) for row in range(0, 6, 2) for column in range(0, 6, 2) for i in (0, 1) for j in (0, 1)
    ]
    return np.stack([images[:, 14 * r : 14 * r + 14, 14 * c : 14 * c + 14].reshape(-1, 196, 3) for r, c in order], 1)


def test_rooms_are_shown_whole(shown: Lessons) -> None:
    assert shown.images.shape == (24 * VIEWS, SIDE, SIDE, 3)
    assert shown.owners.shape == shown.depths.shape == (24 * VIEWS, 36)
    assert {"wall", "floor", "ceiling", "door"} <= set(shown.categories)
    assert set(np.unique(shown.owners)) == set(range(len(shown.categories)))
    dotted = shown.marked < 36
    assert 0.2 < dotted.mean() < 0.7
    red = (cut(shown.images) == (255, 0, 0)).all(axis=-1).sum(axis=-1)  # (N, P)
    assert (red[dotted].max(axis=1) >= 5).all()
    assert (red[dotted].argmax(axis=1) == shown.marked[dotted]).mean() > 0.9  # a dot may lie on the border of two
    assert (shown.marked[~dotted] == 36).all()
    again = lessons(range(2), 0, 1)
    assert np.array_equal(again.images, shown.images[: 2 * VIEWS])
    assert [again.categories[i] for i in again.owners.flat] == [
        shown.categories[i] for i in shown.owners[: 2 * VIEWS].flat
    ]


def test_the_encoder_learns_and_nothing_else_changes(shown: Lessons, model: G2VLMForConditionalGeneration) -> None:
    rule = processor_of(model.config).rule
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        tokens = encode(model, rule, shown.images[:2])
    assert tokens.shape == (2, 9, model.config.decoder.hidden_size)
    reader = teach(model, rule, shown, steps=150, lr=3e-3, seed=0)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("semantic_encoder.") for name in changed)
    with torch.no_grad():
        told = reader(encode(model, rule, shown.images))
    right = (told.categories.argmax(-1).numpy() == shown.owners).mean()
    common = (shown.owners == np.bincount(shown.owners.flat).argmax()).mean()
    assert right > common + 0.15
    spread = np.abs(np.log(shown.depths) - np.median(np.log(shown.depths))).mean()
    assert np.abs(told.log_depths.numpy() - np.log(shown.depths)).mean() < 0.8 * spread
    assert (told.places.argmax(-1) == torch.arange(9)).float().mean() > 0.5
    found = (told.marked.argmax(-1).numpy() == shown.marked).mean()
    assert found > (shown.marked == 36).mean() + 0.1
    assert f"{100 * right:.1f} % of the categories right" in read(model, rule, reader, shown)


def test_the_command_writes_a_model(model: G2VLMForConditionalGeneration, tmp_path: Path) -> None:
    save_model(model, tmp_path / "start")
    common = ["--model", str(tmp_path / "start"), "--rooms", "24", "--steps", "2", "--workers", "1"]
    assert main([*common, "--output", str(tmp_path / "taught")]) == 0
    taught, start = (load_model(tmp_path / name).state_dict() for name in ("taught", "start"))
    assert {name.split(".")[0] for name in taught if not torch.equal(taught[name], start[name])} == {"semantic_encoder"}
    assert main([*common, "--output", str(tmp_path / "taught")]) == 2
