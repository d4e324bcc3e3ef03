"""Joint training of a model with fusion: with its own tokens, or given ones; its source learns nothing."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from g2vlm.asking import look
from g2vlm.chat_model import ChatModel, processor_of
from g2vlm.checkpoint import load_model, random_model, save_model
from g2vlm.data.chat.batch import shown_clip
from g2vlm.data.chat.jsonl import JsonlChats
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.data.chat.types import ChatSample, ImageAt
from g2vlm.errors import InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.geometry_tokens import Clip, GeometricExpert, GeometryTokens, KeptTokens
from g2vlm.images import from_memory
from g2vlm.sampling import GenerationOptions
from g2vlm.token_cache import write_tokens
from g2vlm.weights import read_json
from tests.train.chats import CE, COLOURS, VIEW_SIZE, Colours, chat_config, chat_run, chat_steps, chat_trainer, pack
from tests.train.clips import BoxClips
from tests.train.test_state import equal_runs
from train.config import RunConfig, TokenSourceConfig, load_config, save_config
from train.engine import engine
from train.loop import train
from train.optim import learning_rate, set_learning_rate
from train.packing import ChatMixture
from train.run import open_data
from train.start import build_model
from train.tokens import GivenTokens, check_clips
from train.trainable import GROUPS, PARTS

SHORT = GenerationOptions(max_new_tokens=2)


def fused_run(steps: int = 4, dropout: float = 0.1, **runtime) -> RunConfig:
    config = chat_run(steps, {**CE, "fusion": 1.0}, **runtime)
    assert isinstance(config.model, dict)
    return replace(config, model={**config.model, "fusion": {"dropout": dropout}})


def colours(num_samples: int = 40) -> Colours:
    return Colours(views=1, num_samples=num_samples)


def run(config: RunConfig, folder: Path) -> None:
    with engine("ddp", "cpu") as one:
        train(config, one, folder, ChatMixture((colours(),), (1.0,)), ChatMixture((colours(4),), (1.0,)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(fused_run(), folder)
    return folder


def test_overfitting_one_batch_leaves_the_source_alone() -> None:
    config = fused_run(dropout=0.0)
    trainer, model = chat_trainer(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = pack([colours().load(index, index) for index in range(len(COLOURS))])
    steps, results = 60, []
    for step in range(steps):
        set_learning_rate(trainer.optimizer, learning_rate(step, steps, 3e-3, config.schedule))
        results += chat_steps(trainer, config, [batch])
    assert results[-1].terms["language"] < 0.05 < 3 < results[0].terms["language"]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name.startswith("fusion.")} <= moved
    assert not any(name.startswith(("geometry_", "heads.")) or ".geometric" in name for name in moved)


def test_resumed_is_undisturbed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "checkpoints/step-00000002", tmp_path / "run/checkpoints/step-00000002")
    shutil.copy(finished / "log.jsonl", tmp_path / "run/log.jsonl")
    run(fused_run(resume="auto"), tmp_path / "run")
    equal_runs(finished, tmp_path / "run", 4)


def test_the_model_of_a_run_keeps_its_fusion(finished: Path) -> None:
    model = load_model(finished / "model")
    assert model.config.fusion is not None
    assert model.config.fusion.dropout == 0.1
    assert "fusion.query.weight" in model.state_dict()


# A checkpoint that gets a fusion, and tokens that are given.


class Still(Colours):
    """Every sample is always the same, so that its tokens can be kept."""

    def load(self, index: int, seed: int) -> ChatSample:
        return super().load(index, index)


def still() -> Still:
    return Still(views=1, clip=True, num_samples=6)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without fusion, of weights so large that geometry counts."""
    model = random_model(chat_config())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("decoder"):
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def cache(start: Path) -> Path:
    source, clips = GeometricExpert(load_model(start)), (still().load(i, i).clip for i in range(6))
    made_by = {"source": "start", "preprocessing": "none"}
    write_tokens(start.parent / "tokens", source, (Clip.of(clip) for clip in clips if clip), made_by)
    return start.parent / "tokens"


def checkpoint_run(start: Path, given: TokenSourceConfig | None = None, **fusion: Any) -> RunConfig:
    config = fused_run(2, **({"checkpoint_every": 0, "validate_every": 0} | fusion.pop("runtime", {})))
    where = {} if given is None else {"source": "given", "token_dim": 128}
    model = {"checkpoint": str(start), "fusion": {"dropout": 0.0, **where, **fusion}}
    data = replace(config.data, color_augmentation=False)
    return replace(config, model=model, geometry_tokens=given, data=data)


class Backwards(BoxClips):
    """Shows the second view first."""

    def load(self, index: int, seed: int) -> ChatSample:
        return replace(super().load(index, seed), parts=(ImageAt(1), ImageAt(0), "What size?"))


def test_the_check_before_a_run_asks_for_the_tokens_of_what_is_shown() -> None:
    shown = shown_clip(Backwards().load(0, 0))
    assert shown is not None
    kept = KeptTokens({Clip.of(shown).name: GeometryTokens(torch.zeros(2, 4, 8), None, (2, 2))})
    check_clips([Backwards()], GivenTokens(kept, FusionConfig(source="given", token_dim=8), 2), torch.device("cpu"))


def losses(config: RunConfig, folder: Path, source: Any = None) -> list[float]:
    mixture = ChatMixture((source or still(),), (1.0,))
    with engine("ddp", "cpu") as one:
        train(config, one, folder, mixture, mixture)
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in steps if "grad_norm" in entry]


@pytest.mark.parametrize("tokens", ["all", "camera"])
def test_given_tokens_train_as_the_own(tokens: str, start: Path, cache: Path, tmp_path: Path) -> None:
    """Of the same frozen expert, whether asked in every step or kept: the same losses, which geometry matters for."""
    own = losses(checkpoint_run(start, tokens=tokens), tmp_path / "own")
    asked = TokenSourceConfig("geometric_expert", str(start))
    kept = TokenSourceConfig("cache", str(cache), {"made_by": {"preprocessing": "none"}})
    assert losses(checkpoint_run(start, asked, tokens=tokens), tmp_path / "asked") == pytest.approx(own, abs=1e-6)
    assert losses(checkpoint_run(start, kept, tokens=tokens), tmp_path / "kept") == pytest.approx(own, abs=1e-6)
    assert losses(checkpoint_run(start, kept, tokens="patches"), tmp_path / "other") != pytest.approx(own, abs=1e-6)


def test_a_run_that_gave_a_checkpoint_its_fusion_goes_on_and_answers(start: Path, tmp_path: Path) -> None:
    two = checkpoint_run(start, runtime={"validate_every": 0})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses(two, whole)
    losses(replace(two, runtime=replace(two.runtime, steps=1)), parts)
    losses(replace(two, runtime=replace(two.runtime, resume="auto")), parts)
    ends = [load_file(folder / "model" / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    before = load_file(start / "model.safetensors")
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, ends[0][name])}
    assert not any(name.startswith(("geometry_", "heads.")) or ".geometric" in name for name in moved)
    assert {name.split(".")[0] for name in ends[0].keys() - before.keys()} == {"fusion"}
    model = load_model(whole / "model")
    image = from_memory(np.full((30, 30, 3), 200, np.uint8))
    assert look(ChatModel.of(model, "fused"), [image], [image], 28).ask("What colour?", SHORT).tokens == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometry_tokens": TokenSourceConfig()}, "geometry_tokens without fusion.source: given"),
        ({"geometry_tokens": None, "given": True}, "fusion.source: given without geometry_tokens"),
        ({"given": True, "width": 64}, "have 128 values, the fusion takes 64"),
        ({"given": True, "made_by": {"source": "other"}}, "source is 'start', wanted 'other'"),
        ({"given": True, "source": Colours(views=1)}, "no source of data.chat shows clips of scenes: colours"),
        ({"given": True, "source": Still(views=1, clip=True, size=(28, 42))}, "2 frames|frames of 28 x 28 are kept"),
    ],
)
def test_tokens_that_cannot_be_given(
    change: dict[str, Any], message: str, start: Path, cache: Path, tmp_path: Path
) -> None:
    kept = TokenSourceConfig("cache", str(cache), {"made_by": change.get("made_by", {})})
    config = checkpoint_run(start, kept if change.get("given") else None)
    assert isinstance(config.model, dict)
    if "width" in change:
        config.model["fusion"]["token_dim"] = change["width"]
    if "geometry_tokens" in change:
        config = replace(config, geometry_tokens=change["geometry_tokens"])
    with pytest.raises(InputError, match=message):
        losses(config, tmp_path, change.get("source"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "a checkpoint gets a fusion and nothing else"),
        ({"fusion": {}, "heads": {"depth": 1}}, "nothing else; given: checkpoint, fusion, heads"),
        ({"fusion": {"head": 8}}, "unknown key fusion.head; known: head_dim"),
        ({"fusion": {"head_dim": 48}}, "does not divide"),
        ({"fusion": {"init": "ones"}}, "allowed: vlm3r, zero"),
    ],
)
def test_a_checkpoint_gets_a_fusion_and_nothing_else(model: dict[str, Any], message: str, start: Path) -> None:
    with pytest.raises(InputError, match=message):
        build_model({"checkpoint": str(start), **model}, 0)


def test_a_model_trained_on_timed_videos_says_so(start: Path, tmp_path: Path) -> None:
    """Its images are fused with the views of the same frames."""
    (tmp_path / "video").mkdir()
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 0, 0)).save(tmp_path / f"video/{i}.png")
    said = [{"from": "human", "value": "<video>\nHow many?"}, {"from": "gpt", "value": "Four."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": said, "video": "video"}))
    options = {"frames": 2, "geometry": True, "view_size": VIEW_SIZE}
    source = JsonlChats(tmp_path / "rows.jsonl", video_prompt="timed", fps=1, **options)
    config = checkpoint_run(start)
    chat = replace(config.data.chat, tokens_per_pack=600)
    (loss, _) = losses(replace(config, data=replace(config.data, chat=chat)), tmp_path / "run", source)
    assert math.isfinite(loss)
    processor = read_json(tmp_path / "run/model/processor_config.json")
    assert processor["trained_video_prompts"] == ["timed"]
    assert processor_of(load_model(tmp_path / "run/model").config).trained_video_prompts == ["timed"]


def test_a_fusion_is_not_replaced(finished: Path) -> None:
    with pytest.raises(InputError, match="has a fusion already"):
        build_model({"checkpoint": str(finished / "model"), "fusion": {}}, 0)


# The recipes.

EXTENSIONS = Path(__file__).parents[2] / "configs/extensions"
RECIPES = [EXTENSIONS / "tiny_vlm3r.yaml", *sorted(EXTENSIONS.glob("vlm3r*.yaml")), *(EXTENSIONS / "vlm3r").iterdir()]


def test_twenty_steps_of_the_recipe_lower_the_loss(start: Path, tmp_path: Path) -> None:
    """configs/extensions/tiny_vlm3r.yaml at the smallest size, with a learning rate for so few steps."""
    config = load_config(RECIPES[0])
    assert isinstance(config.model, dict)
    assert config.data.chat is not None
    qa = replace(config.data.chat.sources[1], options={"questions": 4, "views": [2, 2]})
    chat = replace(config.data.chat, sources=(qa,), validation=(), tokens_per_pack=700, view_size=VIEW_SIZE)
    config = replace(
        config,
        model={**config.model, "checkpoint": str(start)},
        data=replace(config.data, chat=chat),
        optim=replace(config.optim, lr=5e-3),
        schedule=replace(config.schedule, warmup=4),
        guards=replace(config.guards, max_bad_scenes_share=0.5),
        runtime=replace(config.runtime, steps=20, workers=0, checkpoint_every=0, validate_every=0),
    )
    source, _ = open_data(config.data)
    with engine("ddp", "cpu") as one:
        train(config, one, tmp_path, source)
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [entry["loss"] for entry in steps if entry["kind"] == "step"]
    assert len(found) == 20
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_parse(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    assert config.trainable.keys() <= (GROUPS | PARTS).keys()
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    if isinstance(config.model, dict):
        FusionConfig(**config.model["fusion"]).require_fits(1536, 28)
    assert config.data.chat is not None
    for source in config.data.chat.sources:
        if source.name == "jsonl":
            (tmp_path / "rows.jsonl").write_text("{}")
            build_chat_source("jsonl", tmp_path / "rows.jsonl", config.data.chat.view_size, **source.options)


@pytest.mark.parametrize("name", ["patches", "camera", "none", "zero_init"])
def test_ablations_differ_in_the_fusion_alone(name: str) -> None:
    whole, part = (load_config(EXTENSIONS / f"{file}.yaml") for file in ("vlm3r_vsi", f"vlm3r/{name}"))
    assert isinstance(whole.model, dict)
    changes = {"patches": {"tokens": "patches"}, "camera": {"tokens": "camera"}, "zero_init": {"init": "zero"}}
    if name == "none":
        assert part.model == whole.model["checkpoint"]
        assert part.trainable == {group: rate for group, rate in whole.trainable.items() if group != "fusion"}
    else:
        assert part.model == {**whole.model, "fusion": {**whole.model["fusion"], **changes[name]}}
        assert part.trainable == whole.trainable
    assert replace(part, model=whole.model, trainable=whole.trainable) == whole


def test_published_values() -> None:
    """VLM-3R's appendix and released script; the numbers of questions are those of its two data sets."""
    vsi, vsti = (load_config(EXTENSIONS / f"vlm3r_{name}.yaml") for name in ("vsi", "vsti"))
    for config, questions in ((vsi, 207_779), (vsti, 132_568)):
        epoch = config.runtime.checkpoint_every
        assert (epoch - 1) * 128 <= questions < (epoch + 1) * 128
        assert config.runtime.steps == 5 * epoch
        assert config.schedule.warmup == math.ceil(0.03 * config.runtime.steps)
        assert (config.optim.lr, config.optim.weight_decay, config.schedule.final_lr) == (2e-5, 0, 0)
        assert config.lora is not None
        assert (config.lora.rank, config.lora.alpha) == (128, 256)
        assert config.data.chat is not None
        assert config.data.chat.tokens_per_pack == 32_768
        options = config.data.chat.sources[0].options
        assert (options["frames"], options["video_prompt"]) == (32, "timed")
