"""Two gloo processes with packs of different contents against one with all of it."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from g2vlm.data.chat.batch import Filling
from g2vlm.data.chat.types import ChatSample
from tests.train.chats import CE, CE_CE, EVERYTHING, Colours, chat_run, chat_steps, chat_trainer, pack
from tests.train.gradients import kept_gradients
from tests.train.test_ranks import ENGINES, WORLD, free_port
from train import engine as engines
from train.config import AdapterConfig, GeometryConfig, LanguageConfig, ObjectivesConfig, RunConfig

pytestmark = pytest.mark.xdist_group("test_chat_ranks")  # what the two processes report is made once

SEEING, READING = Colours(views=2, pictures=2), Colours(views=0, pictures=0)
STEPS: dict[str, tuple[list[Colours], list[Colours]]] = {
    "views and images on one rank": ([SEEING, READING], [READING]),
    "views on one, images on the other": ([Colours(pictures=0)], [Colours(views=0), READING, READING]),
    "views of the images on one": ([SEEING], [Colours(pictures=0), Colours(views=0)]),
    "unknown depth on one": ([Colours(pictures=2, depth=False)], [SEEING]),
    "text alone": ([READING], [READING, READING]),
    "nothing readable on one": ([], [SEEING]),
}
"""What each rank's pack holds."""


def config(reduction: Any, trainable: dict[str, float], geometry: bool, lora: AdapterConfig | None = None) -> RunConfig:
    plain = chat_run(trainable=trainable)
    weights = GeometryConfig(translation=10.0) if geometry else None
    return RunConfig(
        model=plain.model,
        trainable=plain.trainable,
        lora=lora,
        objectives=ObjectivesConfig(weights, LanguageConfig(reduction=reduction)),
        data=plain.data,
    )


CONFIGS = {
    "everything": config("token", EVERYTHING, True),
    "answers": config("sample_sqrt", CE, False),
}
CONFIGS["fused"] = replace(
    CONFIGS["answers"], model={**chat_run().model, "fusion": {"dropout": 0}}, trainable={**CE, "fusion": 1.0}
)
if find_spec("peft") is not None:
    CONFIGS["adapters"] = config("token", CE_CE, True, AdapterConfig(("semantic", "geometric")))


def samples(sources: list[Colours], rank: int) -> list[ChatSample]:
    return [source.load(3 * rank + i, i) for i, source in enumerate(sources)]


def filling(step: tuple[list[Colours], list[Colours]]) -> Filling:
    """As the stream plans it."""
    sources = [source for part in step for source in part]
    return Filling(int(any(source.views for source in sources)), any(source.pictures for source in sources), (28, 28))


def gradients(trainer: Any, model: Any, chosen: RunConfig, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step; nothing is changed."""
    with kept_gradients(trainer, model) as kept:
        (result,) = chat_steps(trainer, chosen, [batch])
    return result.loss, kept


def process(rank: int, ports: dict[str, int], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, port in ports.items():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with engines.engine(name, "cpu") as engine:
            for kind, chosen in CONFIGS.items():
                trainer, model = chat_trainer(chosen, engine)
                for title, step in STEPS.items():
                    batch = pack(samples(step[rank], rank), filling(step))
                    found[f"{name}/{kind}/{title}"] = gradients(trainer, model, chosen, batch)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, for every engine, config and step."""
    folder = tmp_path_factory.mktemp("chat_ranks")
    ports = {name: free_port() for name in ENGINES}
    spawned: Any = mp.spawn(process, (ports, folder), nprocs=WORLD, join=False)
    while not spawned.join(timeout=60):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("title", STEPS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_are_one(name: str, kind: str, title: str, reports: list[dict[str, Any]]) -> None:
    joined = [sample for rank in range(WORLD) for sample in samples(STEPS[title][rank], rank)]
    loss, expected = gradients(*chat_trainer(CONFIGS[kind]), CONFIGS[kind], pack(joined))
    for report in reports:
        found_loss, found = report[f"{name}/{kind}/{title}"]
        assert found_loss == pytest.approx(loss, rel=1e-4)
        for key, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=max(1e-4 * scale, 1e-5), msg=key)
        for key in found.keys() - expected.keys():
            assert not found[key].any(), key
