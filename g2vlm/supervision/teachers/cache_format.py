"""How a clip's targets are written down: small, checked, and read back within a stated error.

depth and points: float16 in units of the clip's median depth, which no outlier moves (relative error 2^-11);
confidence: 8 bits of its logarithm between the clip's least and largest (error of the logarithm: their distance / 510);
validity: one bit; cameras and scale: float32, exact; features: bfloat16. A depth beyond float16's range is written as
not valid.

Shapes: S views, H W pixels.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.shards import checksum
from g2vlm.supervision.targets import TeacherInfo, TeacherTargets
from g2vlm.supervision.teachers.network import positive

VERSION = 1
FIELDS = ("depth", "confidence", "valid", "cam_to_world", "intrinsics", "metric_scale", "points", "features")
DEFAULT_FIELDS = FIELDS[:6]
THUMBNAIL = 8
"""Frames are recognised by thumbnails of so many pixels a side, in 8 bits."""
TOLERANCE = 2
"""Of a thumbnail's values: other decoders may differ by so much."""
_LEAST_DEPTH, _LARGEST_DEPTH = 2.0**-14, 65504.0
_LEAST_CONFIDENCE = 1e-6


@dataclass(frozen=True, eq=False)
class Entry:
    """A clip in a shard.

    Args:
        tensors: name -> tensor, none for a clip that is not supervised.
        record: everything else, as JSON types.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor."""
        return checksum(self.tensors[name])

    def intact(self) -> bool:
        """Whether the tensors that are here, and the record, are those that were written."""
        sums = self.record["checksums"]
        return sums["record"] == _record_checksum(self.record) and all(
            sums.get(name) == self.checksum(name) for name in self.tensors
        )


def sealed(entry: Entry) -> Entry:
    """With checksums of every tensor and of the record."""
    sums = {name: entry.checksum(name) for name in entry.tensors}
    return Entry(entry.tensors, entry.record | {"checksums": sums | {"record": _record_checksum(entry.record)}})


def _record_checksum(record: dict[str, Any]) -> int:
    plain = {name: value for name, value in record.items() if name != "checksums"}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def key_of(clip: Clip, revision: str) -> str:
    """What a clip is found by: its name with its frames, its size, and the teacher's revision."""
    text = json.dumps([clip.name, [*clip.images.shape], revision])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def thumbnails(images: Tensor) -> Tensor:
    """(S, 3, 8, 8) uint8 of images (S, 3, *, *) in [0, 1]."""
    small = F.adaptive_avg_pool2d(images.float(), THUMBNAIL)
    return (255 * small).round().to(torch.uint8).cpu()


def require_fields(fields: Sequence[str]) -> tuple[str, ...]:
    """The names, in their own order.

    Raises:
        InputError: one is unknown.
    """
    wrong = [name for name in fields if name not in FIELDS]
    if wrong or not fields:
        raise InputError(f"cannot keep the fields {list(fields)}", "", f"known are {', '.join(FIELDS)}")
    return tuple(name for name in FIELDS if name in fields)


def encoded(clip: Clip, targets: TeacherTargets | None, fields: Sequence[str]) -> Entry:
    """A clip as it is stored; without targets it is stored as one that is not supervised."""
    tensors = {"thumbnails": thumbnails(clip.images)}
    record: dict[str, Any] = {"name": clip.name, "supervised": targets is not None}
    if targets is not None:
        targets = targets.detached().to("cpu")
        record |= {
            "num_views": targets.num_views,
            "size": [*targets.size],
            "info": asdict(targets.info),
            "features_normed": targets.features_normed,
            "confidence_kind": targets.confidence_kind,
        }
        tensors |= {name: tensor.contiguous() for name, tensor in _tensors(targets, fields).items()}
    return sealed(Entry(tensors, json.loads(json.dumps(record))))


def decoded(entry: Entry) -> TeacherTargets | None:
    """The targets of a stored clip; None if it is not supervised."""
    record, tensors = entry.record, entry.tensors
    if not record["supervised"]:
        return None
    size = (record["size"][0], record["size"][1])
    shape = (record["num_views"], *size)
    info = record["info"] | {
        "input_size": tuple(record["info"]["input_size"]),
        "view_ids": tuple(record["info"]["view_ids"]),
    }
    features = {
        int(name.removeprefix("features.")): tensor for name, tensor in tensors.items() if name.startswith("features.")
    }
    unit = tensors.get("unit")
    return TeacherTargets(
        num_views=record["num_views"],
        size=size,
        info=TeacherInfo(**info),
        depth=tensors["depth"].float() * unit if "depth" in tensors and unit is not None else None,
        confidence=_confidence(tensors) if "confidence" in tensors else None,
        valid=_unpacked(tensors["valid"], shape) if "valid" in tensors else None,
        cam_to_world=tensors.get("cam_to_world"),
        intrinsics=tensors.get("intrinsics"),
        points=tensors["points"].float() * unit if "points" in tensors and unit is not None else None,
        features=dict(sorted(features.items())) or None,
        features_normed=record["features_normed"],
        metric_scale=tensors.get("metric_scale"),
        confidence_kind=record["confidence_kind"],
    )


def _tensors(targets: TeacherTargets, fields: Sequence[str]) -> dict[str, Tensor]:
    """Name -> stored tensor of every wanted field that is known."""
    found: dict[str, Tensor] = {}
    for name in ("cam_to_world", "intrinsics", "metric_scale"):
        value = getattr(targets, name)
        if name in fields and value is not None:
            found[name] = value.float()
    valid = targets.valid
    if targets.depth is not None:
        unit, valid = _unit(targets.depth, valid)
        found["unit"] = unit
        if "depth" in fields:
            found["depth"] = torch.where(valid, targets.depth / unit, 0).half()
    elif targets.points is not None:
        found["unit"] = torch.ones(())
    if "valid" in fields and valid is not None:
        found["valid"] = torch.from_numpy(np.packbits(valid.numpy()))
    if "confidence" in fields and targets.confidence is not None:
        found |= _quantised(targets.confidence)
    if "points" in fields and targets.points is not None:
        found["points"] = (targets.points / found["unit"]).clamp(-_LARGEST_DEPTH, _LARGEST_DEPTH).nan_to_num(0).half()
    if "features" in fields:
        found |= {f"features.{block}": tensor.bfloat16() for block, tensor in (targets.features or {}).items()}
    return found


def _unit(depth: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """() median of the valid depth, 1 without any; and which pixels are valid and within float16 of it."""
    seen = positive(depth) if valid is None else valid & positive(depth)
    unit = depth[seen].float().median() if bool(seen.any()) else torch.ones(())
    scaled = depth / unit
    return unit, seen & (scaled >= _LEAST_DEPTH) & (scaled <= _LARGEST_DEPTH)


def _quantised(confidence: Tensor) -> dict[str, Tensor]:
    """8 bits of the logarithm, and its range (2,); what is no number counts as the least."""
    usable = confidence.isfinite() & (confidence > 0)
    log = torch.where(usable, confidence, _LEAST_CONFIDENCE).clamp_min(_LEAST_CONFIDENCE).log()
    low = log[usable].min() if bool(usable.any()) else log.min()
    high = log.max()
    step = (high - low).clamp_min(1e-12)
    steps = (255 * (log.clamp_min(float(low)) - low) / step).round().to(torch.uint8)
    return {"confidence": steps, "confidence_range": torch.stack([low, high])}


def _confidence(tensors: Mapping[str, Tensor]) -> Tensor:
    low, high = tensors["confidence_range"]
    return (low + (high - low) * tensors["confidence"].float() / 255).exp()


def _unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, H, W) bool of packed bits."""
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(flat.astype(bool)).view(shape)
