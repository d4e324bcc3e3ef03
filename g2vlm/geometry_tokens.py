"""Where fusion gets its tokens from: what a frozen reconstruction model knows of a clip, frame by frame.

Shapes: S frames of a clip, P patches of a frame, K camera tokens of a frame, C width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from g2vlm.data.types import SceneSample
from g2vlm.errors import InputError
from g2vlm.fusion_config import CameraToken, FusionConfig, Scope, TokenKinds
from g2vlm.model.recorder import Recorder
from g2vlm.processing import normalise_views, recon_sequence
from g2vlm.sequence import PackedSequence

if TYPE_CHECKING:
    from g2vlm.model.g2vlm import G2VLMForConditionalGeneration


@dataclass(frozen=True, eq=False)
class GeometryTokens:
    """Tokens of one clip, without gradients.

    Args:
        patches: (S, P, C) row by row; None in the ablation without them.
        camera: (S, K, C); None in the ablation without them.
        grid: (rows, columns) of the patches.
        is_metric: the source measures in metres.
        layer: whose hidden states they are, in the source's own numbering; None where that says nothing.

    Raises:
        ValueError: no tokens, or shapes that do not agree.
    """

    patches: Tensor | None
    camera: Tensor | None
    grid: tuple[int, int]
    is_metric: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        kinds = [tokens for tokens in (self.camera, self.patches) if tokens is not None]
        if not kinds:
            raise ValueError("geometry tokens need patches or a camera")
        shapes = [tuple(tokens.shape) for tokens in kinds]
        if any(len(shape) != 3 for shape in shapes) or len({(shape[0], shape[-1]) for shape in shapes}) > 1:
            raise ValueError(f"geometry tokens of shapes {shapes}; they must be (frames, tokens, width), alike")
        if self.patches is not None and self.patches.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(f"{self.patches.shape[1]} patches do not fill a grid of {self.grid}")

    @property
    def num_frames(self) -> int:
        """S."""
        return self._all().shape[0]

    def only(self, kinds: TokenKinds) -> "GeometryTokens":
        """The same without patches (`camera`) or without camera tokens (`patches`)."""
        patches = None if kinds == "camera" else self.patches
        return replace(self, patches=patches, camera=None if kinds == "patches" else self.camera)

    def frames(self, scope: Scope) -> list[Tensor]:
        """What each frame's image tokens read, S times (M, C): the frame's camera and patches, or all the clip's."""
        tokens = self._all()  # (S, K + P, C)
        return [*tokens] if scope == "frame" else [tokens.flatten(0, 1)] * len(tokens)

    def _all(self) -> Tensor:
        return torch.cat([tokens for tokens in (self.camera, self.patches) if tokens is not None], dim=1)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one scene in order.

    Args:
        images: (S, 3, H, W) in [0, 1].
        name: of the video and the frames taken from it; what keeps tokens or targets knows a clip by it.
        scene: what the data say about it, view i being frame i; None if they say nothing.
    """

    images: Tensor
    name: str = ""
    scene: SceneSample | None = None

    @classmethod
    def of(cls, scene: SceneSample) -> "Clip":
        """All views of a scene, named after the data set, the scene and the views."""
        return cls(scene.images.float() / 255, f"{scene.dataset}/{scene.scene}:{','.join(scene.view_ids)}", scene)

    def to(self, device: torch.device | str) -> "Clip":
        """The same clip with its images on a device."""
        return replace(self, images=self.images.to(device))


class GeometryTokenSource(Protocol):
    """A frozen reconstruction model, or what it once said."""

    @property
    def token_dim(self) -> int:
        """C."""
        ...

    @property
    def online(self) -> bool:
        """It computes on the training device: asked in the training process before a step; else by loader workers."""
        ...

    def tokens(self, clip: Clip) -> GeometryTokens:
        """The tokens of a clip, one entry per frame, on any device, without gradients.

        Raises:
            InputError: this source has none of such a clip.
        """
        ...


class GeometricExpert:
    """The geometric expert of a G2VLM: hidden states of its tokens in a reconstruction of the clip.

    Args:
        model: the model; nothing reaches its weights.
        layer, camera: as in `FusionConfig`.
    """

    online = True

    def __init__(self, model: "G2VLMForConditionalGeneration", layer: int = -1, camera: CameraToken = "decoder"):
        self.model, self.layer = model, layer
        self.camera: CameraToken = camera

    @property
    def token_dim(self) -> int:
        """Width of the decoder."""
        return self.model.config.hidden_size

    def tokens(self, clip: Clip) -> GeometryTokens:
        """As in the protocol; the frames' sides are multiples of the model's patch."""
        views = normalise_views(clip.images.to(self.model.device, self.model.dtype))
        return expert_tokens(self.model, [views], self.layer, self.camera)[0]


class KeptTokens:
    """Tokens in memory.

    Args:
        clips: name of a clip -> its tokens, all of one width.

    Raises:
        ValueError: no clips, or tokens of several widths.
    """

    online = False

    def __init__(self, clips: Mapping[str, GeometryTokens]):
        widths = {tokens.frames("frame")[0].shape[-1] for tokens in clips.values()}
        if len(widths) != 1:
            raise ValueError(f"tokens of the widths {sorted(widths)}; give clips of one width")
        self.clips, self.token_dim = dict(clips), widths.pop()

    def tokens(self, clip: Clip) -> GeometryTokens:
        """As in the protocol.

        Raises:
            InputError: an unknown name, or another number of frames.
        """
        kept = self.clips.get(clip.name)
        if kept is None:
            raise InputError(f"no geometry tokens of clip {clip.name!r}", "it was never kept", "make its tokens first")
        if kept.num_frames != len(clip.images):
            why = f"tokens of {kept.num_frames} frames were kept, and the clip has {len(clip.images)}"
            raise InputError(f"other frames of clip {clip.name!r}", why, "take the same frames, or make new tokens")
        return kept


@dataclass(frozen=True)
class SomeTokens:
    """A source without its camera tokens or without its patches: VLM-3R's ablations (its table 3).

    Args:
        source: the whole one.
        kinds: what is left.
    """

    source: GeometryTokenSource
    kinds: TokenKinds

    @property
    def token_dim(self) -> int:
        """The source's."""
        return self.source.token_dim

    @property
    def online(self) -> bool:
        """As the source."""
        return self.source.online

    def tokens(self, clip: Clip) -> GeometryTokens:
        """As in the protocol."""
        return self.source.tokens(clip).only(self.kinds)


@torch.no_grad()
def expert_tokens(
    model: "G2VLMForConditionalGeneration", views: Sequence[Tensor], layer: int = -1, camera: CameraToken = "decoder"
) -> list[GeometryTokens]:
    """What a model's geometric expert knows of scenes: its hidden states while it reconstructs them, question unseen.

    Args:
        model: the model.
        views: per scene, normalised images (S, 3, H, W) on the model's device.
        layer, camera: as in `FusionConfig`.
    """
    sequence = recon_sequence(list(views), model.config).to(model.device)
    number = model.config.decoder.num_layers if layer == -1 else layer
    block = model.decoder.layers[number - 1]
    with Recorder() as recorder:
        recorder.keep_output(block)
        last, _ = model.decoder(
            model.embed_views(views),
            model.embed_tokens(sequence.semantic_ids),
            sequence.position_ids,
            sequence.plan,
        )
    hidden = last if number == model.config.decoder.num_layers else recorder.output(block)[0].to(last.dtype)
    found, start = [], 0
    for grids in sequence.view_grids:
        rows, columns = grids[0]  # all views of a scene have one size
        stop = start + len(grids) * rows * columns
        patches, final = (states[start:stop].unflatten(0, (len(grids), -1)) for states in (hidden, last))  # (S, P, C)
        features = model.heads.camera_features(final, grids[0]) if camera == "decoder" else patches
        found.append(GeometryTokens(patches, features.mean(dim=1, keepdim=True), grids[0], layer=number))
        start = stop
    return found


def own_frames(
    model: "G2VLMForConditionalGeneration",
    config: FusionConfig,
    sequence: PackedSequence,
    views: Sequence[Tensor],
    sizes: Sequence[int],
) -> list[Tensor | None]:
    """What the images of a pack read when the model's own geometric expert has seen the same photographs.

    The first image of a sample goes with its first view, and so on; images of a sample without views stay as they are.

    Args:
        model: the model.
        config: its fusion.
        sequence: the pack.
        views: per geometry segment, normalised images (S, 3, H, W).
        sizes: image tokens of every frame of the pack.

    Raises:
        ValueError: images that continue cached tokens.
        InputError: a sample whose images and views do not pair.
    """
    if sequence.num_keys > sequence.num_tokens:
        raise ValueError("images that continue a cache were not given the geometry tokens of its views")
    frames: list[list[Tensor]] = [[] for _ in range(sequence.num_samples)]
    if views and sizes:
        clips = expert_tokens(model, views, config.layer, config.camera)
        for sample, clip in zip(sequence.group_samples, clips, strict=True):
            frames[sample] += clip.only(config.tokens).frames(config.scope)
    paired: list[Tensor | None] = []
    for sample, (count, own) in enumerate(zip(frames_of_samples(sequence, sizes), frames, strict=True)):
        if count and own and count != len(own):
            raise InputError(
                f"sample {sample} has {count} images and {len(own)} views",
                "the model's fusion pairs them one by one",
                "give as many views as images, or no views",
            )
        paired += own[:count] or [None] * count
    return paired


def frames_of_samples(sequence: PackedSequence, sizes: Sequence[int]) -> list[int]:
    """How many of the frames of a pack belong to each sample."""
    stops = torch.tensor([stop for _, (_, stop) in sequence.sample_ranges], device=sequence.image_slots.device)
    slots = torch.searchsorted(sequence.image_slots, stops).tolist()  # image tokens up to the end of each sample
    ends = list(accumulate(sizes))
    upto = [sum(end <= slot for end in ends) for slot in slots]
    return [stop - start for start, stop in zip([0, *upto[:-1]], upto, strict=True)]
