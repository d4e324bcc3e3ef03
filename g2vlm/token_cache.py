"""Geometry tokens on disk: made once by a frozen model, read in every epoch (VLM-3R's training does the same).

A clip is found by its name, which says the video and its frames. The folder says which model made the tokens and how
it prepared the images, and each clip of what size they were: tokens of another clip, of other frames or of images
prepared otherwise are an error, never a silent miss.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from g2vlm.errors import CheckpointError, InputError
from g2vlm.geometry_tokens import Clip, GeometryTokens, GeometryTokenSource
from g2vlm.shards import SHARD_BYTES, Shards, ShardWriter


class CachedTokens:
    """What a source once said, from a folder that `write_tokens` made.

    Args:
        root: the folder.
        made_by: what must have made them, as far as it is given, for instance {"preprocessing": hash}.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or holds something else than geometry tokens.
        InputError: something else made them.
    """

    online = False

    def __init__(self, root: Path, made_by: Mapping[str, Any] | None = None):
        self.shards = Shards(Path(root), made_by)
        if "token_dim" not in self.shards.made_by:
            raise CheckpointError(
                f"{root} holds no geometry tokens", "its manifest says no token_dim", "check the folder"
            )

    @property
    def token_dim(self) -> int:
        """C."""
        return self.shards.made_by["token_dim"]

    def tokens(self, clip: Clip) -> GeometryTokens:
        """As in the protocol.

        Raises:
            InputError: tokens of this clip were never made, or of another number or size of its frames.
        """
        facts = self.shards.facts(clip.name)
        kept, asked = (facts["frames"], *facts["size"]), (len(clip.images), *clip.images.shape[-2:])
        if kept != asked:
            why = "tokens of {} frames of {} x {} are kept, asked are {} of {} x {} (H x W)".format(*kept, *asked)
            raise InputError(f"other frames of clip {clip.name!r}", why, "take the same frames, or make new tokens")
        tensors = self.shards.load(clip.name)
        rows, columns = facts["grid"]
        return GeometryTokens(
            tensors.get("patches"), tensors.get("camera"), (rows, columns), facts["is_metric"], facts["layer"]
        )


def write_tokens(
    folder: Path,
    source: GeometryTokenSource,
    clips: Iterable[Clip],
    made_by: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Ask a source about clips and keep its tokens; clips that are there already are passed over.

    Args:
        folder: made if missing.
        source: asked about one clip at a time.
        clips: with names of their own.
        made_by: JSON values that say which model with which weights, and a hash of how it prepares images.
        dtype: to store; by default as they come.
        shard_bytes: of a file.

    Returns:
        How many clips were added.

    Raises:
        InputError: the folder holds tokens that something else made, or a clip has no name.
    """
    made, stored = 0, "as computed" if dtype is None else str(dtype).removeprefix("torch.")
    with ShardWriter(folder, {**made_by, "token_dim": source.token_dim, "dtype": stored}, shard_bytes) as writer:
        for clip in clips:
            if not clip.name:
                raise InputError(
                    "a clip without a name", "its tokens could not be found again", "name video and frames"
                )
            if clip.name in writer:
                continue
            tokens = source.tokens(clip)
            kinds = {"patches": tokens.patches, "camera": tokens.camera}
            facts = {
                "frames": tokens.num_frames,
                "size": list(clip.images.shape[-2:]),
                "grid": list(tokens.grid),
                "is_metric": tokens.is_metric,
                "layer": tokens.layer,
            }
            writer.add(
                clip.name, {k: t if dtype is None else t.to(dtype) for k, t in kinds.items() if t is not None}, facts
            )
            made += 1
    return made
