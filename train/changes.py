"""How a run may differ from the checkpoint that it goes on from: in housekeeping, in length, and where it says so."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from g2vlm.errors import InputError
from train.config import RunConfig, known_keys, plain

log = logging.getLogger(__name__)

FREE = (
    *(
        f"runtime.{key}"
        for key in (
            "output", "resume", "changes", "engine", "device", "workers", "gradient_checkpointing", "log_every",
            "checkpoint_every", "validate_every", "validation_steps", "keep", "tensorboard",
        )
    ),
    *(f"guards.{key}" for key in ("window", "max_dropped_share", "max_dropped_in_a_row", "max_bad_scenes_share")),
    "data.validation",
    "data.chat.validation",
)  # fmt: skip
"""Keys that do not change what the optimizer does, or only when it is stopped."""
STEPS = "runtime.steps"
ABSENT = "absent"


def check_changes(checkpoint: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to go on from a checkpoint with another config; a longer run and `runtime.changes` are allowed and told.

    Args:
        checkpoint: its folder, for the message.
        saved: the config that it holds, as JSON types.
        config: the one asked for.

    Raises:
        InputError: keys differ that change the training; each is named with both values.
    """
    refused = []
    for key, (old, new) in differences(saved, plain(config)).items():
        if key == STEPS and new > old:
            log.info("%s is %s, was %s: the schedule is that of the longer run from here on", key, new, old)
        elif _within(key, config.runtime.changes):
            log.warning("%s is %s, was %s, as runtime.changes allows", key, _text(new), _text(old))
        elif not _within(key, FREE):
            refused.append((key, f"{key} is {_text(new)}, was {_text(old)}"))
    if refused:
        raise InputError(
            f"cannot go on from {checkpoint} with another config",
            "; ".join(text for _, text in refused),
            f"use the old values; or, if meant, --runtime.changes '[{', '.join(key for key, _ in refused)}]'; "
            f"or start a new run from its weights: --model {checkpoint}",
        )


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, asked value) where they differ; `ABSENT` stands for a key that one of them lacks.

    A field that did not exist yet when the config was saved counts as saved with its default.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(asked))
    added = {key for key in new.keys() & set(known_keys()) if not any(_within(given, [key]) for given in old)}
    old |= {key: value for key, value in _leaves(plain(RunConfig())) if key in added}
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _within(key: str, parents: Iterable[str]) -> bool:
    """Whether a key is one of these or lies below one."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
