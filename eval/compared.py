"""Earlier runs of eval/vqa.py beside a new one: their scores of the same questions."""

import json
from collections.abc import Sequence
from pathlib import Path

from eval.benchmarks import Benchmark
from eval.records import ITEMS, RESULTS
from eval.sources import distinct
from g2vlm.errors import InputError


def read_compared(paths: Sequence[Path], benchmark: Benchmark, limit: int | None) -> dict[str, dict[str, float]]:
    """Scores by run and question; a run is called as its folder.

    Args:
        paths: folders that eval/vqa.py wrote, or their results.json.
        benchmark: that is asked now.
        limit: of its questions.

    Raises:
        InputError: a file is absent or damaged, or the run has not the same questions.
    """
    folders = [path.parent if path.name == RESULTS else path for path in paths]
    names = distinct([folder.resolve().name for folder in folders])
    return {name: _read(folder, benchmark, limit) for name, folder in zip(names, folders, strict=True)}


def _read(folder: Path, benchmark: Benchmark, limit: int | None) -> dict[str, float]:
    try:
        record = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / ITEMS).read_text(encoding="utf-8").splitlines()]
        digest, scores = record["protocol"]["questions_sha256"], {line["id"]: float(line["score"]) for line in lines}
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"cannot compare with  {folder}", why, "name a folder that eval/vqa.py wrote") from None
    asked = {question.id for question in benchmark.questions()[:limit]}
    if digest != benchmark.digest or set(scores) != asked:
        own, these = f"{len(scores):,} of {record['protocol']['name']}", f"{len(asked):,} of {benchmark.name}"
        why = f"its questions are others: {own}, not the {these}"
        raise InputError(f"cannot compare with  {folder}", why, "evaluate both on the same questions")
    return scores
