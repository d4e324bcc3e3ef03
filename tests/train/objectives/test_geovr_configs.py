"""Every config of GeoVR parses, alone or over those that it is meant for, and asks for what its table says."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from g2vlm.supervision.base import TeacherFeatures
from g2vlm.supervision.teachers.registry import TEACHERS
from tests.g2vlm.supervision.toy import Toy
from train.config import RunConfig, load_config, parse, save_config
from train.objectives.geovr import GeoVRConfig, GeoVRObjective
from train.stock.model import GROUPS

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs/extensions"
ABLATIONS = sorted(path.stem for path in (FOLDER / "geovr").glob("*.yaml") if path.stem != "study")
TERMS = [name for name in ABLATIONS if name.startswith("terms")]
VGGT = TeacherFeatures((4, 11, 17, 23), 24, 1024)
FEATURES = {
    "vggt": VGGT,
    "vggt_omega": VGGT,
    "depth_anything3": TeacherFeatures((18, 26, 32, 38), 40, 1536),
    "expert": TeacherFeatures((0, 1, 2, 3), 4, 128),
}


@cache
def over(*names: str) -> RunConfig:
    """The run of several files, later ones first."""
    return parse([word for name in names for word in ("--config", str(FOLDER / f"{name}.yaml"))])[0]


def ablation(name: str) -> RunConfig:
    return over("geovr", "geovr/study", f"geovr/{name}")


def geovr(run: RunConfig) -> GeoVRConfig:
    assert run.objectives.geovr is not None
    return run.objectives.geovr


def built(run: RunConfig, layers: int = 28) -> GeoVRObjective:
    """On a model that has no weights."""
    features = [
        TeacherFeatures(tuple(own.options.get("blocks", known.blocks)), known.depth, known.dim)
        for own in run.teachers
        if (known := FEATURES.get(own.name)) is not None and own.options.get("blocks") != []
    ]
    with torch.device("meta"):
        return GeoVRObjective.build(geovr(run), Toy(8, layers), features[0] if features else None)


@pytest.mark.parametrize("name", ["geovr", "tiny_geovr", "geovr/study"])
def test_every_config_parses(name: str, tmp_path: Path) -> None:
    save_config(over(name), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == over(name)
    assert {own.name for own in over(name).teachers} <= TEACHERS.keys()


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_parses(name: str, tmp_path: Path) -> None:
    """Over the study of the paper; it changes nothing but the supervision, and its heads can be made."""
    run, plain = ablation(name), over("geovr", "geovr/study")
    assert run != plain or name in ("teacher_vggt", "terms_all")
    assert (run.model, run.trainable, run.data, run.optim, run.schedule, run.runtime) == (
        plain.model, plain.trainable, plain.data, plain.optim, plain.schedule, plain.runtime,
    )  # fmt: skip
    assert {own.name for own in run.teachers} <= TEACHERS.keys()
    if run.objectives.geovr is not None:
        needs = built(run).needs
        assert ("metric_scale" not in needs.fields) or run.teachers[-1].name == "depth_anything3_metric"


def test_the_released_script() -> None:
    """Spec 1.5: outer weights, inner weights, learning rates, batch."""
    run = over("geovr")
    config = geovr(run)
    assert config == GeoVRConfig()
    assert built(run).factors == {
        "translation": 2.5, "rotation": 2.5, "field_of_view": 1.25, "depth": 1, "depth_gradient": 1, "scale": 1,
        "alignment": 1,
    }  # fmt: skip
    assert (run.optim.lr, run.optim.lr * config.lr) == (2e-5, pytest.approx(1e-4))
    assert run.trainable == {"semantic_expert": 1, "embeddings": 1, "lm_head": 1, "merger": 1}
    assert (run.optim.weight_decay, run.optim.clip, run.schedule.kind) == (0, 1, "cosine")
    assert run.schedule.warmup == 0.03 * run.runtime.steps
    assert built(run).module.taps.hidden == (6, 14, 21, 28)
    assert run.trainable["merger"] == 1


def test_the_papers_model() -> None:
    """Over the run of ours: another model with its groups and cells of 32 pixels, at most 300 of them."""
    plain, run = over("geovr"), over("geovr", "geovr_qwen3_vl_2b")
    assert run.trainable.keys() <= GROUPS.keys()
    assert run.data.chat is not None
    assert plain.data.chat is not None
    images = run.data.chat.images
    assert images is not None
    assert (images.squash, images.max_pixels) == (None, 300 * 32**2)
    chat = replace(run.data.chat, images=plain.data.chat.images)
    assert replace(run, model=plain.model, trainable=plain.trainable, data=replace(run.data, chat=chat)) == plain


@pytest.mark.parametrize("name", ["", *TERMS, "relational"])
def test_the_tiny_twin(name: str) -> None:
    """It takes the term ablations too; everything that its terms need comes from the data and stage 1's expert."""
    run = over("tiny_geovr", *[f"geovr/{name}"] * bool(name))
    assert [own.name for own in run.teachers] == ["ground_truth", "expert"]
    if run.objectives.geovr is not None:
        objective = built(run, layers=4)
        assert objective.needs.blocks in ((), (0, 1, 2, 3))
        assert objective.module.taps.hidden in ((), (1, 2, 3, 4))


def test_table_2() -> None:
    found = {name: [*geovr(ablation(name)).factors()] for name in TERMS if name != "terms_none"}
    assert ablation("terms_none").objectives.geovr is None
    assert found == {
        "terms_pose": ["camera"],
        "terms_depth": ["depth"],
        "terms_pose_depth": ["camera", "depth"],
        "terms_pose_depth_scale": ["camera", "depth", "scale"],
        "terms_alignment": ["alignment"],
        "terms_all": ["camera", "depth", "scale", "alignment"],
    }


def test_table_3() -> None:
    runs = {name: ablation(f"teacher_{name}") for name in ("vggt", "vggt_omega", "da3")}
    assert [run.teachers[0].name for run in runs.values()] == ["vggt", "vggt_omega", "depth_anything3"]
    assert [geovr(run).heads.patch_size for run in runs.values()] == [28, 32, 28]
    assert [built(run).module.taps.hidden for run in runs.values()] == [(6, 14, 21, 28)] * 2 + [(14, 20, 24, 28)]
    assert all(len(geovr(run).factors()) == 4 for run in runs.values())


def test_table_4() -> None:
    """Layers of VGGT-Omega by name, counted from 1, and the student's of 28 at the same depth."""
    expected = {12: 14, 18: 21, 24: 28, 5: 6}
    names = [name for name in ABLATIONS if name.startswith("layers_")]
    assert len(names) == 6
    for name in names:
        layers = [int(word) for word in name.split("_")[1:]]
        objective = built(ablation(name))
        assert objective.factors == {"alignment": 1}
        assert objective.needs.blocks == tuple(layer - 1 for layer in layers)
        assert objective.module.taps.hidden == tuple(expected[layer] for layer in layers)


def test_table_5() -> None:
    for kind in ("dense", "dpt", "mlp"):
        for loss, terms in (("l1", {"depth", "depth_gradient"}), ("silog", {"silog"})):
            run = ablation(f"depth_{kind}_{loss}")
            assert geovr(run).heads.depth_head == kind
            assert built(run).factors.keys() == terms


def test_paper_form() -> None:
    objective = built(ablation("paper_form"))
    assert objective.factors.keys() == {
        "translation", "rotation", "field_of_view", "depth_confidence", "depth_gradient", "scale", "alignment",
    }  # fmt: skip
    assert objective.config.scale.logarithm == "log"
    assert objective.config.depth.alpha == 0.2
