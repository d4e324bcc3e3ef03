"""Training a stock model: what is learned, what stays as it is, what runs leave, and runs that stop and go on."""

import json
import logging
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from g2vlm.errors import CheckpointError, InputError
from g2vlm.semantic_images import SemanticRule
from g2vlm.stock.model import FAMILIES, load_stock
from g2vlm.supervision.saved import saved_names
from g2vlm.weights import WeightFiles, read_json
from tests.g2vlm.stock_folders import stock_folder
from tests.train.chats import COLOURS, Colours
from tests.train.clips import GEOVR, BoxClips
from tests.train.stocks import ALL, stock_layout, stock_parts, stock_run, stock_steps, supervised_run
from tests.train.test_chat import run
from tests.train.test_state import equal_runs
from train.config import AdapterConfig, GeometryConfig, TokenSourceConfig, load_config, save_config
from train.engine import engine
from train.loop import train
from train.optim import learning_rate, set_learning_rate
from train.packing import ChatMixture
from train.start import starting_student
from train.stock.batch import StockBatch, collate_stock, stock_inputs
from train.stock.model import GROUPS
from train.trainable import group_of, set_trainable

ROOT = Path(__file__).resolve().parents[2]


def batch_of(family: str = "qwen2_vl", count: int = len(COLOURS)) -> StockBatch:
    return collate_stock([Colours().load(index, index) for index in range(count)], stock_layout(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_overfitting_one_batch(family: str) -> None:
    """All answers are right."""
    config = stock_run(family=family)
    trainer = stock_parts(config).trainer
    batch, steps, results = batch_of(family), 50, []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, 1e-2, config.schedule))
        results += stock_steps(trainer, [batch])
    losses = [result.terms["language"] for result in results]
    assert losses[19] < 0.5 * losses[0]
    assert losses[-1] < 0.1 < 5 < losses[0]
    _, output = trainer.evaluate(stock_inputs(batch), batch)
    assert output.logits is not None
    assert torch.equal(output.logits.argmax(-1), batch.label_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_librarys(family: str) -> None:
    """Transformers' own, of the labels, with all logits."""
    parts = stock_parts(stock_run(family=family))
    batch = batch_of(family)
    inputs = stock_inputs(batch)
    expected = parts.model(**{name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}).loss
    terms, _ = parts.trainer.evaluate(inputs, batch)
    assert terms["language"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_a_group(family: str) -> None:
    model = load_stock(stock_folder(family))
    groups = {group_of(name, groups=GROUPS) for name, _ in model.named_parameters()}
    assert groups == set(GROUPS) - (set() if family == "qwen3_vl" else {"deepstack_mergers"})
    for group in groups:
        trained = set_trainable(model, {group: 1.0}, GROUPS)
        assert trained == {group: [name for name, p in model.named_parameters() if p.requires_grad]}


@pytest.mark.parametrize("groups", [["language_model"], ["merger", "lm_head"], ["vision_encoder", "embeddings"]])
def test_what_is_frozen_keeps_its_bits(groups: list[str]) -> None:
    parts = stock_parts(stock_run(trainable=dict.fromkeys(groups, 1.0)))
    model = parts.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    stock_steps(parts.trainer, [batch_of()] * 2)
    moved = {
        group_of(n, groups=GROUPS) for n, parameter in model.named_parameters() if not torch.equal(parameter, before[n])
    }
    assert moved == set(groups)


def test_recomputed_activations_change_no_gradient() -> None:
    config = stock_run()
    results = []
    for recomputed in (False, True):
        runtime = replace(config.runtime, gradient_checkpointing=recomputed)
        parts = stock_parts(replace(config, runtime=runtime))
        model = parts.model
        stock_steps(parts.trainer, [batch_of()])
        results.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == recomputed
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name]), name


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of four steps, with a source of text alone."""
    folder = tmp_path_factory.mktemp("stock") / "run"
    run(stock_run(), folder)
    return folder


def test_a_run_leaves_a_plain_model(finished: Path) -> None:
    """The files of the folder that it started from, its tensors with other values, and nothing else."""
    start, model = stock_folder(), finished / "model"
    assert {file.name for file in model.iterdir()} == {file.name for file in start.iterdir()}
    old, new = WeightFiles(start), WeightFiles(model)
    assert old.specs == new.specs
    assert not torch.equal(old.load("model.embed_tokens.weight"), new.load("model.embed_tokens.weight"))
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (start / name).read_bytes(), name
    written = read_json(model / "config.json")
    assert written["architectures"] == ["Qwen2VLForConditionalGeneration"]
    found: Any = AutoModelForImageTextToText.from_pretrained(model, output_loading_info=True)
    loaded, info = found
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert AutoProcessor.from_pretrained(model).image_token_id == loaded.config.image_token_id
    assert (model / "model.safetensors").stat().st_mode == (model / "config.json").stat().st_mode


def test_a_run_logs_what_it_promises(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert {"loss", "language", "samples", "tokens", "images"} <= lines[0].keys()
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [2, 4]
    assert not any(line["kind"] == "attention" for line in lines)


def test_resumed_is_undisturbed(finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    with caplog.at_level(logging.INFO):
        run(stock_run(resume="auto", workers=2), tmp_path / "run")
    assert "going on from" in caplog.text
    equal_runs(finished, tmp_path / "run", 4)


def test_a_checkpoint_is_a_start(finished: Path) -> None:
    """Training begins anew from its weights."""
    config = replace(stock_run(), model=str(finished / "checkpoints/step-00000004"))
    model = stock_parts(config).model
    for name, tensor in load_stock(finished / "model").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    start = stock_folder("qwen3_vl", tied=True)
    groups = {name: factor for name, factor in ALL.items() if name != "lm_head"}
    config = replace(stock_run(2, trainable=groups), model=str(start))
    run(config, tmp_path / "run")
    assert WeightFiles(tmp_path / "run/model").specs == WeightFiles(start).specs
    with pytest.raises(InputError, match="lm_head trains nothing"):
        stock_parts(replace(config, trainable=ALL))
    run(replace(config, runtime=replace(config.runtime, steps=3, resume="auto")), tmp_path / "run")
    assert "lm_head.weight" not in load_file(tmp_path / "run/checkpoints/step-00000003/model.safetensors")


def test_other_sizes_of_images_are_written(tmp_path: Path) -> None:
    plain = stock_run(1)
    assert plain.data.chat is not None
    chat = replace(plain.data.chat, images=SemanticRule.native(28 * 28 * 2, 28 * 28 * 3))
    run(replace(plain, data=replace(plain.data, chat=chat)), tmp_path / "run")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "run/model")
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (28 * 28 * 2, 28 * 28 * 3)
    assert processor.image_processor(images=[torch.zeros(3, 40, 40)])["image_grid_thw"].tolist() == [[1, 4, 4]]


# ---- with geometric supervision -------------------------------------------------------------------------------------


def clips_run(folder: Path, **runtime: Any) -> None:
    """Four steps of questions about clips, of clips without any, and of words."""
    sources = (BoxClips(), BoxClips(asked=False, name="silent"), BoxClips(views=0, name="words"))
    with engine("ddp", "cpu") as one:
        train(supervised_run(stock_run(**runtime)), one, folder, ChatMixture(sources, (1.0, 1.0, 1.0)))


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with all three."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    clips_run(folder)
    return folder


def test_every_supervision_teaches_a_stock_model(supervised: Path) -> None:
    lines = [json.loads(line) for line in (supervised / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    for name in ("geovr.depth", "geovr.rotation", "gasp.correspondence", "spatialsv.point_l2", "language"):
        assert max(line["counts"][name] for line in steps) > 0, name
        assert max(line[name] for line in steps) > 0, name
    assert all(torch.tensor(line["loss"]).isfinite() for line in steps)


def test_nothing_of_the_heads_is_in_the_model(supervised: Path) -> None:
    """Its tensors, files and logits are those of a model that never had any."""
    start, model = stock_folder(), supervised / "model"
    assert {file.name for file in model.iterdir()} == {file.name for file in start.iterdir()}
    assert WeightFiles(model).specs == WeightFiles(start).specs
    assert saved_names(supervised / "heads") == ["gasp", "geovr", "spatialsv"]
    inputs = {name: own for name, own in stock_inputs(batch_of()).items() if isinstance(own, torch.Tensor)}
    config = AutoConfig.from_pretrained(start)
    never: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    never.load_state_dict(load_stock(supervised / "checkpoints/step-00000004").state_dict())
    exported: Any = AutoModelForImageTextToText.from_pretrained(model, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert torch.equal(exported(**inputs).logits, never(**inputs).logits)


def test_a_supervised_run_goes_on(supervised: Path, tmp_path: Path) -> None:
    shutil.copytree(supervised / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(supervised / "log.jsonl", tmp_path / "run/log.jsonl")
    clips_run(tmp_path / "run", resume="auto")
    equal_runs(supervised, tmp_path / "run", 4)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_adapters_are_merged_into_a_plain_model(tmp_path: Path) -> None:
    """What they are added to keeps its bits; the rest learns as its group says; a stopped run goes on with them."""
    config = replace(stock_run(trainable={"language_model": 1.0, "merger": 1.0}), lora=AdapterConfig(rank=4))
    parts, plain = stock_parts(config), stock_parts(stock_run())
    batch = batch_of()
    first, second = (own.trainer.evaluate(stock_inputs(batch), batch)[0] for own in (parts, plain))
    assert first == second
    trained = {name for name, parameter in parts.model.named_parameters() if parameter.requires_grad}
    projections = {name for name in trained if ".lora_" in name}
    assert len(projections) == 2 * 7 * 3
    assert all(name.startswith("model.visual.merger.") for name in trained - projections)
    run(config, tmp_path / "run")
    start, model = WeightFiles(stock_folder()), WeightFiles(tmp_path / "run/model")
    assert model.specs == start.specs
    changed = {name for name in start.specs if not torch.equal(start.load(name), model.load(name))}
    assert changed == {n for n in start.specs if "_proj.weight" in n or n.startswith("visual.merger.")}
    shutil.copytree(tmp_path / "run/checkpoints/step-00000002", tmp_path / "again/checkpoints/step-00000002")
    shutil.copy(tmp_path / "run/log.jsonl", tmp_path / "again/log.jsonl")
    run(replace(config, runtime=replace(config.runtime, resume="auto")), tmp_path / "again")
    equal_runs(tmp_path / "run", tmp_path / "again", 4)


def test_a_stock_model_has_one_expert() -> None:
    with pytest.raises(InputError, match="only expert"):
        starting_student(replace(stock_run(), lora=AdapterConfig(("semantic", "geometric"))))


def test_the_example(tmp_path: Path) -> None:
    """It parses, and its groups and objectives are those of a stock model."""
    config = load_config(ROOT / "configs/extensions/stock_qwen2_vl.yaml")
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.trainable.keys() <= GROUPS.keys()
    tiny = replace(config, model=str(stock_folder(tied=True)))
    objectives = replace(tiny.objectives, geovr=replace(config.objectives.geovr, heads=GEOVR.heads))
    assert stock_parts(replace(tiny, objectives=objectives)).supervision is not None


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_a_stock_model_cannot_do() -> None:
    config = stock_run()
    with pytest.raises(InputError, match=r"objectives\.geometry with a stock model"):
        starting_student(replace(config, objectives=replace(config.objectives, geometry=GeometryConfig())))
    with pytest.raises(InputError, match=r"unknown group trainable\.semantic_expert"):
        stock_parts(replace(config, trainable={"semantic_expert": 1.0}))
    tokens = replace(config, geometry_tokens=TokenSourceConfig())
    with pytest.raises(InputError, match="geometry_tokens with a stock model"):
        starting_student(tokens).tokens(tokens, torch.device("cpu"))
    with pytest.raises(InputError, match="deepstack_mergers trains nothing"):
        stock_parts(replace(config, trainable={"deepstack_mergers": 1.0}))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "processor_config.json"])
def test_damaged_folders(file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(stock_folder(), tmp_path / "stock")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(CheckpointError):
        run(replace(stock_run(1), model=str(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    folder = shutil.copytree(stock_folder(), tmp_path / "stock")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_stock(folder)
