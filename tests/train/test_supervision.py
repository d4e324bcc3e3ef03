"""Geometric supervision in a run: what trains, what is saved, what is left in the exported model."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import g2vlm
from g2vlm.data.chat.batch import chat_inputs, collate_chats
from g2vlm.data.chat.types import ChatSample, ChatSource, ImageAt
from g2vlm.errors import CheckpointError, InputError
from g2vlm.supervision.saved import load_supervision, saved_names
from tests.train.chats import layout
from tests.train.clips import GEOVR, BoxClips, clip_inputs, clip_pack, clip_run, clip_steps
from tests.train.gradients import kept_gradients
from tests.train.test_state import equal_runs
from train.assemble import Assembled, assemble
from train.config import RunConfig, TeacherConfig
from train.engine import Engine, engine
from train.feed import VALIDATION_SEED
from train.loop import train
from train.objectives.geovr import CameraTerm, ScaleTerm
from train.objectives.report import Objective
from train.objectives.supervision import check_needs
from train.packing import ChatMixture
from train.state import HEADS

WORDS = BoxClips(views=0, name="words")
SILENT = BoxClips(asked=False, name="silent")


def run(config: RunConfig, folder: Path, *sources: ChatSource) -> None:
    sources = sources or (BoxClips(), SILENT, WORDS)
    with engine("ddp", "cpu") as one:
        mixture = ChatMixture(sources, (1.0,) * len(sources))
        train(config, one, folder, mixture, ChatMixture((BoxClips(num_samples=4),), (1.0,)))


def parts_of(config: RunConfig) -> Assembled:
    torch.manual_seed(0)
    return assemble(config, Engine(torch.device("cpu")))


def gradients_of(parts: Assembled, objectives: Sequence[Objective], batch: Any) -> dict[str, Tensor]:
    """Of one step, of the model and of the heads, before clipping; nothing is changed."""
    trained, parts.trainer.objectives = parts.trainer.objectives, objectives
    with kept_gradients(parts.trainer, parts.model, parts.heads) as kept:
        clip_steps(parts.trainer, [batch])
    parts.trainer.objectives = trained
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four steps."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    run(clip_run(), folder)
    return folder


def test_a_run_logs_every_term_with_its_count(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    terms = {f"geovr.{name}" for name in ("translation", "rotation", "field_of_view", "depth", "depth_gradient")}
    assert all(terms | {"geovr.scale", "language"} == line["counts"].keys() for line in steps)
    assert all(line["counts"]["geovr.depth"] <= line["samples"] for line in steps)
    assert max(line["counts"]["geovr.depth"] for line in steps) > 0
    assert {line["counts"]["geovr.scale"] for line in steps} == {0}  # the box rooms have no metric scale
    assert all(line["geovr.scale"] == 0 for line in steps)
    assert terms <= next(line for line in lines if line["kind"] == "validation").keys()


def test_validation_is_the_mean_over_the_batches_that_have_a_term(tmp_path: Path) -> None:
    """A pack without answers says nothing about them."""
    config = clip_run(1, checkpoint_every=0, validate_every=0, validation_steps=8)
    mixture = ChatMixture((SILENT, WORDS), (1.0, 1.0))
    config = replace(config, optim=replace(config.optim, lr=0.0))
    with engine("ddp", "cpu") as one:
        train(config, one, tmp_path / "run", mixture, mixture)
        torch.manual_seed(config.runtime.seed)
        parts = assemble(config, one)
        assert parts.supervision is not None
        feed = parts.student.feed(config, mixture, one, VALIDATION_SEED, False, parts.supervision)
        reports = []
        with torch.no_grad():
            for loaded in feed.batches(range(8), 0, 0):
                output = parts.trainer.model(**feed.inputs(loaded.batch, 0))
                reports += [{k: v for own in parts.trainer.objectives for k, v in own(output, loaded.batch).items()}]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["kind"] == "validation"]
    found = {name: [own[name].value.item() for own in reports if own[name].count] for name in reports[0]}
    assert 0 < len(found["language"]) < 8
    assert not found["geovr.scale"]
    for name, values in found.items():
        assert line.get(name) == (pytest.approx(sum(values) / len(values), rel=1e-4) if values else None)


def test_resumed_is_undisturbed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    run(clip_run(resume="auto", workers=2), tmp_path / "run")
    equal_runs(finished, tmp_path / "run", 4)
    one, other = (load_file(folder / "checkpoints/step-00000004" / HEADS) for folder in (finished, tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_without_these_heads_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step-00000004", tmp_path / "run/checkpoints/step-00000004")
    wider = replace(GEOVR, heads=replace(GEOVR.heads, terms=("depth",)))
    config = clip_run(6, resume="auto", changes=("objectives",))
    with pytest.raises(CheckpointError, match="of another model"):
        run(replace(config, objectives=replace(config.objectives, geovr=wider)), tmp_path / "run")


def test_the_exported_model_has_no_trace_of_the_heads(finished: Path) -> None:
    """Its tensors are those of a model that never had any; the heads lie beside it and are built again from there."""
    weights = load_file(finished / "model/model.safetensors")
    plain = parts_of(clip_run()).model
    assert weights.keys() == plain.state_dict().keys()
    assert not (finished / "model" / HEADS).exists()
    loaded = g2vlm.load(finished / "model", device="cpu").model
    assert [type(own) for own in loaded.modules()] == [type(own) for own in plain.modules()]
    assert saved_names(finished / "heads") == ["geovr"]
    heads = load_supervision(finished / "heads", "geovr").state_dict()
    stored = load_file(finished / "checkpoints/step-00000004" / HEADS)
    assert all(torch.equal(heads[name.removeprefix("geovr.")], tensor) for name, tensor in stored.items())


def test_supervised_logits_are_those_of_the_plain_model() -> None:
    """The heads change nothing before the first step; without probe tokens not even the sequence."""
    config = clip_run()
    blind = replace(GEOVR, camera=CameraTerm(weight=0), scale=ScaleTerm(weight=0))
    parts = parts_of(replace(config, objectives=replace(config.objectives, geovr=blind)))
    assert parts.supervision is not None
    assert parts.supervision.probes == (False, False)
    batch = collate_chats([BoxClips().load(0, 0)], layout())
    batch = replace(batch, targets=clip_pack([BoxClips().load(0, 0)], parts.supervision).targets)
    expected = parts.model(**chat_inputs(batch, False)).logits
    assert torch.equal(parts.trainer.model(**clip_inputs(batch)).logits, expected)


def test_geometry_alone_trains_without_answers(tmp_path: Path) -> None:
    """Clips without text, and no language loss at all; its head and embeddings keep their bits."""
    config = clip_run(4, {"semantic_expert": 1.0}, language=False)
    run(config, tmp_path / "run", SILENT)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 4
    assert all(torch.tensor(losses).isfinite())
    before, after = parts_of(config).model.state_dict(), load_file(tmp_path / "run/model/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("decoder.") for name in changed)
    assert not any(name.startswith(("lm_head", "embed_tokens")) for name in changed)


def test_unlabelled_clips_add_to_the_gradient_of_answers() -> None:
    """Semi-supervised: the language term is that of the labelled samples, the geometric one of all."""
    parts = parts_of(clip_run())
    assert parts.supervision is not None
    labelled = clip_pack([BoxClips().load(0, 0)], parts.supervision)
    both = clip_pack([BoxClips().load(0, 0), SILENT.load(3, 3)], parts.supervision)
    silent = clip_pack([SILENT.load(3, 3)], parts.supervision)
    one, two, none = (parts.trainer.evaluate(clip_inputs(own), own)[0] for own in (labelled, both, silent))
    assert two["language"] == pytest.approx(one["language"], rel=1e-5)
    assert "language" not in none
    for term in ("geovr.depth", "geovr.rotation"):
        assert two[term] == pytest.approx((one[term] + none[term]) / 2, rel=1e-4)


def test_a_batch_without_clips_leaves_the_heads_a_gradient_of_zero() -> None:
    parts = parts_of(clip_run(every=True))
    assert parts.supervision is not None
    assert parts.heads is not None
    samples = [WORDS.load(0, 0), BoxClips(depth=False).load(1, 1)]
    kept = gradients_of(parts, parts.trainer.objectives, clip_pack(samples, parts.supervision))
    assert kept["heads.geovr.aux.camera"].any()  # a token that the answer of its sample sees
    for name, _ in parts.heads.named_parameters():
        assert name.startswith("geovr.aux.") or not kept[f"heads.{name}"].any(), name


def test_a_batch_without_clips_may_show_images_of_several_sizes() -> None:
    parts = parts_of(clip_run(every=True))
    assert parts.supervision is not None
    images = np.zeros((56, 112, 3), np.uint8), np.zeros((56, 56, 3), np.uint8)
    mixed = ChatSample((ImageAt(0), ImageAt(1), "What size?"), "3", images)
    (result,) = clip_steps(parts.trainer, [clip_pack([WORDS.load(0, 0), mixed], parts.supervision)])
    assert result.dropped is None
    assert result.counts["geovr.depth"] == result.counts["gasp.depth"] == result.counts["spatialsv.depth_l2"] == 0


def test_objectives_compose_to_the_sum_of_their_gradients() -> None:
    parts = parts_of(clip_run(every=True))
    assert parts.supervision is not None
    every = parts.trainer.objectives
    assert [own.name for own in every] == ["language", "geovr", "gasp", "spatialsv"]
    batch = clip_pack([BoxClips().load(0, 0), SILENT.load(1, 1)], parts.supervision)
    summed: dict[str, Tensor] = {}
    for objective in every:
        for name, gradient in gradients_of(parts, [objective], batch).items():
            summed[name] = summed.get(name, torch.zeros_like(gradient)) + gradient
    together = gradients_of(parts, every, batch)
    assert together.keys() == summed.keys()
    for name, gradient in together.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradient, summed[name], rtol=0, atol=max(1e-4 * scale, 1e-6), msg=name)


def test_one_batch_is_overfitted() -> None:
    parts = parts_of(clip_run(every=True))
    assert parts.supervision is not None
    batch = clip_pack([BoxClips().load(index, index) for index in range(2)], parts.supervision)
    for group in parts.trainer.optimizer.param_groups:
        group["lr"] = 3e-3
    results = clip_steps(parts.trainer, [batch] * 50)
    first, last = results[0].terms, results[-1].terms
    assert last["language"] < 0.1 * first["language"]
    assert last["geovr.depth"] < 0.7 * first["geovr.depth"]  # from two by two tokens of a view
    assert last["geovr.rotation"] < 0.3 * first["geovr.rotation"]
    assert last["gasp.correspondence"] < 0.8 * first["gasp.correspondence"]
    assert last["spatialsv.depth_l2"] < 0.6 * first["spatialsv.depth_l2"]
    assert last["spatialsv.ray_l2"] < 0.6 * first["spatialsv.ray_l2"]


def test_missing_targets_are_named_before_anything_is_trained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"objectives\.geovr cannot learn from box_clips\n.*depth.*ground_truth"):
        run(clip_run(), tmp_path / "run", BoxClips(depth=False))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"nothing to learn from\n.*words"):
        run(clip_run(), tmp_path / "run", WORDS)
    with pytest.raises(InputError, match=r"objectives\.geovr without data\.chat"):
        assemble(replace(clip_run(), data=RunConfig().data), Engine(torch.device("cpu")))
    with pytest.raises(InputError, match="ground_truth"):
        assemble(replace(clip_run(), teachers=(TeacherConfig("ground_trut"),)), Engine(torch.device("cpu")))
    supervision = parts_of(clip_run()).supervision
    assert supervision is not None
    with caplog.at_level(logging.INFO):
        check_needs([BoxClips(), WORDS], supervision, torch.device("cpu"))
    assert "words shows no clips" in caplog.text


def test_clips_stay_in_the_workers_where_nobody_asks_about_them_later() -> None:
    config, one, mixture = clip_run(), Engine(torch.device("cpu")), ChatMixture((BoxClips(),), (1.0,))
    parts = parts_of(config)
    feed = parts.student.feed(config, mixture, one, 0, True, parts.supervision)
    batch = next(feed.batches(range(1), 0, 0)).batch
    assert batch.targets[0] is not None
    assert batch.clips == ()


class Sorted(BoxClips):
    """Words first, and then clips."""

    def load(self, index: int, seed: int) -> ChatSample:
        return (WORDS if index < len(self) // 2 else super()).load(index, seed)


def test_clips_are_found_behind_many_samples_without() -> None:
    supervision = parts_of(clip_run()).supervision
    assert supervision is not None
    check_needs([Sorted(num_samples=100)], supervision, torch.device("cpu"))


class Ragged(BoxClips):
    """Every clip has a second image of another size."""

    def load(self, index: int, seed: int) -> ChatSample:
        sample = super().load(index, seed)
        return replace(sample, images=(sample.images[0], np.zeros((56, 112, 3), np.uint8)))


def test_clips_of_images_of_several_sizes_are_bad_samples(tmp_path: Path) -> None:
    config = clip_run(2, checkpoint_every=0, validate_every=0)
    config = replace(config, guards=replace(config.guards, max_bad_scenes_share=1.0))
    run(config, tmp_path / "run", Ragged(name="ragged"), WORDS)
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert {own["scene"].split("/")[0] for own in bad} == {"ragged"}
    assert "56 x 56, 112 x 56" in bad[0]["reason"]


def test_only_what_is_named_trains(finished: Path) -> None:
    before, after = parts_of(clip_run()).model.state_dict(), load_file(finished / "model/model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "embed_tokens", "lm_head"}
