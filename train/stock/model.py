"""A stock Qwen-VL of transformers as a run writes it: a folder of the kind that it was loaded from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from g2vlm.companions import PREPROCESSOR, PROCESSOR, TOKENIZER
from g2vlm.semantic_images import SemanticRule
from g2vlm.stock.model import load_stock
from g2vlm.weights import WEIGHTS, read_json
from train.state import share

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
