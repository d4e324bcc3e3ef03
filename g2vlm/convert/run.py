"""`convert`: find out what a source is, stream it into another layout, and check the result."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import g2vlm.convert.g2vlm_release as release
import g2vlm.convert.verify as verify
from g2vlm.companions import (
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    has_tokenizer,
    processor_config,
    qwen2_vl_rule,
    released_rule,
)
from g2vlm.config import G2VLMConfig
from g2vlm.convert.initial import GeometricInit, open_initial
from g2vlm.convert.keymap import Translated
from g2vlm.convert.qwen2_vl import is_qwen2_vl
from g2vlm.convert.tokens import SPECIAL_IDS, write_tokens
from g2vlm.errors import CheckFailed, CheckpointError, InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.model.loading import CONFIG, is_own_layout, own_config, possible_config
from g2vlm.semantic_images import SemanticRule
from g2vlm.staging import staged_folder
from g2vlm.weights import TensorSource, WeightFiles, cast, compare, storage_dtype, write_weights

log = logging.getLogger(__name__)

COMPANIONS = (*TOKENIZER, PREPROCESSOR, "generation_config.json", SPECIAL_IDS)
TOKENIZERS = ("tokenizer.json", "vocab.json", SPECIAL_IDS)
SHARD_BYTES = 5_000_000_000


@dataclass
class ConversionResult:
    """What was converted and what was checked; prints as a short table."""

    direction: str
    source: Path
    destination: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtype: str
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            ("converted", self.direction),
            ("from", str(self.source)),
            ("to", str(self.destination)),
            ("tensors", f"{self.num_tensors}, {self.num_parameters / 1e6:,.1f} M values"),
            ("stored", f"{self.dtype}, {self.num_bytes / 1e9:,.3f} GB"),
            *(("checked", check) for check in self.checks),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


@dataclass(frozen=True)
class Conversion:
    """One direction, ready to be written.

    Args:
        direction: in words.
        config: our config of the model.
        ours: its tensors under our names.
        written: its tensors under the destination's names.
        files: JSON files to write, by name.
        max_shard_bytes: as in `write_weights`.
        originals: label, the source's tensors under their own names, and how to get those from the written folder.
        reopen: our tensors again, from the written folder.
        notes: what the user should know.
    """

    direction: str
    config: G2VLMConfig
    ours: TensorSource
    written: TensorSource
    files: dict[str, dict[str, Any]]
    max_shard_bytes: int | None
    originals: list[tuple[str, TensorSource, Callable[[TensorSource], TensorSource]]]
    reopen: Callable[[Path], tuple[G2VLMConfig, TensorSource]]
    notes: list[str]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    check: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    geometry_encoder: str | Path | None = None,
    dinov2: str | Path | None = None,
    geometric_init: GeometricInit = "random",
    seed: int = 0,
) -> ConversionResult:
    """Convert a checkpoint folder; what the source is decides the direction.

    Released layout -> ours; ours -> released layout; a Qwen2-VL with a DINOv2 -> an initial checkpoint in our layout.
    Tensors are streamed one at a time into a temporary folder that is renamed at the end.

    Args:
        source: the checkpoint.
        destination: the folder to make.
        check: convert back and compare every tensor with the source, and the outputs if the model is small.
        dtype: storage precision; by default each tensor keeps its own.
        overwrite: replace a checkpoint folder that is not empty.
        geometry_encoder: the DINOv2 of an initial checkpoint.
        dinov2: public DINOv2 weights to compare the checkpoint's with.
        geometric_init: how an initial checkpoint's geometric expert starts.
        seed: of an initial checkpoint's random tensors.

    Raises:
        CheckpointError: the source is damaged, incomplete, or does not fit the other layout.
        InputError: the destination is taken, or an argument does not go with the source.
        CheckFailed: what was written differs from the source; it was removed again.
    """
    source, destination = Path(source), Path(destination)
    if source.resolve() == destination.resolve():
        raise InputError("source and destination are the same folder", str(source), "choose another destination")
    plan = _plan(source, geometry_encoder, geometric_init, seed)
    specs = cast(plan.written.specs, dtype)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    result = ConversionResult(
        direction=plan.direction,
        source=source,
        destination=destination,
        num_tensors=len(specs),
        num_parameters=sum(torch.Size(spec.shape).numel() for spec in specs.values()),
        num_bytes=num_bytes,
        dtype=" and ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})),
        notes=plan.notes,
    )
    if dinov2 is not None:
        result.checks.append(verify.compare_dinov2(plan.ours, Path(dinov2)))
    with staged_folder(destination, overwrite, num_bytes) as staging:
        write_weights(staging, plan.written, dtype, plan.max_shard_bytes)
        _write_companions(plan, source, staging, storage_dtype(specs))
        if check:
            result.checks += _check(plan, staging)
    return result


def _plan(source: Path, geometry_encoder: str | Path | None, geometric_init: GeometricInit, seed: int) -> Conversion:
    if not source.is_dir():
        raise InputError(f"no folder {source}", "there is nothing to convert", "give a checkpoint folder")
    known = is_own_layout(source) or release.is_release(source)
    if not known and is_qwen2_vl(source):
        if geometry_encoder is None:
            raise InputError(
                f"{source} holds a Qwen2-VL", "its geometry encoder must come from a DINOv2", "pass --geometry-encoder"
            )
        return _from_public(source, Path(geometry_encoder), geometric_init, seed)
    if geometry_encoder is not None:
        raise InputError(
            f"{source} has a geometry encoder of its own", "only a Qwen2-VL takes another", "drop --geometry-encoder"
        )
    if is_own_layout(source):
        return _to_release(source)
    if release.is_release(source):
        return _from_release(source)
    raise CheckpointError(
        f"no known checkpoint in {source}",
        "it is neither in our layout, nor in the released one, nor a Qwen2-VL",
        "give the folder that holds the checkpoint's config files",
    )


def _own_files(config: G2VLMConfig, source: Path, rule: SemanticRule) -> dict[str, dict[str, Any]]:
    config.architectures = [G2VLMForConditionalGeneration.__name__]
    processor = {PROCESSOR: processor_config(config, rule)} if has_tokenizer(source) else {}
    return {CONFIG: config.to_diff_dict(), **processor}


def _from_release(source: Path) -> Conversion:
    config, ours = release.open_release(source)
    keymap = release.KEYMAP
    return Conversion(
        direction="released layout -> ours",
        config=config,
        ours=ours,
        written=ours,
        files=_own_files(config, source, released_rule(source)),
        max_shard_bytes=SHARD_BYTES,
        originals=[("tensors", WeightFiles(source), lambda w: Translated(w, keymap.to_theirs(w.specs)))],
        reopen=_reopen_own,
        notes=[] if config.tokens.recon_prompt else ["no tokenizer: reconstruction will use bos alone as its prompt"],
    )


def _to_release(source: Path) -> Conversion:
    config, ours = _reopen_own(source)
    keymap = release.KEYMAP
    files: dict[str, dict[str, Any]] = release.write_config(config)
    if not any((source / name).is_file() for name in TOKENIZERS):
        files[SPECIAL_IDS] = write_tokens(config.tokens)
    lost = release.lost_settings(config)
    return Conversion(
        direction="our layout -> the released one",
        config=config,
        ours=ours,
        written=Translated(ours, keymap.to_theirs(ours.specs)),
        files=files,
        max_shard_bytes=None,  # the released code reads a single file
        originals=[("tensors", ours, lambda w: Translated(w, keymap.to_ours(w.specs)))],
        reopen=release.open_release,
        notes=[f"the released layout does not store {setting}: outputs will differ" for setting in lost],
    )


def _from_public(source: Path, dinov2: Path, geometric_init: GeometricInit, seed: int) -> Conversion:
    initial = open_initial(source, dinov2, geometric_init, seed)
    keymap = initial.qwen.keymap
    return Conversion(
        direction="Qwen2-VL and DINOv2 -> an initial checkpoint in our layout",
        config=initial.config,
        ours=initial.source,
        written=initial.source,
        files=_own_files(initial.config, source, qwen2_vl_rule(source)),
        max_shard_bytes=SHARD_BYTES,
        originals=[
            ("Qwen2-VL tensors", initial.qwen.files, lambda w: Translated(w, keymap.to_theirs(w.specs))),
            ("DINOv2 tensors", initial.dinov2, lambda w: w),
        ],
        reopen=_reopen_own,
        notes=[f"untrained: geometric expert {geometric_init}, geometry heads random, seed {seed}"],
    )


def _reopen_own(folder: Path) -> tuple[G2VLMConfig, TensorSource]:
    config, files = own_config(folder), WeightFiles(folder)
    with possible_config(folder):
        specs = G2VLMForConditionalGeneration.tensor_specs(config)
    compare(specs, files.specs).require_complete(folder)
    return config, files


def _write_companions(plan: Conversion, source: Path, staging: Path, dtype: torch.dtype) -> None:
    """Config files, and the tokenizer's and preprocessor's files as they are."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    for name, values in plan.files.items():
        stored = {"dtype": str(dtype).removeprefix("torch.")} if name == CONFIG else {}
        text = json.dumps({**values, **stored}, indent=2, sort_keys=name == CONFIG) + "\n"
        (staging / name).write_text(text, encoding="utf-8")


def _check(plan: Conversion, folder: Path) -> list[str]:
    """Compare what lies on the disk with the source.

    Raises:
        CheckFailed: with every differing tensor.
    """
    written = WeightFiles(folder)
    checks = []
    for label, original, back in plan.originals:
        if differing := verify.differing_tensors(original, back(written)):
            raise CheckFailed(
                f"the {label} do not convert back to the source's values",
                f"{len(differing)} differ: {', '.join(differing)}",
                "nothing was written; please report this",
            )
        checks.append(f"{len(original.specs)} {label} convert back to equal values")
    return [*checks, _check_outputs(plan, folder)]


def _check_outputs(plan: Conversion, folder: Path) -> str:
    config, reopened = plan.reopen(folder)
    if release.lost_settings(plan.config) != release.lost_settings(config):
        return "outputs not compared: the destination cannot store every setting"
    if not verify.is_small(reopened):
        return "outputs not compared: the model is too large for a quick run"
    if error := verify.output_difference((plan.config, plan.ours), (config, reopened)):
        raise CheckFailed(
            "the converted model computes other outputs than the source",
            f"largest difference {error:.1e}",
            "nothing was written; please report this",
        )
    return "identical reconstruction of two random views"
