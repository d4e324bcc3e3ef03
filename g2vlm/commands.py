"""What the commands of `g2vlm` do, once their arguments are parsed."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from g2vlm import __version__
from g2vlm.checkpoint import DEMO_NAME, load_model, or_demo, read_config
from g2vlm.config import G2VLMConfig
from g2vlm.convert import convert as convert_checkpoint
from g2vlm.data.checks import CheckRules, check_source
from g2vlm.data.preview import contact_sheet, load_samples
from g2vlm.data.qa.heldout_v1 import heldout
from g2vlm.data.qa.preview import question_sheet, varied_items
from g2vlm.data.registry import build_source, detect_source
from g2vlm.data.types import SceneSource
from g2vlm.errors import CheckFailed, InputError
from g2vlm.export import check_output_folder
from g2vlm.images import SourceImage, geometry_size
from g2vlm.model.attention import backend_names
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.pipeline import Pipeline, load, read_sources
from g2vlm.processing import recon_sequence
from geometry.io.common import atomic_file

log = logging.getLogger(__name__)
disable_progress_bar()
QUESTIONS = "rooms_qa"  # the path that stands for the held-out questions
OPTIONAL = {
    "flash-attn": "flash", "xformers": "xformers", "deepspeed": "deepspeed", "peft": "lora", "av": "video",
    "viser": "view", "gguf": "gguf", "webdataset": "data", "tensorboard": "log",
}  # fmt: skip


def recon(args: Namespace) -> None:
    """Reconstruct photographs and write what was asked for."""
    check_output_folder(args.output, args.overwrite)
    sources = read_sources(args.images, args.max_views, args.skip_bad)
    if args.width is not None:
        geometry_size(sources[0].size, args.width)  # a wrong width is told before the weights are read
    if args.dry_run:
        print(_plan(sources, args))
        return
    pipeline = load(args.model, args.device, dtype_of(args.dtype))
    height, width = _view_size(sources, pipeline.model.config, args.width)
    log.info("reconstructing %d views at %dx%d on %s", len(sources), width, height, pipeline.model.device)
    scene = pipeline.reconstruct_sources(sources, width)
    for path in scene.export(args.output, args.formats, overwrite=args.overwrite):
        print(path)


def _view_size(sources: list[SourceImage], config: G2VLMConfig, width: int | None) -> tuple[int, int]:
    """(height, width) that views are brought to: `width` wide, or as wide as the model's config says."""
    if width is None:
        width = config.view_width
        log.info("views are brought to the model's width, %d pixels; choose another with --width", width)
    return geometry_size(sources[0].size, width)


def _plan(sources: list[SourceImage], args: Namespace) -> str:
    """What `recon` would do, from the config alone."""
    config = read_config(or_demo(args.model))
    size, patch = _view_size(sources, config, args.width), config.geometry_encoder.patch_size
    sequence = recon_sequence([torch.empty(len(sources), 3, *size, device="meta")], config)
    return "\n".join(
        [
            f"views    {len(sources)}, brought to {size[1]}x{size[0]}, {size[0] // patch} x {size[1] // patch} patches",
            f"tokens   {sequence.num_tokens} ({sequence.num_geometry} geometry)",
            f"output   {args.output}: {', '.join(args.formats)}",
        ]
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of a name on the command line."""
    return None if name is None else getattr(torch, name)


def convert(args: Namespace) -> None:
    """Convert a checkpoint; with --check, fail unless it converts back to the same tensors."""
    result = convert_checkpoint(
        args.source,
        args.destination,
        check=args.check,
        dtype=dtype_of(args.dtype),
        overwrite=args.overwrite,
        geometry_encoder=args.geometry_encoder,
        dinov2=args.dinov2,
        preset=args.preset,
    )
    print(result)


def info(args: Namespace) -> None:
    """Describe a model, by default the demo weights, or a saved scene."""
    source = or_demo(args.target)
    target = Path(source)
    if (target / "cameras.json").is_file() or (target / "scene.json").is_file():
        name = "cameras.json" if (target / "cameras.json").is_file() else "scene.json"
        print(_table(_scene_facts(json.loads((target / name).read_text(encoding="utf-8")))))
        return
    config = read_config(source)
    name = args.target or f"{DEMO_NAME} ({target})"
    print(_table({"model": name, **parameter_counts(config), **_config_facts(config)}))


def parameter_counts(config: G2VLMConfig) -> dict[str, str]:
    """Parameters of each part in millions, without allocating them."""
    with torch.device("meta"):
        model = G2VLMForConditionalGeneration(config)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        expert = next((e for e in ("semantic", "geometric") if f".{e}" in name), None)
        part = f"{expert} expert" if name.startswith("decoder") and expert else name.split(".")[0].replace("_", " ")
        parts[part] = parts.get(part, 0) + parameter.numel()
    parts["total"] = sum(parts.values())
    return {part: f"{count / 1e6:,.1f} M parameters" for part, count in parts.items()}


def _config_facts(config: G2VLMConfig) -> dict[str, str]:
    decoder, encoder = config.decoder, config.geometry_encoder
    return {
        "decoder": f"{decoder.num_layers} layers, width {decoder.hidden_size}, "
        f"{decoder.num_heads}/{decoder.num_kv_heads} heads of {decoder.head_dim}",
        "attention": f"views {config.geometry_attention}, semantic images {config.semantic_image_attention}, "
        f"positions {config.view_positions}, geometry sees {config.geometry_sees}",
        "encoders": f"{config.encoders}; DINOv2 windows {encoder.windows}",
        "normals": config.heads.normals,
        "fusion": "none" if config.fusion is None else f"{config.fusion.tokens} tokens of {config.fusion.source}",
        "views": f"{config.view_width} pixels wide unless another width is asked for",
        "conventions": "OpenCV camera axes, cam_to_world poses, one free scale per scene",
    }


def _scene_facts(facts: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items() if not isinstance(value, list | dict)} | {
        "views": str(len(facts.get("views", [])))
    }


def data_check(args: Namespace) -> None:
    """Check a data set and print what was found.

    Raises:
        CheckFailed: something is wrong with the data.
    """
    rules = CheckRules(args.max_bad, max_frames=args.max_frames, max_scenes=args.max_scenes)
    report = check_source(_source(args), rules)
    print(report.table())
    if report.failures:
        raise CheckFailed(f"the check of {args.path} failed", report.failures[0], "see the table")


def data_preview(args: Namespace) -> None:
    """Write a contact sheet of a data set."""
    if args.output.suffix.lower() != ".png" or (args.output.exists() and not args.overwrite):
        why = "it exists" if args.output.exists() else "a contact sheet is a .png"
        raise InputError(f"cannot write  {args.output}", why, "choose another name, or pass --overwrite")
    sheet = (
        _question_sheet(args)
        if args.path == QUESTIONS
        else contact_sheet(load_samples(_source(args), args.scenes, args.views))
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.output) as file:
        sheet.save(file, format="PNG")
    print(args.output)


def _question_sheet(args: Namespace) -> Image.Image:
    """Two held-out questions about each of some scenes, of as many tasks as possible."""
    if args.scenes < 1:
        raise InputError("nothing to show", f"{args.scenes} scenes", "ask for one at least")
    asked = list(islice(heldout(), args.scenes))
    return question_sheet(varied_items(asked, 2 * len(asked)))


def _source(args: Namespace) -> SceneSource:
    """The data that a command was pointed at."""
    if args.path == "rooms":
        return build_source("rooms")
    root = Path(args.path)
    name = args.dataset or detect_source(root)
    options = {} if args.depth is None else {"depth": args.depth}
    return build_source(name, root, **options)


def doctor(args: Namespace) -> None:
    """Report the installation and test it on a tiny model.

    Raises:
        CheckFailed: the self-test gave wrong numbers.
    """
    packages = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow", "roma", "safetensors")
    facts = {"python": f"{platform.python_version()} ({sys.executable})"}
    facts |= {"g2vlm": __version__} | {name: importlib.metadata.version(name) for name in packages}
    facts["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    facts["devices"] = ", ".join(_devices()) or "no GPU"
    facts["attention"] = ", ".join(backend_names())
    for package, extra in OPTIONAL.items():
        present = importlib.util.find_spec(package.replace("-", "_")) is not None
        facts[package] = "present" if present else f"absent (optional: pip install 'g2vlm[{extra}]')"
    facts["self-test"] = _self_test()
    print(_table(facts))


def _devices() -> list[str]:
    return [
        f"cuda:{i} {p.name} {p.total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
        for p in [torch.cuda.get_device_properties(i)]
    ]


def _self_test() -> str:
    """A tiny random model reconstructs random views through two attention backends; they must agree."""
    pipeline = Pipeline(load_model("tiny", dtype=torch.float32, device="cpu"), name="tiny")
    pixels = torch.rand(2, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    results = {}
    for backend in ("eager", "sdpa"):
        results[backend] = pipeline.predict(pixels, backend=backend).world_points
    error = (results["eager"] - results["sdpa"]).abs().max() / results["eager"].abs().max()
    if not error < 1e-4:
        raise CheckFailed("self-test failed", f"attention backends differ by {error:.1e}", "reinstall torch")
    return f"passed (two attention backends agree to {error:.0e})"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
