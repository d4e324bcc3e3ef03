"""Special token ids of a checkpoint folder, from its own files: nothing is downloaded and no code of a folder runs."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from g2vlm.config import TokenIds
from g2vlm.errors import CheckpointError
from g2vlm.prompts import RECON_PROMPT, SPECIAL_TOKENS, open_tokenizer
from g2vlm.weights import read_json

log = logging.getLogger(__name__)

SPECIAL_IDS = "special_ids.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY_STEP = 64
"""Tables that grow have a multiple of so many rows: faster matrix products."""


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


@dataclass(frozen=True)
class Vocabulary:
    """Special tokens of an initial checkpoint, rows that its tables need, and tokenizer files to write, by name.

    Without files, the source's own are copied.
    """

    tokens: TokenIds
    size: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The vocabulary of a text model's folder, with our special tokens added where its tokenizer lacks them.

    Raises:
        CheckpointError: as `read_tokens`.
    """
    tokenizer = open_tokenizer(folder)
    if (folder / SPECIAL_IDS).is_file() or tokenizer is None or not _missing(tokenizer.backend_tokenizer):
        return Vocabulary(read_tokens(folder, vocab_size), vocab_size)
    return extended_vocabulary(tokenizer.backend_tokenizer, vocab_size, tokenizer.chat_template)


def extended_vocabulary(tokenizer: Tokenizer, vocab_size: int, chat_template: object) -> Vocabulary:
    """The vocabulary of a tokenizer to which our special tokens are added; tables grow to a multiple of 64 rows.

    Raises:
        CheckpointError: the tokenizer has no free ids after its own.
    """
    taken = set(tokenizer.get_vocab().values())
    added = _missing(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    vocabulary = tokenizer.get_vocab()
    if collisions := [token for token in added if vocabulary[token] in taken]:
        raise CheckpointError(
            "the tokenizer's ids have gaps",
            f"{', '.join(collisions)} would get ids of other tokens",
            f"add them to the tokenizer, or put {SPECIAL_IDS} into the folder",
        )
    ids = {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items()}
    prompt = tuple(tokenizer.encode(RECON_PROMPT, add_special_tokens=False).ids)
    needed = max(ids.values()) + 1
    size = vocab_size if needed <= vocab_size else -(-needed // VOCABULARY_STEP) * VOCABULARY_STEP
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS["eos"],
        "pad_token": SPECIAL_TOKENS["eos"],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    files = {"tokenizer.json": json.loads(tokenizer.to_str()), TOKENIZER_CONFIG: settings}
    return Vocabulary(TokenIds(**ids, recon_prompt=prompt), size, files)


def _missing(tokenizer: Tokenizer) -> list[str]:
    return [token for token in SPECIAL_TOKENS.values() if tokenizer.token_to_id(token) is None]


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
