"""GASP's configs: the paper's values, and ablations that change nothing but what they are about."""

from dataclasses import replace
from pathlib import Path

import pytest

from g2vlm.data.chat import registry
from train.config import RunConfig, load_config, parse, save_config
from train.stock.model import GROUPS

FOLDER = Path(__file__).parents[2] / "configs/extensions"
PAPER, TINY = FOLDER / "gasp.yaml", FOLDER / "tiny_gasp.yaml"
ABLATIONS = sorted((FOLDER / "gasp").glob("*.yaml"))


def overlaid(file: Path) -> tuple[RunConfig, RunConfig]:
    """The config that an ablation stands over, and both together."""
    base = TINY if file.stem.startswith("tiny") else PAPER
    return load_config(base), parse(["--config", str(base), "--config", str(file)])[0]


@pytest.mark.parametrize("file", [PAPER, TINY], ids=lambda file: file.stem)
def test_both_streams(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.objectives.gasp is not None
    assert config.objectives.language is not None
    assert config.data.chat is not None
    clips, *others = config.data.chat.sources
    assert clips.name == "scene_clips"
    assert clips.weight == sum(source.weight for source in others)
    assert {source.name for source in others} <= registry.SOURCES.keys()
    assert [teacher.name for teacher in config.teachers] == ["ground_truth"]


def test_paper_values() -> None:
    config = load_config(PAPER)
    gasp, chat, lora = config.objectives.gasp, config.data.chat, config.lora
    assert gasp is not None
    assert chat is not None
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.experts) == (512, 512, ("semantic",))
    assert (config.optim.lr, config.optim.clip, config.schedule.kind, gasp.lr) == (1e-4, 1.0, "cosine", 4.0)
    assert (gasp.heads.blocks, gasp.negatives, gasp.tracks.grids) == (None, "all_frames", ((8, 8), (24, 24)))
    assert (chat.sources[0].options["frames"], chat.sources[0].options["window"]) == ([8, 24], 48)
    assert config.runtime.gradient_checkpointing
    assert gasp == type(gasp)()  # the defaults, written out


def test_the_papers_model() -> None:
    plain = load_config(PAPER)
    run = parse(["--config", str(PAPER), "--config", str(FOLDER / "gasp_qwen2_5_vl_7b.yaml")])[0]
    assert run.trainable.keys() <= GROUPS.keys()
    assert replace(run, model=plain.model, trainable=plain.trainable) == plain


def test_tables_4_and_1() -> None:
    assert {file.stem for file in ABLATIONS} == {
        "layers_10_16", "layers_16_22", "layers_22_28", "rank_64", "rank_128", "rank_256", "rank_1024",
        "correspondence_only", "depth_only", "as_questions", "tiny_as_questions",
    }  # fmt: skip


@pytest.mark.parametrize("file", [f for f in ABLATIONS if "questions" not in f.stem], ids=lambda file: file.stem)
def test_an_ablation_changes_what_it_is_called(file: Path) -> None:
    base, config = overlaid(file)
    assert base.objectives.gasp is not None
    assert base.lora is not None
    kind, _, rest = file.stem.partition("_")
    gasp, lora = base.objectives.gasp, base.lora
    if kind == "layers":
        first, last = map(int, rest.split("_"))
        gasp = replace(gasp, heads=replace(gasp.heads, blocks=tuple(range(first, last + 1))))
    elif kind == "rank":
        lora = replace(lora, rank=int(rest), alpha=float(rest))
    else:
        gasp = replace(gasp, **{"depth" if kind == "correspondence" else "correspondence": 0.0})
    assert config == replace(base, lora=lora, objectives=replace(base.objectives, gasp=gasp))


@pytest.mark.parametrize("file", [f for f in ABLATIONS if "questions" in f.stem], ids=lambda file: file.stem)
def test_the_fairness_baseline_says_the_same_about_the_same_clips(file: Path) -> None:
    base, config = overlaid(file)
    assert config.objectives == replace(base.objectives, gasp=None)
    assert base.data.chat is not None
    assert config.data.chat is not None
    (clips, *others), (asked, *rest) = base.data.chat.sources, config.data.chat.sources
    assert asked == replace(clips, name="correspondence_questions", options={**clips.options, "questions": 4})
    assert rest == others
    chat = replace(config.data.chat, sources=base.data.chat.sources)
    assert replace(config, objectives=base.objectives, data=replace(config.data, chat=chat)) == base
