import math
from dataclasses import replace

import pytest
import torch

from g2vlm.errors import InputError, TrainingAborted
from g2vlm.fusion_config import FusionConfig
from tests.train.runs import MULTIPLIERS, mini_batch, mini_model, mini_trainer, train_on
from train.config import GuardConfig, ScheduleConfig
from train.objectives.geometry import recon_batch_inputs
from train.optim import learning_rate, set_learning_rate
from train.step import Guard
from train.trainable import GROUPS, checkpoint_activations, group_of, set_trainable


def test_overfitting_one_batch() -> None:
    """Every term falls to a few hundredths of what it was."""
    steps, peak = 240, 2e-3
    trainer, model = mini_trainer()
    batch = mini_batch(images_per_step=2, views=(2, 2), scenes_multiple_of=1)
    results = []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, peak, ScheduleConfig(warmup=10, final_lr=1e-5)))
        results += train_on(trainer, model, [batch])
    first, last = results[0].terms, results[-1].terms
    assert set(first) == {"points", "normal", "translation", "rotation", "global_points", "normal_head"}
    shares = {name: last[name] / first[name] for name in first}
    assert max(shares.values()) < 0.04, shares
    assert last["points"] < 0.012
    assert last["global_points"] < 0.012
    assert last["rotation"] < math.radians(0.6)
    assert last["normal_head"] < math.radians(1)


def test_frozen_groups_do_not_move() -> None:
    trainer, model = mini_trainer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train_on(trainer, model, [mini_batch(step) for step in range(2)])
    moved = {group_of(name) for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(MULTIPLIERS)


def test_every_parameter_has_a_group() -> None:
    names = [name for name, _ in mini_model(fusion=FusionConfig(head_dim=8)).named_parameters()]
    assert {group_of(name) for name in names} == set(GROUPS)


def test_trainable_groups_and_multipliers() -> None:
    trainer, _ = mini_trainer(multipliers={"geometry_heads": 1.0, "projection": 0.5, "lm_head": 0.0})
    assert [(group["name"], group["multiplier"]) for group in trainer.optimizer.param_groups] == [
        ("geometry_heads", 1.0),
        ("projection", 0.5),
    ]
    with pytest.raises(InputError, match="did you mean geometric_expert"):
        set_trainable(mini_model(), {"geometrc_expert": 1})
    with pytest.raises(InputError, match="no such parameters"):
        set_trainable(mini_model(encoders="single"), {"geometry_encoder": 1, "geometry_heads": 1})


def test_the_merger_can_be_named_apart_from_its_tower() -> None:
    """VLM-3R trains the projector behind a frozen tower."""
    model = mini_model()
    everything = set_trainable(model, {"semantic_encoder": 1.0})["semantic_encoder"]
    merger = set_trainable(model, {"merger": 1.0})["merger"]
    assert merger == [name for name in everything if ".merger." in name]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(merger)
    both = set_trainable(model, {"semantic_encoder": 0.1, "merger": 1.0})
    assert both == {"semantic_encoder": [name for name in everything if name not in merger], "merger": merger}
    with pytest.raises(InputError, match="did you mean merger"):
        set_trainable(model, {"mergers": 1.0})


def test_spike_contributes_zero() -> None:
    trainer, model = mini_trainer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (result,) = train_on(trainer, model, [mini_batch()], spike=1e-3)
    assert (result.dropped, result.grad_norm) == ("spike", 0)
    assert math.isfinite(result.loss)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert train_on(trainer, model, [mini_batch()], spike=1e6)[0].dropped is None


@pytest.mark.parametrize("place", ["target", "gradient"])
def test_nonfinite_steps_change_nothing(place: str) -> None:
    trainer, model = mini_trainer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = mini_batch()
    if place == "target":
        depth = batch.depth.clone()
        depth[0, 0, 3, 3] = torch.nan
        batch = replace(batch, depth=depth)
    else:
        model.heads.point_head.proj.weight.register_hook(lambda gradient: gradient * torch.nan)
    (result,) = train_on(trainer, model, [batch])
    assert result.dropped == "nonfinite"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not trainer.optimizer.state


def test_guard_counts_and_aborts() -> None:
    guard = Guard(GuardConfig(window=10, max_dropped_share=0.2, max_dropped_in_a_row=5))
    for step in range(30):
        guard.check_step(step, "spike" if step % 5 == 0 else None)
    assert guard.dropped == 6
    restored = Guard(guard.config)
    restored.restore(guard.state())
    assert restored == guard
    restored.check_step(30, "spike")
    with pytest.raises(TrainingAborted, match="step 31"):
        restored.check_step(31, "nonfinite")
    assert TrainingAborted.code == 6


def test_guard_aborts_on_a_row() -> None:
    guard = Guard(GuardConfig(max_dropped_in_a_row=3))
    for step in range(3):
        guard.check_step(step, "nonfinite")
    with pytest.raises(TrainingAborted, match="4 in a row"):
        guard.check_step(3, "nonfinite")


def test_guard_has_a_quota_of_unreadable_scenes() -> None:
    guard = Guard(GuardConfig(max_bad_scenes_share=0.1))
    guard.check_scenes(95, 5)
    with pytest.raises(TrainingAborted, match="could not be read"):
        guard.check_scenes(10, 10)


def test_learning_rate() -> None:
    schedule = ScheduleConfig(warmup=10, final_lr=1e-6)
    rates = [learning_rate(step, 100, 1e-3, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == rates[10] == 1e-3
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    level = replace(schedule, kind="constant")
    assert learning_rate(99, 100, 1e-3, level) == 1e-3
    falling = replace(level, decay=20)
    assert learning_rate(79, 100, 1e-3, falling) == pytest.approx(1e-3)
    assert learning_rate(89, 100, 1e-3, falling) == pytest.approx((1e-3 + schedule.final_lr) / 2)
    assert learning_rate(99, 100, 1e-3, falling) == pytest.approx(schedule.final_lr)
    assert learning_rate(79, 300, 1e-3, falling) == learning_rate(79, 100, 1e-3, falling)


def test_mixed_attention_follows_the_coin() -> None:
    batch = mini_batch()
    mixed, config = mini_model(geometry_attention="mixed").config, mini_model().config
    plans = [recon_batch_inputs(batch, mixed, coin, False)["sequence"].plan for coin in (False, True)]
    assert plans[0] == recon_batch_inputs(batch, config, True, False)["sequence"].plan
    frame = mini_model(geometry_attention="frame").config
    assert plans[1] == recon_batch_inputs(batch, frame, False, False)["sequence"].plan
    assert plans[0] != plans[1]


@pytest.mark.parametrize("encoders", ["dual", "single"])
def test_recomputed_activations_give_the_same_gradients(encoders: str) -> None:
    groups = {**MULTIPLIERS, "semantic_encoder": 1.0}
    if encoders == "single":
        del groups["geometry_encoder"]
    norms = []
    for recompute in (False, True):
        trainer, model = mini_trainer(multipliers=groups, encoders=encoders)
        if recompute:
            checkpoint_activations(model)
        batch = mini_batch(side_multiple_of=28)
        norms.append(train_on(trainer, model, [batch] * 2)[1])
    assert norms[0] == norms[1]
