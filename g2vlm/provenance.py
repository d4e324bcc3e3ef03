"""Where a number comes from: the commit of a checkout, and the exact weights of a model."""

import subprocess
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from g2vlm.weights import sha256, weight_files


def commit_of(root: Path) -> dict[str, Any] | None:
    """A checkout's commit and whether files differ from it; None outside a checkout."""
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"hash": commit.strip(), "dirty": bool(status.strip())}


def describe_checkpoint(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What identifies a loaded model: its name, the SHA-256 of each weight file (as `sha256sum` prints it), its config.

    A model with random weights has no file: `files` is empty.
    """
    source = model.config.name_or_path
    files = weight_files(source) if source and Path(source).is_dir() else []
    return {
        "name": name,
        "files": {file.name: sha256(file) for file in files},
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config.to_diff_dict(),
    }
