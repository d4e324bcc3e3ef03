"""Every config of SpatialSV parses, alone or over the run that it is meant for, and asks for what its table says."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.teachers.registry import TEACHERS
from train.config import RunConfig, load_config, parse, save_config
from train.objectives.spatialsv import SpatialSVConfig, SpatialSVObjective

FOLDER = Path(__file__).parents[2] / "configs/extensions"
RUNS = sorted(path.stem for path in FOLDER.glob("*spatialsv*.yaml"))
ABLATIONS = sorted(path.stem for path in (FOLDER / "spatialsv").glob("*.yaml"))
PAPER, TINY = "spatialsv_qwen2_5_vl_3b", "tiny_spatialsv"
FEATURES = {
    "vggt": TeacherFeatures((23,), 24, 2048),
    "depth_anything3": TeacherFeatures((39,), 40, 1536),
    "expert": TeacherFeatures((3,), 4, 128),
}


@cache
def over(*names: str) -> RunConfig:
    """The run of several files, later ones first."""
    return parse([word for name in names for word in ("--config", str(FOLDER / f"{name}.yaml"))])[0]


def named_in(ablation: str) -> RunConfig:
    """The run that an ablation's comment tells how to start."""
    line = (FOLDER / "spatialsv" / f"{ablation}.yaml").read_text(encoding="utf-8").splitlines()[1]
    files = [word.removeprefix("configs/extensions/").removesuffix(".yaml") for word in line.split("--config ")[1:]]
    return over(*(file.strip().removesuffix(".yaml") for file in files))


def spatialsv(run: RunConfig) -> SpatialSVConfig:
    assert run.objectives.spatialsv is not None
    return run.objectives.spatialsv


def built(run: RunConfig, num_layers: int) -> SpatialSVObjective:
    """On a model that has no weights."""
    features = next((FEATURES[own.name] for own in run.teachers if own.name in FEATURES), None)
    backbone: Any = SimpleNamespace(width=8, num_layers=num_layers)
    with torch.device("meta"):
        return SpatialSVObjective.build(spatialsv(run), backbone, features)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_parses(name: str, tmp_path: Path) -> None:
    run = over(PAPER, name) if name == "spatialsv_qwen2_5_vl_7b" else over(name)
    save_config(run, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == run
    assert {own.name for own in run.teachers} <= TEACHERS.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_says_how_it_is_started(name: str) -> None:
    run = named_in(name)
    if run.objectives.spatialsv is not None:
        built(run, 4 if run.model == over(TINY).model else 36)


def test_the_papers_table_6() -> None:
    """Learning rates of language model, projector and 3D parts, and the layers."""
    rates = {
        PAPER: ("language_model", "merger", (4, 12, 20, 28), 36),
        "spatialsv_qwen2_5_vl_7b": ("language_model", "merger", (3, 10, 17, 24), 28),
        "spatialsv": ("semantic_expert", "merger", (3, 10, 17, 24), 28),
    }
    for name, (decoder, projector, layers, num_layers) in rates.items():
        run = over(PAPER, name) if name.endswith("7b") else over(name)
        assert run.optim.lr * run.trainable[decoder] == pytest.approx(2e-7)
        assert run.optim.lr * spatialsv(run).lr == pytest.approx(1e-5)
        assert run.optim.lr * run.trainable[projector] == pytest.approx(1e-5)
        assert spatialsv(run).heads.layers == layers == spatialsv(run).heads.layers_of(num_layers)
        own = built(run, num_layers)
        assert set(own.factors.values()) == {1.0}
        assert own.module.heads.last in own.module.taps.hidden
        assert own.needs.blocks == (39,)
        assert round(0.03 * run.runtime.steps) == run.schedule.warmup


@pytest.mark.parametrize(
    ("name", "tasks", "distill"),
    [
        ("features", (), True),
        ("depth", ("depth",), False),
        ("points", ("point",), False),
        ("rays", ("ray",), False),
        ("tasks", ("depth", "ray", "point"), False),
        ("all", ("depth", "ray", "point"), True),
    ],
)
def test_table_3(name: str, tasks: tuple[str, ...], distill: bool) -> None:
    for base in (PAPER, TINY):
        heads = spatialsv(over(base, f"spatialsv/signals_{name}")).heads
        assert (heads.tasks, heads.distill) == (tasks, distill)
        assert heads.layers == spatialsv(over(base)).heads.layers  # what the file does not name stays
    assert over(TINY, "spatialsv/signals_none").objectives.spatialsv is None


@pytest.mark.parametrize(
    ("name", "layers", "num_projectors"),
    [
        ("layers_last", (36, 36, 36, 36), 4),
        ("layers_25_28", (25, 26, 27, 28), 4),
        ("layers_spread_one_projector", (4, 12, 20, 28), 1),
        ("layers_spread", (4, 12, 20, 28), 4),
    ],
)
def test_table_4(name: str, layers: tuple[int, ...], num_projectors: int) -> None:
    heads = spatialsv(named_in(name)).heads
    assert (heads.layers, heads.num_projectors) == (layers, num_projectors)


def test_table_5() -> None:
    rows = [named_in(name) for name in ("half_text", "half_supervised", "semi_supervised")]
    assert [run.objectives.spatialsv is not None for run in rows] == [False, True, True]
    shares = [[(own.name, own.weight) for own in run.data.chat.sources] for run in rows]
    assert shares == [[("jsonl", 1.0)], [("jsonl", 1.0)], [("jsonl", 0.5), ("scene_clips", 0.5)]]
    assert [run.runtime.steps for run in rows] == [313, 313, over(PAPER).runtime.steps]


def test_teachers_are_asked_for_their_last_block() -> None:
    run = named_in("teacher_vggt")
    assert [own.name for own in run.teachers] == ["vggt"]
    assert built(run, 36).needs.blocks == (23,)
    assert [own.name for own in over(PAPER).teachers] == ["depth_anything3"]
