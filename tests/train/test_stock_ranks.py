"""Two gloo processes with different rows of a stock model against one with all of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from g2vlm.data.chat.types import ChatSample
from tests.train.clips import BoxClips
from tests.train.gradients import kept_gradients
from tests.train.stocks import clip_rows, stock_parts, stock_run, supervised_run
from tests.train.test_ranks import ENGINES, WORLD, free_port
from train import engine as engines
from train.assemble import Assembled
from train.stock.batch import stock_inputs

pytestmark = pytest.mark.xdist_group("test_stock_ranks")  # what the two processes report is made once

ASKED, SILENT, WORDS = BoxClips(), BoxClips(views=3, asked=False), BoxClips(views=0)
STEPS: dict[str, tuple[list[BoxClips], list[BoxClips]]] = {
    "clips on both": ([ASKED, SILENT], [ASKED]),
    "clips on one, words on the other": ([ASKED, SILENT], [WORDS]),
    "no words": ([SILENT], [SILENT]),
    "words alone": ([WORDS], [WORDS, WORDS]),
    "nothing readable on one": ([], [ASKED]),
}
"""What each rank's rows are."""

CASES = (("ddp", "qwen2_vl"), ("ddp", "qwen3_vl"), ("fsdp2", "qwen3_vl"))
CONFIGS = {"qwen2_vl": stock_run(), "qwen3_vl": supervised_run(stock_run(family="qwen3_vl"))}


def samples(sources: list[BoxClips], rank: int) -> list[ChatSample]:
    return [source.load(3 * rank + i, i) for i, source in enumerate(sources)]


def gradients(parts: Assembled, family: str, shown: list[ChatSample]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step; nothing is changed."""
    batch = clip_rows(shown, family, parts)
    with kept_gradients(parts.trainer, parts.model, parts.heads) as kept:
        result = parts.trainer.step(stock_inputs(batch), batch)
    return result.loss, kept


def process(rank: int, ports: dict[str, int], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, port in ports.items():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with engines.engine(name, "cpu") as engine:
            for family in (family for kind, family in CASES if kind == name):
                parts = stock_parts(CONFIGS[family], engine)
                for title, step in STEPS.items():
                    found[f"{name}/{family}/{title}"] = gradients(parts, family, samples(step[rank], rank))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every engine, family and step."""
    folder = tmp_path_factory.mktemp("stock_ranks")
    ports = {name: free_port() for name in ENGINES}
    spawned: Any = mp.spawn(process, (ports, folder), nprocs=WORLD, join=False)
    while not spawned.join(timeout=60):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds with the rows of both."""
    found = {}
    for family, chosen in CONFIGS.items():
        parts = stock_parts(chosen)
        for title, step in STEPS.items():
            joined = [sample for rank in range(WORLD) for sample in samples(step[rank], rank)]
            found[f"{family}/{title}"] = gradients(parts, family, joined)
    return found


@pytest.mark.parametrize("title", STEPS)
@pytest.mark.parametrize(("name", "family"), CASES)
def test_two_ranks_are_one(
    name: str, family: str, title: str, reports: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    loss, expected = alone[f"{family}/{title}"]
    assert any(key.startswith("heads.") for key in expected) == (family == "qwen3_vl")
    for report in reports:
        found_loss, found = report[f"{name}/{family}/{title}"]
        assert found_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=max(1e-4 * scale, 1e-5), msg=key)
