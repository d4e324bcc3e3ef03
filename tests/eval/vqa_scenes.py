"""A made-up benchmark of a few coloured scenes, and a model whose replies are looked up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from eval.benchmarks import Benchmark
from eval.qa_blind import baselines
from g2vlm import generation
from g2vlm.chat_model import ChatModel
from g2vlm.checkpoint import load_model
from g2vlm.data.qa.question import Mark, Question
from g2vlm.data.types import SceneSample
from g2vlm.generation import Answer
from g2vlm.sequence import GeometryViews, SemanticImage

NUM_SCENES, NUM_VIEWS = 6, 2
LETTERS = "ABC"


def question(scene: int, task: str, right: int, offset: int = 0) -> Question:
    """A question whose words name its scene; a marked one where the task is `point_depth`."""
    identity = f"s{scene}-{task}-{offset}"
    words = f"Scene {scene}, number {offset}: {task}?"
    if task.startswith("object_rel_distance"):
        options = tuple(f"{letter}. {name}" for letter, name in zip(LETTERS, ("bed", "tv", "rug"), strict=True))
        return Question(identity, f"s{scene}", task, words, options, LETTERS[right % 3], "choice", ("bed", "tv", "rug"))
    marks = (Mark(1, 0.5, 0.5),) if task == "point_depth" else ()
    return Question(identity, f"s{scene}", task, words, (), f"{right + 1}", "number", marks=marks)


TASKS = ("object_counting", "object_rel_distance_v1", "object_rel_distance_v2", "point_depth")
QUESTIONS = [question(scene, task, scene % 4, k) for scene in range(NUM_SCENES) for k, task in enumerate(TASKS)]
TRAINING = [question(scene, task, scene % 3 // 2, k) for scene in range(60) for k, task in enumerate(TASKS)]


def load(scene: str, size: tuple[int, int]) -> SceneSample:
    """Noise that only this scene has."""
    generator = np.random.default_rng(int(scene[1:]))
    pixels = generator.integers(0, 256, (NUM_VIEWS, 3, *size), dtype=np.uint8)
    return SceneSample(torch.from_numpy(pixels), scene=scene)


def benchmark(read: Callable[[str, tuple[int, int]], SceneSample] = load) -> Benchmark:
    return Benchmark("made-up", "noise", lambda: QUESTIONS, read, lambda: baselines(TRAINING), NUM_VIEWS, "abc")


def chat() -> ChatModel:
    """The tiny preset with random weights."""
    return ChatModel.of(load_model("tiny"), "tiny", 4096)


@dataclass
class Seen:
    """What the encoders were given, and which questions followed."""

    segments: Sequence[Any]
    views: list[torch.Tensor]
    pixel_values: torch.Tensor
    texts: list[str] = field(default_factory=list)

    @property
    def num_views(self) -> int:
        return sum(len(segment.grids) for segment in self.segments if isinstance(segment, GeometryViews))

    @property
    def num_images(self) -> int:
        return sum(isinstance(segment, SemanticImage) for segment in self.segments)


@contextmanager
def replying(model: ChatModel, reply: Callable[[Question], str]) -> Iterator[list[Seen]]:
    """Let a function answer in place of the model; gives what the model was shown."""
    shown: list[Seen] = []

    def prefill(_: object, segments: Sequence[Any], views: Any, pixel_values: Any, **rest: Any) -> Any:
        opened = [] if rest["after"] is None else [rest["after"].sequence]
        before = [segment for seen in opened for segment in seen.segments]
        shown[:] = [seen for seen in shown if not any(seen is one for one in opened)]
        shown.append(
            Seen([*before, *segments], [*(view for seen in opened for view in seen.views), *views], pixel_values)
        )
        return generation.Prefix(shown[-1], None)  # pyright: ignore[reportArgumentType]

    def answer(_: object, prefix: Any, continuations: Sequence[Any], *rest: object) -> list[Answer]:
        texts = [model.tokenizer.decode([i for part in turn for i in part.ids]) for turn in continuations]
        prefix.sequence.texts.extend(texts)
        asked = [next(q for q in QUESTIONS if q.question in text) for text in texts]
        return [Answer((1, 2), reply(q), "eos") for q in asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "prefill", prefill)
        patch.setattr(generation, "answer", answer)
        yield shown
