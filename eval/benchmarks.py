"""Sets of questions that models are compared on, by name.

S views, H, W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from eval.blind_answers import Answerer
from eval.qa_blind import NUM_TRAINING, baselines, thinned, training_questions
from g2vlm.data.qa import heldout_v1
from g2vlm.data.qa.question import Question
from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """A fixed set of questions about scenes.

    Args:
        name: as printed beside the numbers.
        about: one line for people.
        questions: all of them; those about one scene follow each other.
        load: the views of a scene, by its name, at a size (H, W); may raise InputError.
        baselines: fresh blind answerers by name, to be asked all questions in order.
        num_views: of every scene.
        digest: SHA-256 of the questions.
    """

    name: str
    about: str
    questions: Callable[[], Sequence[Question]]
    load: Callable[[str, tuple[int, int]], SceneSample]
    baselines: Callable[[], Mapping[str, Answerer]]
    num_views: int
    digest: str

    def scenes(self, limit: int | None = None) -> dict[str, tuple[Question, ...]]:
        """The questions, or the first of them, by their scene, in order."""
        by_scene = groupby(self.questions()[:limit], key=lambda question: question.scene)
        return {scene: tuple(asked) for scene, asked in by_scene}


@lru_cache(maxsize=1)
def _rooms():
    return heldout_v1.source().rooms


def _room(scene: str, size: tuple[int, int]) -> SceneSample:
    return _rooms().load(_rooms().index(scene), heldout_v1.request(size))


@lru_cache(maxsize=1)
def _training() -> list[Question]:
    return thinned(training_questions(NUM_TRAINING))


ROOMS_QA = Benchmark(
    heldout_v1.NAME,
    "questions about rendered rooms that no training sees",
    heldout_v1.questions,
    _room,
    lambda: baselines(_training()),
    heldout_v1.NUM_VIEWS,
    heldout_v1.DIGEST,
)
BENCHMARKS = {"rooms_qa": ROOMS_QA}
"""By the name that `--benchmark` takes."""


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name}", "", f"choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
