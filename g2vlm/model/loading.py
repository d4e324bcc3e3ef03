"""What `from_pretrained` checks before and after transformers loads the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g2vlm.config import G2VLMConfig
from g2vlm.errors import CheckpointError
from g2vlm.weights import Coverage, WeightFiles, compare, read_json

if TYPE_CHECKING:
    from g2vlm.model.g2vlm import G2VLMForConditionalGeneration

CONFIG = "config.json"


def is_own_layout(folder: Path) -> bool:
    """Whether a folder says that it is in our layout."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == G2VLMConfig.model_type


def own_config(folder: Path) -> G2VLMConfig:
    """The config of a folder in our layout.

    Raises:
        CheckpointError: it is absent, damaged, of another model type, or has unknown keys or impossible values.
    """
    values = read_json(folder / CONFIG)
    if values.get("model_type") != G2VLMConfig.model_type:
        raise CheckpointError(
            f"{folder} is not a G2VLM checkpoint in our layout",
            f"model_type in {CONFIG} is {values.get('model_type')!r}",
            "convert it first: g2vlm convert SOURCE DESTINATION",
        )
    with possible_config(folder / CONFIG):
        config = G2VLMConfig(**values)
    if wrong := _wrong_types(config):
        raise CheckpointError(f"unusable {folder / CONFIG}", "; ".join(wrong), "restore the original file")
    return config


@contextmanager
def possible_config(source: object) -> Iterator[None]:
    """Around building something from a foreign config: what its values break becomes a CheckpointError."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = str(error) or f"its values do not go together ({type(error).__name__})"
        raise CheckpointError(f"unusable config of {source}", reason, "restore the original file") from None


def _wrong_types(config: G2VLMConfig) -> list[str]:
    """Values of the config's parts whose type is not the default's; a whole number may stand for a float."""
    parts = ("decoder", "semantic_encoder", "geometry_encoder", "heads", "tokens", "fusion")
    return [
        f"{part}.{field.name} is {value!r}, not of type {type(field.default).__name__}"
        for part in parts
        if getattr(config, part) is not None
        for field in fields(getattr(config, part))
        for value in [getattr(getattr(config, part), field.name)]
        if type(value) is not type(field.default) and not (type(value) is int and isinstance(field.default, float))
    ]


def check_folder(
    cls: "type[G2VLMForConditionalGeneration]", source: str | Path | None, options: dict[str, Any]
) -> None:
    """Check a local folder's config and headers before anything is allocated; other sources pass."""
    if source is None or not Path(source).is_dir() or options.get("variant"):
        return
    folder = Path(source, options.get("subfolder", ""))
    if (folder / "adapter_config.json").is_file():
        return
    config = options.get("config")
    if not isinstance(config, G2VLMConfig):
        config = own_config(folder)
    files = WeightFiles(folder)
    with possible_config(folder / CONFIG):
        specs = cls.tensor_specs(config)
    compare(specs, files.specs).require_complete(folder)


def check_report(info: dict[str, Any], source: object) -> None:
    """Turn transformers' loading report into an error that lists everything."""
    mismatched = [f"{name}: {list(found)}, expected {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    Coverage(
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(sorted(mismatched)),
    ).require_complete(source)
