"""A stock Qwen-VL of transformers as a run loads and writes it: from a folder into another of the same kind."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from g2vlm.companions import PREPROCESSOR, PROCESSOR, TOKENIZER
from g2vlm.errors import CheckpointError, InputError
from g2vlm.semantic_images import FRAMES, MERGE, SemanticRule
from g2vlm.weights import WEIGHTS, Coverage, WeightFiles, read_json
from train.state import share

CONFIG = "config.json"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""`config.model_type` of what can be trained."""

GROUPS = {
    "vision_encoder": r"model\.visual\.(?!merger\.|deepstack_merger_list\.)",
    "merger": r"model\.visual\.merger\.",
    "deepstack_mergers": r"model\.visual\.deepstack_merger_list\.",
    "language_model": r"model\.language_model\.(?!embed_tokens\.)",
    "embeddings": r"model\.language_model\.embed_tokens\.",
    "lm_head": r"lm_head\.",
}
"""Group -> pattern that the names of its parameters start with."""

PROJECTIONS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({modules})"
"""What adapters are put on."""

COPIED = (*TOKENIZER, PREPROCESSOR, PROCESSOR, "video_preprocessor_config.json")
"""Files of a folder that training leaves as they are."""


def is_stock(source: Any) -> bool:
    """Whether a source is a folder of a model that can be trained here and is not ours."""
    config = Path(source) / CONFIG if isinstance(source, str | Path) else None
    return config is not None and config.is_file() and read_json(config).get("model_type") in FAMILIES


def load_stock(folder: Path) -> Any:
    """The model of a folder in float32, with torch's attention; nothing is downloaded and no code of the folder runs.

    Raises:
        CheckpointError: files are absent, damaged or of another architecture; every wrong tensor is listed.
    """
    WeightFiles(folder)  # refuses damaged files before anything is allocated
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises many kinds on damaged files
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"unusable checkpoint {folder}", reason, "copy its files again") from None
    model, found = loaded
    differ = {key: sorted(map(str, found[f"{key}_keys"])) for key in ("missing", "unexpected", "mismatched")}
    Coverage(**{key: tuple(names) for key, names in differ.items()}).require_complete(folder)
    return model


def load_processor(folder: Path, config: Any) -> Any:
    """The processor of a folder.

    Raises:
        CheckpointError: it is absent or damaged, or the model's placeholders are others.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        placeholders = (processor.image_token_id, processor.video_token_id)
    except Exception as error:  # transformers raises many kinds on damaged files
        reason = str(error).strip().splitlines()[0]
        fix = "put the checkpoint's own tokenizer and preprocessor files into the folder"
        raise CheckpointError(f"no usable processor in {folder}", reason, fix) from None
    largest = max(processor.tokenizer.get_vocab().values())
    wrong = placeholders != (config.image_token_id, config.video_token_id)
    if wrong or largest >= config.get_text_config().vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder} is not the model's",
            f"its placeholders are {placeholders} and its last id is {largest}",
            "put the checkpoint's own tokenizer files into the folder",
        )
    return processor


def image_rule(processor: Any, limits: SemanticRule | None) -> SemanticRule:
    """How images are prepared: as the processor says, within other limits of their area if there are any.

    Raises:
        InputError: the limits are unusable, or squash images.
        CheckpointError: the processor's patches are no Qwen-VL's.
    """
    images = processor.image_processor
    if (images.merge_size, images.temporal_patch_size) != (MERGE, FRAMES):
        why = f"merge_size {images.merge_size}, temporal_patch_size {images.temporal_patch_size}"
        raise CheckpointError("unusable image processor", why, f"both are {MERGE} in every Qwen-VL")
    if limits is not None and limits.squash is not None:
        why = "the processor of a stock model keeps the aspect ratio, and so would not see what was trained"
        raise InputError("data.chat.images.squash with a stock model", why, "set it to null")
    size = limits or SemanticRule(None, images.size["shortest_edge"], images.size["longest_edge"])
    return SemanticRule(
        None, size.min_pixels, size.max_pixels, images.patch_size, tuple(images.image_mean), tuple(images.image_std)
    )


def write_stock(folder: Path, model: Any, weights: Mapping[str, Tensor], origin: Path) -> None:
    """A folder like the one that the model was loaded from, with other weights, in one file.

    Args:
        folder: to write into.
        model: as it was loaded, whatever became of its modules.
        weights: name in the model -> full tensor, of every parameter.
        origin: the folder that the model was loaded from.
    """
    with torch.device("meta"):
        shell: Any = AutoModelForImageTextToText.from_config(model.config, dtype=torch.float32)
    own = dict(shell.named_parameters())  # without second names of tied weights
    shell.generation_config = model.generation_config
    shell._weight_conversions = getattr(model, "_weight_conversions", None)
    shell.save_pretrained(folder, state_dict={name: weights[name] for name in own}, max_shard_size="1TB")
    for name in COPIED:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


@dataclass(frozen=True)
class StockFiles:
    """The layout of a stock model's folder.

    Args:
        origin: the folder that the model was loaded from.
    """

    origin: Path

    def write(self, folder: Path, weights: Mapping[str, Tensor], model: Any) -> None:
        """As `write_stock`."""
        write_stock(folder, model, weights, self.origin)
        share(folder / WEIGHTS, folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Under the model's own names, a tied weight under both of its."""
        return load_stock(folder).state_dict()


def write_limits(folder: Path, rule: SemanticRule) -> None:
    """Let the processor of a folder show images in the sizes that the model was trained on."""
    for file in (folder / PREPROCESSOR, folder / PROCESSOR):
        values = read_json(file) if file.is_file() else {}
        if images := values if file.name == PREPROCESSOR else values.get("image_processor"):
            images["size"] = {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels}
            images |= {key: getattr(rule, key) for key in ("min_pixels", "max_pixels") if key in images}
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def recompute_activations(model: nn.Module) -> None:
    """Recompute the inside of every block in backward instead of keeping it."""
    newest, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, newest if hasattr(model, newest) else older)({"use_reentrant": False})
