"""Geometric supervision on two gloo processes whose packs hold different clips against one with all of them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from g2vlm.data.chat.batch import Filling
from g2vlm.data.chat.types import ChatSample
from tests.train.chats import CE_CE, EVERYTHING
from tests.train.clips import BoxClips, clip_inputs, clip_pack, clip_run
from tests.train.gradients import kept_gradients
from tests.train.test_ranks import ENGINES, WORLD, free_port
from train import engine as engines
from train.assemble import Assembled, assemble
from train.config import RunConfig
from train.engine import Engine

pytestmark = pytest.mark.xdist_group("test_supervision_ranks")  # what the two processes report is made once

ASKED, SILENT, WORDS = BoxClips(), BoxClips(views=3, asked=False), BoxClips(views=0)
STEPS: dict[str, tuple[list[BoxClips], list[BoxClips]]] = {
    "clips on both": ([ASKED, SILENT], [ASKED]),
    "clips on one, words on the other": ([ASKED, SILENT], [WORDS]),
    "unknown depth on one": ([BoxClips(depth=False)], [SILENT]),
    "words alone": ([WORDS], [WORDS, WORDS]),
    "nothing readable on one": ([], [ASKED]),
}
"""What each rank's pack holds."""

CONFIGS = {"geovr": clip_run(trainable=CE_CE), "everything": clip_run(trainable=EVERYTHING, every=True)}


def samples(sources: list[BoxClips], rank: int) -> list[ChatSample]:
    return [source.load(3 * rank + i, i) for i, source in enumerate(sources)]


def assembled(config: RunConfig, engine: Engine) -> Assembled:
    torch.manual_seed(0)
    return assemble(config, engine)


def gradients(parts: Assembled, batch: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step; nothing is changed."""
    with kept_gradients(parts.trainer, parts.model, parts.heads) as kept:
        result = parts.trainer.step(clip_inputs(batch), batch)
    return result.loss, kept


def process(rank: int, ports: dict[str, int], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, port in ports.items():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with engines.engine(name, "cpu") as engine:
            for kind, chosen in CONFIGS.items():
                parts = assembled(chosen, engine)
                assert parts.supervision is not None
                for title, step in STEPS.items():
                    batch = clip_pack(samples(step[rank], rank), parts.supervision, Filling(images=True))
                    found[f"{name}/{kind}/{title}"] = gradients(parts, batch)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every engine, config and step."""
    folder = tmp_path_factory.mktemp("supervision_ranks")
    ports = {name: free_port() for name in ENGINES}
    spawned: Any = mp.spawn(process, (ports, folder), nprocs=WORLD, join=False)
    while not spawned.join(timeout=60):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("title", STEPS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_are_one(name: str, kind: str, title: str, reports: list[dict[str, Any]]) -> None:
    alone = assembled(CONFIGS[kind], Engine(torch.device("cpu")))
    assert alone.supervision is not None
    joined = [sample for rank in range(WORLD) for sample in samples(STEPS[title][rank], rank)]
    loss, expected = gradients(alone, clip_pack(joined, alone.supervision, Filling(images=True)))
    assert any(key.startswith("heads.") for key in expected)
    for report in reports:
        found_loss, found = report[f"{name}/{kind}/{title}"]
        assert found_loss == pytest.approx(loss, rel=1e-4)
        for key, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=max(1e-4 * scale, 1e-5), msg=key)
        for key in found.keys() - expected.keys():
            assert not found[key].any(), key
