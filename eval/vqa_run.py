"""Ask a model every question of a benchmark, as a user would, and score its replies."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from eval.benchmarks import Benchmark, find_benchmark
from eval.conditions import Conditions
from eval.evaluate import PROGRESS_SECONDS, Skipped
from eval.qa_scoring import is_of_form, score_reply
from g2vlm.asking import Answer
from g2vlm.chat_model import ChatModel
from g2vlm.data.qa.question import Question
from g2vlm.errors import CheckFailed, InputError, ResourceError
from g2vlm.pipeline import Pipeline
from g2vlm.sampling import GenerationOptions

log = logging.getLogger(__name__)
MAX_NEW_TOKENS = 16  # as VSI-Bench
REPEATABLE, REPETITIVE = 8, 0.3


@dataclass(frozen=True)
class Reply:
    """A model's reply to a question.

    Args:
        question: as it was asked.
        text: the whole reply.
        score: in [0, 1].
        num_tokens: of the reply.
        cut: it reached the limit of tokens.
        of_form: it begins with a letter of the options, or with a number, as was asked for.
        repetitive: it has at least REPEATABLE tokens, and one of them is more than the share REPETITIVE of it.
    """

    question: Question
    text: str
    score: float
    num_tokens: int
    cut: bool
    of_form: bool
    repetitive: bool


@dataclass(frozen=True)
class VqaEvaluation:
    """Replies to a benchmark's questions.

    Args:
        benchmark: where the questions come from.
        conditions: what the model was shown.
        size: (H, W) of the views.
        limit: only the first so many questions were asked; None: all.
        max_new_tokens: of a reply.
        replies: in the order of the questions.
        skipped: questions that could not be asked; no system is scored on them.
    """

    benchmark: Benchmark
    conditions: Conditions
    size: tuple[int, int]
    limit: int | None
    max_new_tokens: int
    replies: list[Reply] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def questions(self) -> list[Question]:
        """Those that were asked."""
        return [reply.question for reply in self.replies]

    @property
    def scores(self) -> NDArray[np.float64]:
        """(N,) in [0, 1]."""
        return np.array([reply.score for reply in self.replies], dtype=np.float64)


def evaluate_vqa(
    model: Pipeline | ChatModel,
    benchmark: str | Benchmark = "rooms_qa",
    conditions: Conditions | None = None,
    limit: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    keep: Callable[[Reply], None] = lambda reply: None,
) -> VqaEvaluation:
    """Ask every question, greedily, at the model's own view width; questions about a scene share what is seen of it.

    A question that cannot be asked is recorded with its reason and left out.

    Args:
        model: a loaded one; `eval.vqa_summary` has its scores.
        benchmark: one, or its name.
        conditions: what the model is shown; by default everything.
        limit: ask only the first so many questions.
        max_new_tokens: of a reply.
        keep: called with each reply, so that nothing is lost when the evaluation is interrupted.

    Raises:
        InputError: an unknown benchmark, or nothing to shuffle.
        CheckpointError: the model has no tokenizer.
        ResourceError: the views do not fit into memory.
    """
    chat = model.chat if isinstance(model, Pipeline) else model
    benchmark = find_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    conditions, width = conditions or Conditions(), chat.processor.view_width
    evaluation = VqaEvaluation(benchmark, conditions, (width, width), limit, max_new_tokens)
    asker, told, done = _Asker.of(chat, evaluation), time.monotonic(), 0
    scenes = benchmark.scenes(limit)
    for scene, questions in scenes.items():
        for outcome in asker.ask(scene, questions):
            if isinstance(outcome, Skipped):
                log.warning("skipped %s: %s", outcome.item, outcome.reason)
                evaluation.skipped.append(outcome)
            else:
                keep(outcome)
                evaluation.replies.append(outcome)
        done += len(questions)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("%d of %d questions", done, sum(map(len, scenes.values())))
    return evaluation


def require_asked(evaluation: VqaEvaluation) -> None:
    """Raise CheckFailed when no question could be asked."""
    if not evaluation.replies:
        first = evaluation.skipped[0] if evaluation.skipped else Skipped("none", "there is no question")
        why = f"{len(evaluation.skipped)} skipped, the first: {first.item}: {first.reason}"
        raise CheckFailed("no question could be asked", why, "")


@dataclass(frozen=True)
class _Asker:
    """Asks the questions about one scene.

    Args:
        chat: the model.
        evaluation: what is evaluated, and how.
        sources: whose views the geometry encoder gets of a scene.
        options: how replies are generated.
    """

    chat: ChatModel
    evaluation: VqaEvaluation
    sources: dict[str, str]
    options: GenerationOptions

    @classmethod
    def of(cls, chat: ChatModel, evaluation: VqaEvaluation) -> "_Asker":
        scenes = [*evaluation.benchmark.scenes(evaluation.limit)]
        options = GenerationOptions(max_new_tokens=evaluation.max_new_tokens)
        return cls(chat, evaluation, evaluation.conditions.sources(scenes), options)

    def ask(self, scene: str, questions: Sequence[Question]) -> list[Reply | Skipped]:
        """A reply to each question, or why there is none, in order."""
        found: dict[str, Reply | Skipped] = {}
        try:
            images, views = (self._images(name) for name in (scene, self.sources[scene]))
        except (InputError, OSError) as error:
            return [Skipped(question.id, _reason(error)) for question in questions]
        for alike in self._alike(questions):
            found |= self._ask_alike(images, views, alike)
        return [found[question.id] for question in questions]

    def _images(self, scene: str) -> torch.Tensor:
        """(S, 3, H, W) uint8; what every evaluation shows of a scene."""
        return self.evaluation.benchmark.load(scene, self.evaluation.size).images.cpu()

    def _alike(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Questions that share a context."""
        keys = {question.id: self.evaluation.conditions.key(question) for question in questions}
        for key in dict.fromkeys(keys.values()):
            yield [question for question in questions if keys[question.id] == key]

    def _ask_alike(
        self, images: torch.Tensor, views: torch.Tensor, questions: Sequence[Question]
    ) -> dict[str, Reply | Skipped]:
        found: dict[str, Reply | Skipped] = {}
        try:
            context = self.evaluation.conditions.context(self.chat, images, views, questions[0])
            for question in questions:
                try:
                    context.turn(question.prompt(len(images)), self.options)
                except InputError as error:
                    found[question.id] = Skipped(question.id, _reason(error))
            asked = [question for question in questions if question.id not in found]
            answers = context.ask_all([question.prompt(len(images)) for question in asked], self.options)
        except (torch.OutOfMemoryError, MemoryError) as error:
            why = str(error).partition("\n")[0]
            raise ResourceError(f"not enough memory for {questions[0].id}", why, "use a smaller model") from error
        except InputError as error:
            return {question.id: Skipped(question.id, _reason(error)) for question in questions}
        return found | {q.id: scored(q, answer) for q, answer in zip(asked, answers, strict=True)}


def scored(question: Question, answer: Answer) -> Reply:
    """An answer with its score."""
    most = max(map(answer.ids.count, set(answer.ids)), default=0)
    repetitive = len(answer.ids) >= REPEATABLE and most > REPETITIVE * len(answer.ids)
    return Reply(
        question=question,
        text=answer.text,
        score=score_reply(question.kind, answer.text, question.answer),
        num_tokens=answer.tokens,
        cut=answer.finish == "length",
        of_form=is_of_form(question, answer.text),
        repetitive=repetitive,
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
