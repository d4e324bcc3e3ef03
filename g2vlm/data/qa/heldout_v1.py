"""`rooms-qa-heldout-v1`: the fixed questions that models are compared on. Changing anything here needs a new name.

Over a thousand questions about rooms that no training seed builds: 84 of each task, or 24 of each of its three
variants, with even answers and letters (`g2vlm.data.qa.selection`); each scene is shown in four views of 84 x 84.
The questions lie in one file; `select` wrote them once, from the first scenes of the source.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

import g2vlm
from g2vlm.data.qa.question import Question, read_questions
from g2vlm.data.qa.source import AskedScene, RoomsQA
from g2vlm.data.types import ViewRequest

NAME = "rooms-qa-heldout-v1"
FILE = Path(g2vlm.__file__).parent / "assets" / f"{NAME}.jsonl"
SEED = 2  # of the held-out source; 0 is rooms-heldout-v1, 1 validates training
NUM_SCENES = 600  # that the questions were selected from
NUM_VIEWS = 4
SIZE = (84, 84)
DIGEST = "d846f42cf751331ba02749e46c6e8755863b96f4015cf9f6ef62eafd290b60c8"
"""SHA-256 of the file."""


def source(device: torch.device | str = "cpu") -> RoomsQA:
    """The source that the scenes come from."""
    return RoomsQA(split="heldout", seed=SEED, device=device)


def request(size: tuple[int, int] = SIZE) -> ViewRequest:
    """The views of every scene; another size shows the same views at another resolution."""
    return ViewRequest(NUM_VIEWS, size, seed=0)


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """All questions; those about one scene follow each other."""
    return tuple(read_questions(FILE))


def heldout(size: tuple[int, int] = SIZE, device: torch.device | str = "cpu") -> Iterator[AskedScene]:
    """Each scene, rendered once, with its questions, in the fixed order."""
    rooms, by_scene = source(device).rooms, dict[str, list[Question]]()
    for question in questions():
        by_scene.setdefault(question.scene, []).append(question)
    for name, asked in by_scene.items():
        yield AskedScene(rooms.load(rooms.index(name), request(size)), tuple(asked))


def digest() -> str:
    """SHA-256 of the file as it is."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()
