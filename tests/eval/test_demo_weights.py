"""The demo weights that the package ships: small, described, and better than guessing on rooms they never saw."""

import json
from pathlib import Path

import pytest

from eval.baselines import CONSTANT, CONSTANT_PARTS, IDENTITY, System, constant_depth, identity_pose, model_system
from eval.evaluate import MODEL, evaluate
from eval.protocols import PROTOCOLS
from eval.report import results
from eval.sources import Item
from eval.vqa import main as ask_about_rooms
from g2vlm.checkpoint import DEMO_WEIGHTS, inspect, read_config
from g2vlm.data.rooms import heldout_v1
from g2vlm.pipeline import load

PROTOCOL = PROTOCOLS["rooms-heldout-v1"].changed(None, None, 1024, None)
NUM_ROOMS = 16


def test_they_are_small_and_described() -> None:
    files = [path for path in DEMO_WEIGHTS.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"config.json", "model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {str(spec.dtype) for spec in inspect(DEMO_WEIGHTS).values()} == {"torch.bfloat16"}
    assert read_config(DEMO_WEIGHTS).view_width == heldout_v1.SIZE[1]
    card = (DEMO_WEIGHTS / "README.md").read_text(encoding="utf-8")
    for told in (
        *("rooms-heldout-v1", "configs/demo.yaml", "commit", "AbsRel", "rotation", "Apache-2.0"),
        *("rooms-qa-heldout-v1", "configs/demo_questions.yaml", "macro", "shuffled", "blind"),
    ):
        assert told in card, f"the model card does not mention {told}"


@pytest.fixture(scope="module")
def scores() -> dict:
    rooms, requests = heldout_v1.source(), heldout_v1.requests()[:NUM_ROOMS]
    items = [Item(f"{i}", lambda i=i, request=request: rooms.load(i, request)) for i, request in enumerate(requests)]
    systems = {
        MODEL: model_system(load()),
        CONSTANT: System(lambda sample: constant_depth(sample, PROTOCOL), CONSTANT_PARTS),
        IDENTITY: System(identity_pose, ("poses",)),
    }
    return results(evaluate(items, systems, PROTOCOL), "demo", {"checkpoint": {"files": {}}, "commit": None})


def test_their_depth_is_much_better_than_a_constant(scores: dict) -> None:
    assert scores["metrics"]["abs_rel"] <= 0.6 * scores["baselines"][CONSTANT]["abs_rel"]


def test_their_poses_are_better_than_identity(scores: dict) -> None:
    model, identity = scores["metrics"], scores["baselines"][IDENTITY]
    assert model["rotation_median_deg"] <= 0.6 * identity["rotation_median_deg"]
    assert model["rra_15"] > 2 * identity["rra_15"]


def answered(output: Path, *arguments: str) -> dict:
    """What `eval/vqa.py` wrote about them."""
    assert ask_about_rooms([*arguments, "--pictures", "0", "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_their_answers_look_at_the_rooms(tmp_path: Path) -> None:
    """The first questions of the held-out set: on two tasks they are far above what is known without looking."""
    record = answered(tmp_path / "on", "--limit", "240")
    for task in ("point_depth", "room_size_estimation"):
        best = max(known[f"task/{task}"] for known in record["baselines"].values())
        assert record["metrics"][f"task/{task}"] > best + 10
    assert record["metrics"]["of_form"] > 99


@pytest.mark.slow
def test_their_answers_pass_the_gate(tmp_path: Path) -> None:
    """At least 5 points above the best blind baseline on all 1,019 questions, and the interval's lower end above it."""
    record = answered(tmp_path / "on", "--gate", "5")
    assert record["count"] == 1019
    assert record["gate"]["passed"]
