"""Scores of VSI-Bench's and VSTI-Bench's own code, reply by reply and averaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval.qa_scoring import aggregate, score_reply
from tests.parity import golden

pytestmark = pytest.mark.parity
TOLERANCE = 1e-6


def replies(path: Path) -> list[dict]:
    return json.loads(path.read_text())["items"]


def score(item: dict) -> float:
    """Multiple choice where the truth is a letter."""
    truth = item.get("mc_answer") or item["ground_truth"]
    return score_reply("choice" if truth.isalpha() else "number", item["prediction"], truth)


@pytest.mark.parametrize("path", golden.cases("qa_scoring/vs*_bench.json"))
def test_every_reply_scores_as_officially(path: Path) -> None:
    for item in replies(path):
        assert score(item) == pytest.approx(item["score_official"], abs=TOLERANCE), item


@pytest.mark.parametrize("path", golden.cases("qa_scoring/vsi_bench.json"))
def test_vsi_averages(path: Path) -> None:
    items = replies(path)
    result = aggregate([item["question_type"] for item in items], np.array([score(item) for item in items]))
    official = json.loads(path.read_text())["aggregate_official_percent"]
    assert result.macro == pytest.approx(official.pop("overall"), abs=TOLERANCE * 100)
    for name, value in official.items():
        task = name.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05")
        assert result.groups[task] == pytest.approx(value, abs=TOLERANCE * 100)


@pytest.mark.parametrize("path", golden.cases("qa_scoring/vsti_bench.json"))
def test_vsti_averages(path: Path) -> None:
    items = replies(path)
    result = aggregate([item["question_type"] for item in items], np.array([score(item) for item in items]))
    expected = json.loads(path.read_text())["aggregate"]
    assert result.tasks == pytest.approx(expected["per_question_type_percent"], abs=TOLERANCE * 100)
    assert result.groups == pytest.approx(expected["derived_five_group_mean_of_subtypes_percent"], abs=TOLERANCE * 100)
    assert result.macro == pytest.approx(expected["derived_five_group_overall_percent"], abs=TOLERANCE * 100)
    mean = np.mean(list(result.tasks.values()))
    assert mean == pytest.approx(expected["official_overall_percent"], abs=TOLERANCE * 100)
