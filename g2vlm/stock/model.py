"""Stock Qwen-VLs of transformers as folders: which can be used here, and what is read from them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from g2vlm.errors import CheckpointError, InputError
from g2vlm.semantic_images import FRAMES, MERGE, SemanticRule
from g2vlm.weights import Coverage, WeightFiles, read_json

CONFIG = "config.json"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""`config.model_type` of what can be trained and looked into."""


def is_stock(source: Any) -> bool:
    """Whether a source is a folder of a model of one of FAMILIES."""
    config = Path(source) / CONFIG if isinstance(source, str | Path) else None
    return config is not None and config.is_file() and read_json(config).get("model_type") in FAMILIES


def load_stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder, with torch's attention; nothing is downloaded and no code of the folder runs.

    Raises:
        CheckpointError: files are absent, damaged or of another architecture; every wrong tensor is listed.
    """
    WeightFiles(folder)  # refuses damaged files before anything is allocated
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True,
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
