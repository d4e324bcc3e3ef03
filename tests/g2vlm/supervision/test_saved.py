"""Heads in files: what is written is read back exactly, and what is damaged is refused in one readable error."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from g2vlm.errors import CheckpointError, InputError
from g2vlm.supervision import saved
from g2vlm.supervision.aux_tokens import AuxTokens
from g2vlm.supervision.backbones.base import Taps
from g2vlm.supervision.base import Fit, Supervision, TeacherFeatures
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.geovr import GeoVR, GeoVRHeads
from g2vlm.supervision.saved import load_supervision, saved_names, write_supervision
from g2vlm.supervision.spatialsv import SpatialSV, SpatialSVHeads

FIT = Fit(8, 4, TeacherFeatures((1, 3), 4, 6))
SPATIALSV = SpatialSVHeads((0, 1, 2, 4), 1, 8, ("ray", "depth"), DPTWidths((8, 8, 4, 4), 8), 3)
GEOVR = GeoVRHeads(camera_dim=8, scale_dim=8, dpt_levels=(8, 8, 8, 8), dpt_dim=8)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Config:
    inner: Inner | None = None
    rate: float = 0.5


class Plain(Supervision):
    """Heads of one layer, and probe tokens."""

    def __init__(self, config: Config, fit: Fit):
        heads: Any = nn.Linear(fit.width, 2)
        super().__init__(config, fit, heads, AuxTokens(fit.width))

    @property
    def taps(self) -> Taps:
        return Taps()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    monkeypatch.setitem(saved.SUPERVISIONS, "plain", f"{__name__}:Plain")
    monkeypatch.setitem(saved.CONFIGS, "plain", f"{__name__}:Config")
    return Plain(Config(Inner((3, 4, 5))), FIT)


def write(folder: Path, module: Supervision, name: str = "own") -> Supervision:
    write_supervision(folder, name, module, module.state_dict())
    return load_supervision(folder, name)


@pytest.mark.parametrize(
    "build",
    [
        lambda: SpatialSV(SPATIALSV, FIT),
        lambda: SpatialSV(replace(SPATIALSV, layers=None, distill=False), Fit(8, 28)),
        lambda: GeoVR(GEOVR, FIT),
    ],
)
def test_what_is_written_comes_back(build: Callable[[], Supervision], tmp_path: Path) -> None:
    module = build()
    found = write(tmp_path / "new" / "heads", module)
    assert type(found) is type(module)
    assert found.config == module.config
    assert found.fit == module.fit
    assert found.taps == module.taps
    assert not found.training
    state = found.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(tensor.equal(state[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_nested_configs_tuples_and_precisions(plain: Plain, tmp_path: Path) -> None:
    assert plain.aux is not None
    plain.aux.bfloat16()
    found = write(tmp_path, plain)
    assert found.config == Config(Inner((3, 4, 5)))
    assert [tensor.dtype for tensor in found.aux.state_dict().values()] == [torch.bfloat16] * 2
    assert {tensor.dtype for tensor in found.heads.state_dict().values()} == {torch.float32}


def test_the_callers_random_state_does_not_change_what_is_loaded(plain: Plain, tmp_path: Path) -> None:
    write(tmp_path, plain)
    torch.manual_seed(1)
    first = load_supervision(tmp_path, "own").state_dict()
    torch.manual_seed(2)
    second = load_supervision(tmp_path, "own").state_dict()
    assert all(first[name].equal(second[name]) for name in first)


def test_names_of_a_folder(plain: Plain, tmp_path: Path) -> None:
    write(tmp_path, plain, "b")
    write(tmp_path, plain, "a")
    (tmp_path / "other.json").write_text("{}")
    assert saved_names(tmp_path) == ["a", "b"]


def test_weights_of_something_else_are_not_written(plain: Plain, tmp_path: Path) -> None:
    weights = dict(plain.state_dict())
    weights["heads.other"] = weights.pop("heads.bias")
    with pytest.raises(CheckpointError, match=r"heads\.bias"):
        write_supervision(tmp_path / "new", "own", plain, weights)
    assert not (tmp_path / "new").exists()


def test_a_supervision_that_is_not_registered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not among"):
        write(tmp_path, Plain(Config(), FIT))


# ---- damage ---------------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        record = json.loads((folder / "own.json").read_text())
        change(record)
        (folder / "own.json").write_text(json.dumps(record))

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "own.safetensors")
    del tensors["heads.distill.layers.0.bias"]
    save_file(tensors, folder / "own.safetensors")


def cut_in_half(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown key": (edited(lambda r: r.update(extra=1)), "extra"),
    "missing key": (edited(lambda r: r.pop("fit")), "fit"),
    "unknown kind": (edited(lambda r: r.update(kind="geo")), "geo"),
    "unknown key of the config": (edited(lambda r: r["config"].update(taskz=[])), "taskz"),
    "unknown key of a nested config": (edited(lambda r: r["config"]["widths"].update(levelz=[])), "levelz"),
    "unknown key of the fit": (edited(lambda r: r["fit"].update(widht=1)), "widht"),
    "a wrong type": (edited(lambda r: r["config"].update(out_stride="two")), "out_stride"),
    "a wrong choice": (edited(lambda r: r["config"].update(num_projectors=3)), "num_projectors"),
    "a value that is refused": (edited(lambda r: r["config"].update(out_stride=0)), "out_stride"),
    "layers that do not exist": (edited(lambda r: r["fit"].update(num_layers=2)), "4"),
    "no object": (edited(lambda r: r.update(config=[1])), "config"),
    "another width": (edited(lambda r: r["fit"].update(width=12)), "projectors.projector"),
    "a missing tensor": (without_a_tensor, "heads.distill.layers.0.bias"),
    "half of the weights": (cut_in_half("own.safetensors"), "own.safetensors"),
    "half of the record": (cut_in_half("own.json"), "own.json"),
    "no weights": (lambda folder: (folder / "own.safetensors").unlink(), "own.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told(damage: str, tmp_path: Path) -> None:
    module = SpatialSV(SPATIALSV, FIT)
    write_supervision(tmp_path, "own", module, module.state_dict())
    spoil, named = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        load_supervision(tmp_path, "own")
    assert named in str(raised.value)
    assert raised.value.fix
    assert "\n" not in raised.value.what


def test_heads_that_are_not_there(tmp_path: Path) -> None:
    module = SpatialSV(SPATIALSV, FIT)
    write_supervision(tmp_path, "known", module, module.state_dict())
    with pytest.raises(InputError, match="holds known"):
        load_supervision(tmp_path, "own")
    with pytest.raises(InputError, match="no heads"):
        load_supervision(tmp_path / "absent", "own")


def test_every_kind_has_a_config() -> None:
    assert saved.SUPERVISIONS.keys() == saved.CONFIGS.keys()
