"""Checkpoints that appear complete or not at all, and are trusted only after their manifest verifies.

A checkpoint folder holds a model in the layout of its kind (model.safetensors, config.json: `g2vlm.load` reads ours,
`from_pretrained` of transformers a stock one), the optimizer
(optimizer.safetensors), the rest of the state (state.json) and, written last, manifest.json with the size and SHA-256
of each file. With LoRA the model has the adapters merged into it, and adapters.safetensors holds them: what they are
added to is the model that the run starts from. With geometric supervision heads.safetensors holds its heads and probe
tokens, which no model has. It is written under a hidden name, synced to disk, and renamed once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from g2vlm.companions import write_companions
from g2vlm.errors import CheckpointError, InputError, ResourceError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.staging import write_errors
from g2vlm.weights import read_json, sha256
from train.engine import Engine
from train.lora import is_adapted, plain_name, split

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
ADAPTERS, HEADS = "adapters.safetensors", "heads.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: that holds step-00000100 and so on.
        keep: how many of the newest remain.
    """

    folder: Path
    keep: int = 2

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a folder, oldest first."""
        return sorted(int(entry.name[5:]) for entry in self.folder.glob("step-*") if entry.name[5:].isdigit())

    def newest(self) -> tuple[int | None, dict[int, str]]:
        """The newest step whose checkpoint verifies (None without any), and why newer ones were refused."""
        refused = {}
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                refused[step] = f"{error.what}: {error.why}"
            else:
                return step, refused
        return None, refused

    def set_aside(self, step: int) -> None:
        """Rename a refused checkpoint, so that it is neither taken nor counted again."""
        aside = self.folder / f"refused-{self.path(step).name}"
        _discard(aside)
        self.path(step).rename(aside)

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Make the checkpoint of a step from the files that `fill` puts into a folder; then drop old ones.

        Raises:
            ResourceError: the disk is full; older checkpoints are untouched.
            InputError: the folder cannot be written.
        """
        staging = self.folder / f".step-{step:08d}.partial"
        try:
            with write_errors(self.path(step)):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                staging.mkdir()
                fill(staging)
                _seal(staging, step)
                _discard(self.path(step))
                staging.rename(self.path(step))
                _sync(self.folder)
                for old in self.steps()[: -self.keep]:
                    _discard(self.path(old))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what interrupted writes and removals left."""
        for entry in self.folder.glob(".step-*"):
            shutil.rmtree(entry, ignore_errors=True)


def _seal(folder: Path, step: int) -> None:
    """Sync every file, then write the manifest, then sync the folder."""
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (folder / MANIFEST).write_text(_manifest(step, entries), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _manifest(step: int, entries: Mapping[str, Any]) -> str:
    """The manifest's text, which also holds its own digest."""
    values = {"schema": SCHEMA, "step": step, "files": entries}
    return _json({**values, "sha256": hashlib.sha256(_json(values).encode()).hexdigest()})


def _discard(folder: Path) -> None:
    """Remove a folder; it loses its name first, so that half of it is never taken for a checkpoint."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def verify(folder: Path) -> None:
    """Check that a checkpoint is complete and undamaged.

    Raises:
        CheckpointError: it is not; the message names the file.
    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"refused {folder}", f"{MANIFEST} is missing")
    try:
        manifest = read_json(folder / MANIFEST)
        step, files = manifest["step"], manifest["files"]
        intact = (folder / MANIFEST).read_text(encoding="utf-8") == _manifest(step, files)
    except (CheckpointError, KeyError, ValueError):
        intact, step, files = False, 0, {}
    if not intact:
        raise CheckpointError(f"refused {folder}", f"{MANIFEST} is damaged")
    expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    if folder.name != f"step-{step:08d}" or not {MODEL, OPTIMIZER, STATE, "config.json"} <= expected.keys():
        raise CheckpointError(f"refused {folder}", f"{MANIFEST} belongs to another checkpoint")
    for name, (size, digest) in expected.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"refused {folder}", f"{name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"refused {folder}", f"{name} has {file.stat().st_size} bytes, not {size}")
        if sha256(file) != digest:
            raise CheckpointError(f"refused {folder}", f"{name} is damaged: its SHA-256 differs")


# ---- what a checkpoint holds ----------------------------------------------------------------------------------------


class ModelFiles(Protocol):
    """How a kind of model lies in a folder: MODEL, config.json, and what belongs to them."""

    def write(self, folder: Path, weights: Mapping[str, Tensor], model: Any) -> None:
        """A folder of a model with these full tensors under the model's own names."""
        ...

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a folder under the model's own names."""
        ...


class OurFiles:
    """Our layout."""

    def write(self, folder: Path, weights: Mapping[str, Tensor], model: Any) -> None:
        """Weights, config, tokenizer and processor."""
        write_model(folder, weights, model)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """As they are stored."""
        return load_file(folder / MODEL)


OURS: ModelFiles = OurFiles()


def save_state(
    checkpoints: Checkpoints,
    step: int,
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: Mapping[str, Any],
    write_files: Callable[[Path], None] = lambda folder: None,
    heads: nn.Module | None = None,
    layout: ModelFiles = OURS,
) -> None:
    """Write the checkpoint of a step; called on all ranks, written by rank 0, failing on all ranks together.

    Args:
        checkpoints: of the run.
        step: how many steps are done.
        engine: that wrapped the model.
        model: the model itself, not what `wrap` returned.
        optimizer: over its parameters, and those of the heads.
        rest: JSON types.
        write_files: completes a folder that holds the model.
        heads: what trains with the model and belongs to none; None without any.
        layout: of the model's folder.
    """
    weights, adapters = split(model, model_state(engine, model))
    files = {OPTIMIZER: optimizer_state(engine, model, optimizer, heads), **({ADAPTERS: adapters} if adapters else {})}
    if heads is not None:
        files[HEADS] = model_state(engine, heads)
    state = {**rest, "schema": SCHEMA, "step": step}

    def fill(folder: Path) -> None:
        layout.write(folder, weights, model)
        write_files(folder)
        for name, tensors in files.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
            share(folder / name, folder)
        (folder / STATE).write_text(_json(state), encoding="utf-8")

    _on_first_rank(engine, lambda: checkpoints.write(step, fill))


def _on_first_rank(engine: Engine, write: Callable[[], None]) -> None:
    failure: Exception | None = None
    if engine.rank == 0:
        try:
            write()
        except (InputError, ResourceError) as error:
            failure = error
    failures = engine.sum(torch.tensor([float(failure is not None)], device=engine.device))
    if failure is not None:
        raise failure
    if failures.item():
        raise ResourceError("rank 0 could not write the checkpoint", "see its message")


def load_state(
    folder: Path,
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    heads: nn.Module | None = None,
    layout: ModelFiles = OURS,
) -> dict[str, Any]:
    """Put a verified checkpoint into the model, its heads and the optimizer; returns the rest of the state.

    Raises:
        CheckpointError: it was made by another model, or trained other groups.
    """
    _load_model(folder, engine, model, layout)
    if heads is not None:
        _load_heads(folder, engine, heads)
    moments = load_file(folder / OPTIMIZER)
    parameters = _named_parameters(model, heads)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for full_name, tensor in moments.items():
        name, key = full_name.rsplit("/", 1)
        if name not in parameters or id(parameters[name]) not in optimized:
            raise CheckpointError(
                f"cannot resume from {folder}", f"it trained {name}, this run does not", "use the same `trainable`"
            )
        parameter = parameters[name]
        like = tensor if tensor.dim() == 0 else parameter
        optimizer.state[parameter][key] = engine.part(tensor, like)
    return read_json(folder / STATE)


def _load_model(folder: Path, engine: Engine, model: nn.Module, layout: ModelFiles) -> None:
    """Copy all tensors into the model, but those that adapters are added to: they are there, and must fit."""
    stored = layout.read(folder)
    stored |= load_file(folder / ADAPTERS) if (folder / ADAPTERS).is_file() else {}
    own = dict(model.state_dict())
    _same_names(folder / MODEL, stored, map(plain_name, own))
    with torch.no_grad():
        for name, tensor in own.items():
            if not is_adapted(name):
                tensor.copy_(engine.part(stored[name], tensor))
    if any(map(is_adapted, own)):
        _same_start(folder, stored, split(model, model_state(engine, model))[0])


def _load_heads(folder: Path, engine: Engine, heads: nn.Module) -> None:
    stored = load_file(folder / HEADS) if (folder / HEADS).is_file() else {}
    own = dict(heads.state_dict())
    _same_names(folder / HEADS, stored, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(engine.part(stored[name], tensor))


def _same_start(folder: Path, stored: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    """Equal up to the rounding of another machine's products."""
    differ = [name for name in merged if not torch.allclose(stored[name], merged[name], rtol=1e-5, atol=1e-6)]
    if differ:
        why = f"its adapters were trained on another model: {differ[0]} differs"
        raise CheckpointError(f"cannot resume from {folder}", why, "use the model and the lora.alpha of its start")


def _same_names(file: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    differ = sorted(set(found) ^ set(wanted))
    if differ:
        why = f"{len(differ)} tensors differ, such as {', '.join(differ[:3])}"
        raise CheckpointError(f"{file} is of another model", why, "resume with the config the run was started with")


def _named_parameters(model: nn.Module, heads: nn.Module | None) -> dict[str, nn.Parameter]:
    """Those of the model by their names, those of the heads by theirs behind `heads.`."""
    own = {} if heads is None else {f"heads.{name}": parameter for name, parameter in heads.named_parameters()}
    return {**dict(model.named_parameters()), **own}


def model_state(engine: Engine, model: nn.Module) -> dict[str, Tensor]:
    """Name -> full tensor on the CPU."""
    return {name: engine.whole(tensor).contiguous() for name, tensor in model.state_dict().items()}


def optimizer_state(
    engine: Engine, model: nn.Module, optimizer: torch.optim.Optimizer, heads: nn.Module | None = None
) -> dict[str, Tensor]:
    """ "parameter/moment" -> full tensor on the CPU."""
    return {
        f"{name}/{key}": engine.whole(value).contiguous()
        for name, parameter in _named_parameters(model, heads).items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def write_model(folder: Path, weights: Mapping[str, Tensor], model: Any) -> None:
    """Weights, config, tokenizer and processor in our layout."""
    save_file(dict(weights), folder / MODEL, metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    config["architectures"] = [G2VLMForConditionalGeneration.__name__]
    (folder / "config.json").write_text(_json(config), encoding="utf-8")
    write_companions(folder, model.config)
    share(folder / MODEL, folder)


def share(file: Path, folder: Path) -> None:
    """Give a file of safetensors, which makes them for their owner alone, the mode of the folder's other files."""
    file.chmod((folder / "config.json").stat().st_mode)
