"""What a run tells about its attention: when, about what, and that telling it changes nothing."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from g2vlm.model.attention.health import PAIRS, AttentionHealth
from tests.train.chats import Colours, chat_run
from tests.train.runs import mini_config
from tests.train.scenes import BoxRooms
from tests.train.test_state import FILES
from tests.train.worker import mini_run
from train import engine as engines
from train.config import RunConfig
from train.engine import engine
from train.log import RunLog
from train.loop import Run, train
from train.packing import ChatMixture

SEEN = tuple(pair for pair in PAIRS if pair != "geometric_semantic")
"""The pairs that meet in the presets, whose geometry tokens see no word."""
ENGINES = pytest.mark.parametrize("name", ["ddp", "fsdp2"])


def run(config: RunConfig, folder: Path, *data: Any, name: str = "ddp") -> list[dict[str, Any]]:
    """Train; the lines of the log."""
    with engine(name, "cpu") as one:
        train(config, one, folder, *(data or (BoxRooms(), BoxRooms(num_scenes=1))))
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


@ENGINES
def test_before_the_first_step_at_validations_and_at_the_end(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        lines = run(mini_run(4), tmp_path, name=name)
    assert lines[0]["kind"] == "attention"
    found = of_kind(lines, "attention")
    assert [line["step"] for line in found] == [0, 3, 4]
    for line in found:
        assert set(line["largest_logits"]) == set(SEEN)
        for layers in (*line["largest_logits"].values(), line["entropy"], line["uniform_entropy"]):
            assert len(layers) == mini_config().decoder.num_layers
        assert all(0 < a < b for a, b in zip(line["entropy"], line["uniform_entropy"], strict=True))
    largest = [max(found[0]["largest_logits"][pair]) for pair in SEEN]
    told = "geo>geo {:.1f}  sem>geo {:.1f}  sem>sem {:.1f}".format(*largest)
    share = sum(found[0]["entropy"]) / sum(found[0]["uniform_entropy"])
    assert f"attention at step 0: largest logits {told}; entropy {share:.2f} of its maximum" in caplog.messages
    assert "saturated" not in caplog.text


@pytest.mark.parametrize("validated", [True, False])
def test_always_the_same_batch(validated: bool, tmp_path: Path) -> None:
    """Without learning the model stays as it is, and so does what is told; without validation too."""
    config = mini_run(3)
    config = replace(config, optim=replace(config.optim, lr=0.0), schedule=replace(config.schedule, final_lr=0.0))
    lines = of_kind(run(config, tmp_path, BoxRooms(), BoxRooms(num_scenes=1) if validated else None), "attention")
    assert [line.pop("step") for line in lines] == [0, 3]
    assert lines[0] == lines[1]


def test_stage_2(tmp_path: Path) -> None:
    """Questions see the views."""
    mixture = ChatMixture((Colours(),), (1.0,))
    for number, validation in enumerate((mixture, None)):
        lines = of_kind(run(chat_run(), tmp_path / str(number), mixture, validation), "attention")
        assert [line["step"] for line in lines] == [0, 2, 4]
        assert all(set(line["largest_logits"]) == set(SEEN) for line in lines)
        assert lines[0]["largest_logits"] != lines[2]["largest_logits"]


def test_telling_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the steps nor the checkpoints, with colours changed at random and attention drawn by the coin."""
    config = mini_run(4, keep=9)
    config = replace(config, model={**config.model, "geometry_attention": "mixed"})
    with_it = run(config, tmp_path / "with", BoxRooms(), None)
    monkeypatch.setattr(Run, "measure_attention", lambda self: None)
    without = run(config, tmp_path / "without", BoxRooms(), None)
    assert of_kind(with_it, "step") == without
    for step in (2, 4):
        for name in FILES:
            one, other = (tmp_path / kind / f"checkpoints/step-{step:08d}" / name for kind in ("with", "without"))
            assert one.read_bytes() == other.read_bytes(), (step, name)


def test_a_run_that_died_before_its_first_checkpoint_starts_its_log_anew(tmp_path: Path) -> None:
    lines = run(mini_run(2, checkpoint_every=0), tmp_path / "whole")
    (tmp_path / "died").mkdir()
    (tmp_path / "died/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]) + '{"torn')
    assert run(mini_run(2, checkpoint_every=0, resume="auto"), tmp_path / "died") == lines


def test_saturation_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    health = AttentionHealth([dict.fromkeys(PAIRS, 1.0), {**dict.fromkeys(PAIRS, 2.0), PAIRS[1]: 83.2}], [0.1], [1.0])
    with caplog.at_level(logging.INFO):
        RunLog(tmp_path, active=False).attention(7, health)
        assert not caplog.messages
        assert not list(tmp_path.iterdir())
        RunLog(tmp_path).attention(7, health)
    told, warned = caplog.messages
    assert told == (
        "attention at step 7: largest logits geo>geo 2.0  geo>sem 83.2  sem>geo 2.0  sem>sem 2.0; "
        "entropy 0.10 of its maximum"
    )
    assert warned.startswith("attention may be saturated: a logit of geo>sem is 83.2 in layer 1, above 50;")
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["largest_logits"][PAIRS[1]] == [1.0, 83.2]


def test_recomputed_activations_are_measured(tmp_path: Path) -> None:
    """`runtime.gradient_checkpointing` wraps the layers that are watched."""
    plain = of_kind(run(mini_run(1), tmp_path / "plain"), "attention")
    recomputed = of_kind(run(mini_run(1, gradient_checkpointing=True), tmp_path / "recomputed"), "attention")
    assert recomputed[0] == plain[0]
    assert recomputed[1]["entropy"] == pytest.approx(plain[1]["entropy"], rel=1e-4)


def test_mixed_precision_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP2 computes on GPUs: blocks in bfloat16, output heads in float32."""
    made: list[MixedPrecisionPolicy] = []

    def policy(param_dtype: torch.dtype, **options: Any) -> MixedPrecisionPolicy:
        made.append(MixedPrecisionPolicy(torch.float32 if made else torch.bfloat16, **options))
        return made[-1]

    single = of_kind(run(mini_run(1), tmp_path / "single"), "attention")
    monkeypatch.setattr(engines, "MixedPrecisionPolicy", policy)
    half = of_kind(run(mini_run(1), tmp_path / "half", name="fsdp2"), "attention")
    assert len(made) == 2
    for one, other in zip(half, single, strict=True):
        assert one["entropy"] != other["entropy"]
        assert one["entropy"] == pytest.approx(other["entropy"], rel=0.02)
        for pair in SEEN:
            assert one["largest_logits"][pair] == pytest.approx(other["largest_logits"][pair], rel=0.05)
