"""Adapters on the experts: what they train, what runs leave of them, and what is refused."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import g2vlm
from g2vlm.data.chat.batch import ChatBatch, chat_inputs
from g2vlm.errors import CheckpointError, InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from tests.train.chats import CE, COLOURS, Colours, chat_run, chat_steps, chat_trainer, pack
from tests.train.scenes import BoxRooms
from tests.train.test_chat import run
from tests.train.test_state import equal_runs
from tests.train.worker import mini_run
from train import engine as engines
from train import run as command
from train.config import AdapterConfig, RunConfig, load_config, parse, save_config
from train.lora import is_adapted, is_adapter, peft_settings
from train.optim import learning_rate, set_learning_rate
from train.start import starting_model
from train.state import ADAPTERS, MODEL, OPTIMIZER, Checkpoints, load_state, model_state, optimizer_state, save_state
from train.trainable import group_of, set_trainable

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

SEMANTIC = {"semantic_expert": 1.0}
GEOMETRIC = {"geometric_expert": 1.0}
BOTH = {**SEMANTIC, **GEOMETRIC}


def lora_run(steps: int = 4, trainable: dict[str, float] = BOTH, **options: Any) -> RunConfig:
    """A run with adapters on the experts that train."""
    experts = tuple(name for name in ("semantic", "geometric") if f"{name}_expert" in trainable)
    lora = AdapterConfig(**{"experts": experts, "rank": 4, "alpha": 8.0, **options})
    return replace(chat_run(steps, trainable), lora=lora)


def questions() -> ChatBatch:
    return pack([Colours(views=2).load(index, index) for index in range(len(COLOURS))])


def answers(model: Any, batch: ChatBatch) -> torch.Tensor:
    """The logits of all answers."""
    with torch.no_grad():
        return model.eval()(**chat_inputs(batch, predict_geometry=False)).logits


def heard(names: Iterable[str]) -> set[str]:
    """Without those of the last geometric layer that no answer depends on: its stream ends there."""
    last = re.compile(r"decoder\.layers\.1\.geometric\..*(q|o|gate|up|down)_proj\.")
    return {name for name in names if not last.match(name)}


def unlike_new(model: Any) -> None:
    """Random B: new ones are zero."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)


# ---- what trains ----------------------------------------------------------------------------------------------------


@needs_peft
def test_new_adapters_change_nothing() -> None:
    adapted, plain = (starting_model(config) for config in (lora_run(), chat_run()))
    assert torch.equal(answers(adapted, questions()), answers(plain, questions()))


@needs_peft
def test_new_adapters_follow_from_the_seed() -> None:
    one, same = (starting_model(lora_run()).state_dict() for _ in range(2))
    config = lora_run()
    other = starting_model(replace(config, runtime=replace(config.runtime, seed=1))).state_dict()
    adapters = [name for name in one if ".lora_A." in name]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in adapters)


@needs_peft
@pytest.mark.parametrize("trainable", [SEMANTIC, GEOMETRIC, BOTH, {**CE, "geometry_heads": 1.0, "projection": 1.0}])
def test_only_adapters_and_the_named_groups_train(trainable: dict[str, float]) -> None:
    """Everything else keeps its bits and has no gradient; a group's multiplier is that of its adapters."""
    config = lora_run(trainable={name: 0.5 for name in trainable if name != "geometry_heads"})
    trainer, model = chat_trainer(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gradients: set[str] = set()
    clip = trainer.engine.clip

    def look(parameters: Any, max_norm: float) -> torch.Tensor:
        gradients.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
        return clip(parameters, max_norm)

    trainer.engine.clip = look
    chat_steps(trainer, config, [questions()] * 3)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for names in (moved, gradients):
        assert {group_of(name) for name in names} == set(config.trainable)
        assert {is_adapter(name) for name in names if group_of(name) in BOTH} == {True}
    adapters = {name for name in before if is_adapter(name)}
    assert {name for name in moved if is_adapter(name)} == heard(adapters)
    assert all(group["multiplier"] == 0.5 for group in trainer.optimizer.param_groups)


@needs_peft
def test_the_geometry_stream_is_differentiated_where_it_is_trained() -> None:
    """Adapters of the semantic expert alone leave it without gradient; the values are the same either way."""
    batch = questions()
    inputs = chat_inputs(batch, predict_geometry=False)
    outputs = {}
    for name, trainable in {"semantic": SEMANTIC, "geometric": GEOMETRIC}.items():
        model = starting_model(lora_run(trainable=trainable))
        set_trainable(model, trainable)
        unlike_new(model)
        outputs[name] = model(**inputs)
        assert torch.allclose(outputs[name].logits, answers(model, batch), rtol=1e-4, atol=1e-5)
    assert not outputs["semantic"].geometric_hidden.requires_grad
    assert outputs["geometric"].geometric_hidden.requires_grad


@needs_peft
def test_gradients_of_geometric_adapters_are_those_of_their_weights() -> None:
    """Of B, by the chain rule from the gradient of the weight that it is added to."""
    config, batch = lora_run(trainable=GEOMETRIC), questions()
    adapted, plain = starting_model(config), starting_model(chat_run())
    set_trainable(adapted, GEOMETRIC)
    set_trainable(plain, GEOMETRIC)
    for model in (adapted, plain):
        model(**chat_inputs(batch, predict_geometry=False)).logits.logsumexp(-1).sum().backward()
    weights, parameters = dict(plain.named_parameters()), dict(adapted.named_parameters())
    for place in ("decoder.layers.0.geometric.attention.q_proj", "decoder.layers.0.geometric.mlp.down_proj"):
        whole, down = weights[f"{place}.weight"].grad, parameters[f"{place}.lora_A.default.weight"]
        found = parameters[f"{place}.lora_B.default.weight"].grad
        assert whole is not None
        assert found is not None
        torch.testing.assert_close(found, 8 / 4 * whole @ down.T, rtol=1e-3, atol=1e-6)


@needs_peft
def test_overfitting_one_batch() -> None:
    config = lora_run(rank=8, alpha=32.0)
    trainer, model = chat_trainer(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # new ones are too small for a sure answer
    batch, steps, results = questions(), 80, []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, 1e-2, config.schedule))
        results += chat_steps(trainer, config, [batch])
    assert results[-1].terms["language"] < 0.05 < 3 < results[0].terms["language"]


@needs_peft
def test_adapters_of_a_frozen_group_are_refused() -> None:
    model = starting_model(lora_run())
    for trainable in (SEMANTIC, {**SEMANTIC, "geometric_expert": 0.0}):
        with pytest.raises(InputError, match=r"lora adapts the geometric_expert, and trainable freezes it") as caught:
            set_trainable(model, trainable)
        assert caught.value.fix.startswith("add geometric_expert: 1.0 to trainable")


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four steps that trains adapters alone."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(lora_run(dropout=0.2), folder)
    return folder


def trained(folder: Path, step: int = 4) -> G2VLMForConditionalGeneration:
    """The model of a checkpoint with its adapters apart."""
    trainer, model = chat_trainer(lora_run(dropout=0.2))
    load_state(folder / f"checkpoints/step-{step:08d}", trainer.engine, model, trainer.optimizer)
    return model


@needs_peft
def test_exported_models_are_ordinary(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without peft they answer as the adapted model does, also those of checkpoints."""
    expected = {step: answers(trained(finished, step), questions()) for step in (2, 4)}
    start = answers(starting_model(chat_run()), questions())
    monkeypatch.setitem(sys.modules, "peft", None)
    for folder, step in (("model", 4), ("checkpoints/step-00000004", 4), ("checkpoints/step-00000002", 2)):
        found = answers(g2vlm.load(finished / folder, device="cpu", dtype=torch.float32).model, questions())
        torch.testing.assert_close(found, expected[step], rtol=1e-4, atol=1e-5)
        assert (found - start).abs().max() > 1e-3


@needs_peft
def test_merged_is_what_peft_merges(finished: Path) -> None:
    model: Any = trained(finished)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.merge()
    stored = load_file(finished / "model" / MODEL)
    for name, tensor in model.state_dict().items():
        if not is_adapter(name):
            torch.testing.assert_close(stored[name.replace(".base_layer", "")], tensor, rtol=1e-5, atol=1e-7)


@needs_peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_the_adapter_opens_in_peft(finished: Path) -> None:
    """On the model that the run started from."""
    peft: Any = importlib.import_module("peft")
    wrapped = peft.PeftModel.from_pretrained(starting_model(chat_run()), str(finished / "adapter"))
    assert torch.equal(answers(wrapped, questions()), answers(trained(finished), questions()))
    names = load_file(finished / "adapter/adapter_model.safetensors").keys()
    assert names == peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    assert {file.name for file in (finished / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((finished / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"


@needs_peft
def test_what_is_stored(finished: Path) -> None:
    """Bits of the start but where adapters are merged in; moments of the adapters alone."""
    start, adapted = starting_model(chat_run()).state_dict(), starting_model(lora_run()).state_dict()
    changed = {name.replace(".base_layer", "") for name in adapted if is_adapted(name) and name.endswith(".weight")}
    adapters = {name for name in adapted if is_adapter(name)}
    folder = finished / "checkpoints/step-00000004"
    for file in (finished / "model" / MODEL, folder / MODEL):
        stored = load_file(file)
        assert stored.keys() == start.keys()
        assert {name for name in start if not torch.equal(stored[name], start[name])} == heard(changed)
    assert load_file(folder / ADAPTERS).keys() == adapters
    moments = {name.rsplit("/", 1)[0] for name in load_file(folder / OPTIMIZER)}
    assert heard(adapters) <= moments <= adapters


@needs_peft
def test_resumed_is_undisturbed(finished: Path, tmp_path: Path) -> None:
    """Dropout included."""
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    config = lora_run(dropout=0.2)
    run(replace(config, runtime=replace(config.runtime, resume="auto")), tmp_path / "run")
    equal_runs(finished, tmp_path / "run", 4)
    for name in (ADAPTERS, f"../../model/{MODEL}", "../../adapter/adapter_model.safetensors"):
        one, other = (folder / "checkpoints/step-00000004" / name for folder in (finished, tmp_path / "run"))
        assert one.read_bytes() == other.read_bytes(), name


@needs_peft
def test_another_start_is_refused(finished: Path) -> None:
    folder = finished / "checkpoints/step-00000004"
    for config in (replace(lora_run(), runtime=replace(lora_run().runtime, seed=1)), lora_run(alpha=9.0)):
        trainer, model = chat_trainer(config)
        with pytest.raises(CheckpointError, match="its adapters were trained on another model"):
            load_state(folder, trainer.engine, model, trainer.optimizer)
    for config in (chat_run(trainable=BOTH), lora_run(trainable=SEMANTIC)):
        trainer, model = chat_trainer(config)
        with pytest.raises(CheckpointError, match="of another model"):
            load_state(folder, trainer.engine, model, trainer.optimizer)


@needs_peft
def test_sharded_checkpoints_fit_one_process(tmp_path: Path) -> None:
    config = lora_run()
    with engines.engine("fsdp2", "cpu") as engine:
        trainer, model = chat_trainer(config, engine)
        chat_steps(trainer, config, [questions()] * 2)
        save_state(Checkpoints(tmp_path), 2, engine, model, trainer.optimizer, {})
        weights, moments = model_state(engine, model), optimizer_state(engine, model, trainer.optimizer)
        load_state(Checkpoints(tmp_path).path(2), engine, model, trainer.optimizer)
    alone, plain = chat_trainer(config)
    load_state(Checkpoints(tmp_path).path(2), alone.engine, plain, alone.optimizer)
    for name, tensor in model_state(alone.engine, plain).items():
        assert torch.equal(tensor, weights[name]), name
    for name, tensor in optimizer_state(alone.engine, plain, alone.optimizer).items():
        assert torch.equal(tensor, moments[name]), name


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": ("semntic",)}, "unknown name semntic in lora.experts|did you mean semantic?"),
        ({"modules": ("q_proj", "gate_prj")}, "unknown name gate_prj in lora.modules|did you mean gate_proj?"),
        ({"experts": ("vision",)}, "unknown name vision|known: semantic, geometric"),
        ({"experts": ()}, "lora.experts is empty|semantic, geometric"),
        ({"modules": ()}, "lora.modules is empty|q_proj"),
        ({"rank": 0}, "lora.rank: 0|at least 1"),
        ({"alpha": 0.0}, "lora.alpha: 0.0|above 0"),
        ({"alpha": float("nan")}, "lora.alpha: nan|above 0"),
        ({"dropout": 1.0}, "lora.dropout: 1.0|below 1"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        peft_settings(AdapterConfig(**options))
    assert all(word in str(caught.value) for word in words.split("|")), caught.value


def test_files_and_options(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora: {experts: [geometric], rank: 4}\n")
    config, _ = parse(["--config", str(tmp_path / "run.yaml"), "--lora.alpha", "3"])
    assert config.lora == AdapterConfig(("geometric",), 4, 3.0)
    assert parse(["--lora.rank", "2"])[0].lora == AdapterConfig(rank=2)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(InputError, match=r"did you mean lora\.rank\?"):
        parse(["--lora.rnk", "2"])


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Starts a two-step run of the box rooms; returns its exit code."""
    monkeypatch.setattr(command, "build_source", lambda name, root, **options: BoxRooms())
    monkeypatch.chdir(tmp_path)
    save_config(mini_run(2), tmp_path / "mini.yaml")
    return lambda *options: command.main(["--config", str(tmp_path / "mini.yaml"), *options])


def test_a_missing_package_is_one_clear_error(
    started: Callable[..., int], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert started("--lora.experts", "[geometric]") == 3
    text = capsys.readouterr().err
    assert "pip install 'g2vlm[lora]'" in text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert not Path("runs").exists()
    assert started("--lora.experts", "[geometrc]") == 2
    assert "did you mean geometric?" in capsys.readouterr().err


@needs_peft
def test_scenes_train_adapters_too(started: Callable[..., int], capsys: pytest.CaptureFixture) -> None:
    """The geometry objective alone, its adapters on the geometric expert."""
    assert started("--lora.experts", "[geometric]", "--lora.modules", "[v_proj]", "--lora.rank", "2") == 0
    assert len(load_file(Path("runs/mini/adapter/adapter_model.safetensors"))) == 4
    assert started("--lora.rank", "2") == 2
    assert "trainable freezes it" in capsys.readouterr().err
