"""Comparisons behind `g2vlm convert --check`: tensors one by one, outputs of small models, public DINOv2 weights."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from g2vlm.config import G2VLMConfig
from g2vlm.convert.dinov2 import OURS, open_dinov2
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs
from g2vlm.weights import TensorSource

SMALL = 50_000_000


def differing_tensors(original: TensorSource, converted: TensorSource) -> list[str]:
    """Names of the original's tensors that the other lacks or holds with other bits, sorted.

    A tensor that was stored in a narrower type is compared after the same rounding.
    """
    return sorted(name for name in original.specs if not _same(original, converted, name))


def _same(original: TensorSource, converted: TensorSource, name: str) -> bool:
    spec = converted.specs.get(name)
    if spec is None or spec.shape != original.specs[name].shape:
        return False
    return _equal_bits(original.load(name).to(spec.dtype), converted.load(name))


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def is_small(source: TensorSource) -> bool:
    """Whether running the model twice takes seconds on a CPU."""
    return sum(math.prod(spec.shape) for spec in source.specs.values()) <= SMALL


@torch.no_grad()
def output_difference(first: tuple[G2VLMConfig, TensorSource], second: tuple[G2VLMConfig, TensorSource]) -> float:
    """Largest difference between two models' reconstructions of random views, in float32.

    The first model's weights are rounded to the second's storage type.
    """
    predictions = []
    for config, source in (first, second):
        stored = {name: source.load(name).to(spec.dtype) for name, spec in second[1].specs.items()}
        model = G2VLMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=stored, dtype=torch.float32
        )
        patch = config.geometry_encoder.patch_size
        images = torch.rand(2, 3, 3 * patch, 4 * patch, generator=torch.Generator().manual_seed(0))
        output = model(**recon_inputs(images, config, "cpu"), predict_global_points=config.heads.global_points)
        predictions.append(output.geometry[0])
    names = ("local_points", "cam_to_world", "global_points")
    pairs = [(getattr(predictions[0], name), getattr(predictions[1], name)) for name in names]
    return max((a - b).abs().max().item() for a, b in pairs if a is not None)


def compare_dinov2(source: TensorSource, path: Path) -> str:
    """Whether a checkpoint's geometry encoder equals public weights, in one sentence.

    The class token is compared together with its position, because timm stores only their sum; the mask token, which
    takes no part in the computation, is left out.
    """
    if f"{OURS}cls_token" not in source.specs:
        return "the checkpoint has no geometry encoder of its own"
    mine, public = _dinov2_parts(source), _dinov2_parts(open_dinov2(path)[1])
    differing = sorted(
        name.removeprefix(OURS)
        for name in mine.keys() | public.keys()
        if name not in mine or name not in public or not _equal_rounded(mine[name](), public[name]())
    )
    if differing:
        return f"the geometry encoder differs from {path} in {len(differing)} tensors: {', '.join(differing)}"
    return f"the geometry encoder equals {path} in all {len(mine)} tensors"


def _dinov2_parts(source: TensorSource) -> dict[str, Callable[[], Tensor]]:
    special = [f"{OURS}{name}" for name in ("mask_token", "cls_token", "position_embeddings")]
    _, cls, table = special
    names = [name for name in source.specs if name.startswith(OURS) and name not in special]
    parts: dict[str, Callable[[], Tensor]] = {name: partial(source.load, name) for name in names}
    parts["class token with its position"] = lambda: source.load(cls) + source.load(table)[:, :1]
    parts["patch positions"] = lambda: source.load(table)[:, 1:]
    return parts


def _equal_rounded(mine: Tensor, public: Tensor) -> bool:
    """Equal after rounding to the checkpoint's type; one unit in the last place for sums that were rounded twice."""
    if mine.shape != public.shape:
        return False
    unit = torch.finfo(mine.dtype).eps * public.float().abs().max()
    return bool((mine.float() - public.to(mine.dtype).float()).abs().max() <= unit)
