"""Seeds and hardware markers for every test."""

from pathlib import Path

import pytest
import torch

from g2vlm.checkpoint import load_model, save_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny preset with random weights, stored as the demo weights are."""
    folder = tmp_path_factory.mktemp("models") / "demo"
    save_model(load_model("tiny"), folder, dtype="bfloat16")
    return folder


@pytest.fixture
def demo_weights(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of the package's demo weights."""
    monkeypatch.setattr("g2vlm.checkpoint.DEMO_WEIGHTS", tiny_weights)
    return tiny_weights


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
