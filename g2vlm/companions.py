"""What lies beside the weights of a model in our layout: its tokenizer and its processor."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from g2vlm.config import EMBEDDED_TOKENS, G2VLMConfig, VisionTowerConfig
from g2vlm.errors import CheckpointError, InputError
from g2vlm.processor import G2VLMProcessor, processor_fields
from g2vlm.prompts import EMBEDDED, ChatTokenizer
from g2vlm.semantic_images import MIN_PIXELS, SemanticRule
from g2vlm.weights import read_json

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def write_companions(folder: Path, config: G2VLMConfig) -> None:
    """Tokenizer and processor for weights that are saved in a folder.

    They are those of the folder that the model was loaded from; without any there, the embedded ones for a model that
    speaks their vocabulary, and none for another.

    Raises:
        CheckpointError: the preprocessor's file of a folder in the released layout is damaged.
    """
    origin = Path(config.name_or_path or "")
    if config.name_or_path and has_tokenizer(origin):
        rule = released_rule(origin)
    elif config.tokens == EMBEDDED_TOKENS and config.vocab_size >= len(ChatTokenizer.embedded().tokenizer):
        origin, rule = EMBEDDED, preset_rule(config)
    else:
        return
    copy_tokenizer(origin, folder)
    if (origin / PROCESSOR).is_file():
        shutil.copyfile(origin / PROCESSOR, folder / PROCESSOR)
    else:
        text = json.dumps(processor_config(config, rule), indent=2, sort_keys=True) + "\n"
        (folder / PROCESSOR).write_text(text, encoding="utf-8")


def has_tokenizer(folder: Path) -> bool:
    """Whether `ChatTokenizer.open` finds one."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def copy_tokenizer(origin: Path, folder: Path) -> None:
    """The tokenizer's files as they are."""
    for name in TOKENIZER:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def processor_config(config: G2VLMConfig, rule: SemanticRule) -> dict[str, Any]:
    """What processor_config.json of a model holds."""
    return {"processor_class": G2VLMProcessor.__name__, **processor_fields(config, rule)}


def preset_rule(config: G2VLMConfig) -> SemanticRule:
    """Image size of the presets: the aspect ratio kept, at most the area of a square as wide as the views."""
    return SemanticRule.native(max_pixels=max(config.view_width**2, MIN_PIXELS)).for_tower(config.semantic_encoder)


def released_rule(folder: Path) -> SemanticRule:
    """The released code's squash to 768 x 768, with the limits and normalisation of a folder's image processor.

    Raises:
        CheckpointError: its file is damaged.
    """
    return _as_stored(folder, SemanticRule.official())


def stock_rule(folder: Path, tower: VisionTowerConfig) -> SemanticRule:
    """The dynamic resolution of a stock Qwen-VL, with the limits and normalisation of its folder's image processor.

    Raises:
        CheckpointError: its file is damaged.
    """
    return _as_stored(folder, SemanticRule.native().for_tower(tower))


def _as_stored(folder: Path, rule: SemanticRule) -> SemanticRule:
    """Limits are stored as min_pixels and max_pixels, or by newer versions as the edges of `size`."""
    file = folder / PREPROCESSOR
    values = read_json(file) if file.is_file() else {}
    size = values.get("size") or {}
    try:
        return replace(
            rule,
            min_pixels=values.get("min_pixels") or size.get("shortest_edge") or rule.min_pixels,
            max_pixels=values.get("max_pixels") or size.get("longest_edge") or rule.max_pixels,
            mean=values.get("image_mean") or rule.mean,
            std=values.get("image_std") or rule.std,
        )
    except (InputError, AttributeError) as error:
        raise CheckpointError(f"unusable {file}", str(error), "copy the file again") from None
