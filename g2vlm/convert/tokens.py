"""Special token ids of a checkpoint folder, from its own files: nothing is downloaded and no code of a folder runs."""

import logging
from pathlib import Path
from typing import Any

from g2vlm.config import TokenIds
from g2vlm.errors import CheckpointError
from g2vlm.prompts import RECON_PROMPT, SPECIAL_TOKENS, open_tokenizer
from g2vlm.weights import read_json

log = logging.getLogger(__name__)

SPECIAL_IDS = "special_ids.json"


def read_tokens(folder: Path, vocab_size: int) -> TokenIds:
    """The ids that a checkpoint folder decides.

    `special_ids.json` (bos, eos, vision_start, vision_end and optionally recon_prompt) goes before the tokenizer's
    files. Without either the ids are Qwen2-VL's.

    Raises:
        CheckpointError: the files are damaged, lack a special token, or name one outside the vocabulary.
    """
    tokenizer = open_tokenizer(folder)
    values: dict[str, Any] = {}
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        values = {name: vocabulary.get(token) for name, token in SPECIAL_TOKENS.items()}
        values["recon_prompt"] = tuple(tokenizer.encode(RECON_PROMPT, add_special_tokens=False))
    if (folder / SPECIAL_IDS).is_file():
        known = (*SPECIAL_TOKENS, "recon_prompt")
        values |= {key: value for key, value in read_json(folder / SPECIAL_IDS).items() if key in known}
    if not values.get("recon_prompt"):
        log.warning("no tokenizer in %s: reconstruction will use bos alone as its prompt", folder)
    tokens = TokenIds(**values)
    _check(folder, tokens, vocab_size)
    return tokens


def _check(folder: Path, tokens: TokenIds, vocab_size: int) -> None:
    ids = {name: getattr(tokens, name) for name in SPECIAL_TOKENS}
    ids |= {f"{RECON_PROMPT!r}, token {k}": token for k, token in enumerate(tokens.recon_prompt)}
    for name, token in ids.items():
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"unusable special tokens in {folder}",
                f"{name} is {token}; the vocabulary has {vocab_size} tokens",
                f"put the checkpoint's own tokenizer files, or {SPECIAL_IDS}, into the folder",
            )


def write_tokens(tokens: TokenIds) -> dict[str, Any]:
    """special_ids.json for a folder without a tokenizer."""
    values: dict[str, Any] = {name: getattr(tokens, name) for name in SPECIAL_TOKENS}
    return values | ({"recon_prompt": list(tokens.recon_prompt)} if tokens.recon_prompt else {})
