"""GeoVR: a camera from a token per frame, a scale from a token per clip, depth and aligned features from four layers.

Heads read the hidden states of any backbone; the losses are in train/objectives/geovr.py. Shapes: T frames of a clip,
h w tokens of a frame, d their width, H W pixels of the targets' maps, C width of a teacher's features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from g2vlm.sequence import Grid
from g2vlm.supervision.aux_tokens import AuxTokens
from g2vlm.supervision.backbones.base import Tapped, Taps, clip
from g2vlm.supervision.base import ClipShape, Fit, Heads, Supervision
from g2vlm.supervision.dense_head import DensePrediction, DepthHeadKind, DPTWidths, depth_head
from g2vlm.supervision.heads import CameraHead, FeatureAlignmentHead, ScaleHead
from g2vlm.supervision.layers import proportional_layers
from geometry.losses.features import resize_to_grid

TermName = Literal["camera", "depth", "scale", "alignment"]
TeacherHalf = Literal["frame", "global", "both"]
VGGT_BLOCKS, VGGT_DEPTH = (4, 11, 17, 23), 24
LEAST_TAN = 1e-6  # of half a predicted field of view, so that a focal length is finite


@dataclass(frozen=True)
class GeoVRHeads:
    """The heads; defaults are the released code's.

    Args:
        terms: which of camera, depth, scale and alignment there are; in training, those of them that have a weight.
        depth_head: dense (DPT body, pixel shuffle: the published one), dpt or mlp (GeoVR's Table 5).
        patch_size: pixels per side of an output patch of dense and mlp: 28 for VGGT and DA3, 32 for VGGT-Omega.
        predict_confidence: the depth head also predicts one (the paper; the released head does not).
        depth_layers: the four hidden states that depth is read from, shallow to deep; by default those at the relative
            depths of VGGT's blocks 4, 11, 17, 23 of 24.
        alignment_blocks: the teacher's 0-based blocks to compare with; by default all that it gives.
        alignment_layers: the hidden states that are compared, one per block; by default those at its relative depth.
        teacher_half: of the channels of the features as the teacher gives them: frame, the first half; global, the
            second; both. VGGT's adapter gives the frame half already (released), unless its option half says otherwise.
        teacher_pool: side of the blocks of the features' cells whose mean is compared: 1 or 2. VGGT's and DA3's
            adapters give means of 2 x 2 patches already (released), unless their option pool says otherwise (eq. 5: 1).
        camera_dim: width of the camera head.
        scale_dim: width of the scale head.
        dpt_levels: channels of the levels of dense and dpt.
        dpt_dim: channels of their fused map.
        mlp_dim: width of the mlp depth head.
        probe_std: standard deviation of the first probe tokens (released: 1).
    """

    terms: tuple[TermName, ...] = ("camera", "depth", "scale", "alignment")
    depth_head: DepthHeadKind = "dense"
    patch_size: int = 28
    predict_confidence: bool = False
    depth_layers: tuple[int, int, int, int] | None = None
    alignment_blocks: tuple[int, ...] | None = None
    alignment_layers: tuple[int, ...] | None = None
    teacher_half: TeacherHalf = "both"
    teacher_pool: Literal[1, 2] = 1
    camera_dim: int = 1536
    scale_dim: int = 512
    dpt_levels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    dpt_dim: int = 256
    mlp_dim: int = 1024
    probe_std: float = 0.02


class GeoVRPrediction(NamedTuple):
    """What the heads say about one clip, in float32; None or empty for terms that are not there.

    Args:
        camera: (T, 9) world-to-camera pose encodings, the world being the first camera.
        depth: (T, H, W), positive.
        confidence: (T, H, W) of the depth, above 1.
        scale: () metres per unit of the others.
        features: block of the teacher -> (T, rows, columns, C).
    """

    camera: Tensor | None
    depth: Tensor | None
    confidence: Tensor | None
    scale: Tensor | None
    features: dict[int, Tensor]


class Maps(NamedTuple):
    """What is predicted from the patches of frames: as in `GeoVRPrediction`, T frames of one or several clips."""

    depth: Tensor | None = None
    confidence: Tensor | None = None
    features: dict[int, Tensor] = {}  # noqa: RUF012  (never changed)

    def split(self, counts: Sequence[int]) -> "list[Maps]":
        """The maps of each clip, of `counts` frames."""
        nothing = [None] * len(counts)
        depth, confidence = (
            nothing if maps is None else maps.split([*counts]) for maps in (self.depth, self.confidence)
        )
        features = {block: maps.split([*counts]) for block, maps in self.features.items()}
        return [
            Maps(depth[i], confidence[i], {block: parts[i] for block, parts in features.items()})
            for i in range(len(counts))
        ]


class GeoVRHeadModules(Heads):
    """The heads behind one call: cameras and scales of all clips at once, maps of all clips of one size at once."""

    def __init__(self, config: GeoVRHeads, fit: Fit):
        super().__init__()
        terms, width = config.terms, fit.width
        self.depth_layers = depth_layers(config, fit) if "depth" in terms else ()
        self.aligned = aligned_layers(config, fit) if "alignment" in terms else {}
        self.patch_size = 1 if config.depth_head == "dpt" else config.patch_size
        self.teacher_pool = config.teacher_pool
        self.camera = CameraHead(width, config.camera_dim) if "camera" in terms else None
        self.scale = ScaleHead(width, config.scale_dim) if "scale" in terms else None
        self.depth = None
        if self.depth_layers:
            self.depth = depth_head(
                config.depth_head,
                width,
                config.patch_size,
                confidence=config.predict_confidence,
                widths=DPTWidths(config.dpt_levels, config.dpt_dim),
                mlp_dim=config.mlp_dim,
            )
        self.alignment = nn.ModuleList(FeatureAlignmentHead(width, compared_dim(config, fit)) for _ in self.aligned)

    def forward(self, tapped: Tapped, shapes: Sequence[ClipShape | None]) -> tuple[GeoVRPrediction | None, ...]:
        """As in `Heads`.

        Raises:
            ValueError: a clip without frames, or with frames of several sizes.
        """
        known = [i for i, shape in enumerate(shapes) if shape is not None]
        cameras: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        if self.camera is not None:
            assert tapped.camera is not None
            counts = [len(tapped.frames[i]) for i in known]
            predicted = self.camera(torch.cat([tapped.camera[i] for i in known]))
            cameras = dict(zip(known, predicted.split(counts), strict=True))
        if self.scale is not None:
            assert tapped.scale is not None
            scales = dict(zip(known, self.scale(torch.cat([tapped.scale[i] for i in known])), strict=True))
        maps = self._maps(tapped, shapes)
        return tuple(
            GeoVRPrediction(cameras.get(i), maps[i].depth, maps[i].confidence, scales.get(i), maps[i].features)
            if i in maps
            else None
            for i in range(len(shapes))
        )

    def _maps(self, tapped: Tapped, shapes: Sequence[ClipShape | None]) -> dict[int, Maps]:
        """Of every clip that has a shape, by its place in the batch."""
        alike: dict[tuple[tuple[Grid, ...], ClipShape], list[int]] = {}
        for i, shape in enumerate(shapes):
            if shape is not None:
                alike.setdefault((tapped.frames[i][:1], shape), []).append(i)
        found: dict[int, Maps] = {}
        for (_, shape), members in alike.items():
            layers = {
                layer: torch.cat([clip(tapped.hidden[layer][i], tapped.frames[i]) for i in members])
                for layer in {*self.depth_layers, *self.aligned.values()}
            }
            counts = [len(tapped.frames[i]) for i in members]
            found |= dict(zip(members, self._maps_alike(layers, shape).split(counts), strict=True))
        return found

    def _maps_alike(self, layers: dict[int, Tensor], shape: ClipShape) -> Maps:
        """Of frames whose tokens are (F, h, w, d) in every layer."""
        depth, features = None, {}
        if self.depth is not None:
            depth = self._depth([layers[layer] for layer in self.depth_layers], shape.size)
        if self.aligned:
            grid = pooled_grid(shape.feature_grid or (1, 1), self.teacher_pool)  # heads of a clip without features too
            heads = zip(self.aligned.items(), self.alignment, strict=True)
            features = {block: head(layers[layer], grid) for (block, layer), head in heads}
        return Maps(
            None if depth is None else depth.values[..., 0], None if depth is None else depth.confidence, features
        )

    def _depth(self, layers: Sequence[Tensor], size: tuple[int, int]) -> DensePrediction:
        """Depth of `size`; where its sides are no multiples of the patch, that of the next larger ones, resized."""
        assert self.depth is not None
        rows, columns = (-(-side // self.patch_size) * self.patch_size for side in size)
        depth = self.depth(layers, (rows, columns))
        if (rows, columns) == size:
            return depth
        confidence = None if depth.confidence is None else resize_to_grid(depth.confidence[..., None], size)[..., 0]
        return DensePrediction(resize_to_grid(depth.values, size), confidence)


class GeoVR(Supervision):
    """What GeoVR adds to a model in training: probe tokens for cameras and scale, and the heads.

    Args:
        config: of the heads.
        fit: what they are built for; `features` is needed for the alignment alone.

    Raises:
        ValueError: no terms, or an alignment with blocks, layers or channels that do not fit the teacher's features.
    """

    def __init__(self, config: GeoVRHeads, fit: Fit):
        if not config.terms:
            raise ValueError("GeoVR without terms; name at least one of camera, depth, scale, alignment")
        camera, scale = "camera" in config.terms, "scale" in config.terms
        aux = AuxTokens(fit.width, config.probe_std, camera=camera, scale=scale) if camera or scale else None
        heads = GeoVRHeadModules(config, fit)
        super().__init__(config, fit, heads, aux)
        self._blocks = tuple(heads.aligned)
        self._taps = Taps(tuple(sorted({*heads.depth_layers, *heads.aligned.values()})))

    @property
    def taps(self) -> Taps:
        """The layers of depth and alignment."""
        return self._taps

    @property
    def blocks(self) -> tuple[int, ...]:
        """The teacher's blocks whose features are compared."""
        return self._blocks


def depth_layers(config: GeoVRHeads, fit: Fit) -> tuple[int, ...]:
    """The four hidden states that depth is read from."""
    return config.depth_layers or proportional_layers(VGGT_BLOCKS, VGGT_DEPTH, fit.num_layers)


def aligned_layers(config: GeoVRHeads, fit: Fit) -> dict[int, int]:
    """Block of the teacher -> hidden state that it is compared with (GeoVR 3.6).

    Raises:
        ValueError: the teacher gives no features, not those of a block, or layers that are not one per block.
    """
    if fit.features is None:
        raise ValueError("GeoVR compares features, and the teacher gives none; leave `alignment` out of the terms")
    blocks = fit.features.blocks if config.alignment_blocks is None else config.alignment_blocks
    absent = sorted({*blocks} - {*fit.features.blocks})
    if absent or not blocks:
        raise ValueError(f"alignment_blocks: {absent or 'none'} given, the teacher has {list(fit.features.blocks)}")
    layers = config.alignment_layers or proportional_layers(blocks, fit.features.depth, fit.num_layers)
    if len(layers) != len(blocks):
        raise ValueError(f"alignment_layers: given {list(layers)}, one is needed for each of the blocks {list(blocks)}")
    return dict(zip(blocks, layers, strict=True))


def compared_dim(config: GeoVRHeads, fit: Fit) -> int:
    """Channels of the teacher's features that are compared.

    Raises:
        ValueError: half of an odd number.
    """
    assert fit.features is not None
    if config.teacher_half == "both":
        return fit.features.dim
    if fit.features.dim % 2:
        raise ValueError(f"teacher_half: features of width {fit.features.dim} have no halves; take both")
    return fit.features.dim // 2


def compared_channels(features: Tensor, half: TeacherHalf) -> Tensor:
    """The half of the channels of (..., C) that is compared, or both."""
    if half == "both":
        return features
    first, second = features.chunk(2, dim=-1)
    return first if half == "frame" else second


def pooled_grid(grid: Grid, pool: int) -> Grid:
    """The grid of means over `pool` x `pool` patches; an odd row or column has a cell of its own."""
    return -(-grid[0] // pool), -(-grid[1] // pool)
