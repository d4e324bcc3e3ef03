"""What every evaluation does before it begins: the model, where its numbers come from, where results go."""

import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from g2vlm.config import PRESETS
from g2vlm.errors import InputError
from g2vlm.pipeline import Pipeline, load
from g2vlm.provenance import commit_of, describe_checkpoint

log = logging.getLogger(__name__)
disable_progress_bar()
ROOT = Path(__file__).resolve().parents[1]


class Named(Protocol):
    """A model of transformers under the name that results give it."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def model(self) -> PreTrainedModel:
        """With its folder in `config.name_or_path`."""
        ...


def load_named(model: str | None, device: str, dtype: str | None) -> Pipeline:
    """The model, by default the demo weights, under the name that results give it; random weights are named so."""
    pipeline = load(model, device, None if dtype is None else getattr(torch, dtype))
    if model in PRESETS and not Path(model).is_dir():
        pipeline.name = f"{model} (RANDOM WEIGHTS)"
        log.warning("RANDOM WEIGHTS: the scores below are those of an untrained model")
    log.info("model %s", pipeline.name)
    return pipeline


def provenance_of(named: Named) -> dict[str, Any]:
    """The checkpoint and the commit that the numbers come from."""
    return {"checkpoint": describe_checkpoint(named.model, named.name), "commit": commit_of(ROOT)}


def require_positive(name: str, value: int | None) -> None:
    """Raise InputError unless an optional count is at least one."""
    if value is not None and value < 1:
        raise InputError(f"--{name.replace('_', '-')} must be at least 1", f"given {value}", "leave it out for all")


def output_folder(given: Path | None, name: str, root: Path = Path("runs")) -> Path:
    """Where results go: an absent or empty folder. Without a wish the first free of runs/NAME, runs/NAME-2, ...

    Raises:
        InputError: what was given has content or is no folder.
    """
    if given is not None:
        if given.exists() and not (given.is_dir() and not any(given.iterdir())):
            why = "it exists and is no empty folder; nothing was changed"
            raise InputError(f"will not overwrite  {given}", why, "choose another --output, or leave it out")
        return given
    number = 1
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder
