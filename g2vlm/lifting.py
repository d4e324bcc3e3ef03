"""A scene out of a VLM's own hidden states, through the heads that supervised them in training (`g2vlm lift`).

S views, H' W' pixels of the heads' maps.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from g2vlm.asking import Context, look
from g2vlm.chat_model import ChatModel
from g2vlm.errors import CheckpointError, InputError
from g2vlm.images import SourceImage, resize
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.predictions import usable_intrinsics
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.scene import Scene
from g2vlm.supervision.backbones.base import Tapped, Taps
from g2vlm.supervision.backbones.g2vlm import G2VLMBackbone
from g2vlm.supervision.base import ClipShape, Supervision
from g2vlm.supervision.lifting import LIFTINGS, LiftedScene, Lifting
from g2vlm.supervision.saved import kind_of, load_supervision
from g2vlm.supervision.segments import with_probes
from geometry import apply_rigid, invert_rigid, unproject
from geometry.pointmaps import normals_from_points

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LiftHeads:
    """Saved heads, and what is made of their predictions.

    Args:
        supervision: the heads.
        lifting: their kind's.
        source: one of `lifting.sources`.
        name: where they come from, for people.
    """

    supervision: Supervision
    lifting: Lifting
    source: str
    name: str

    @property
    def how(self) -> str:
        """What is made of the predictions, in words."""
        return self.lifting.sources[self.source]

    def __str__(self) -> str:
        return f"{kind_of(self.supervision)} heads {self.name}"


def open_heads(path: Path, source: str | None = None) -> LiftHeads:
    """Saved heads.

    Args:
        path: FOLDER/NAME of NAME.json and NAME.safetensors; one of these files will do, too.
        source: what to make the scene from; None takes the first that the heads can give.

    Raises:
        InputError: no such heads, or heads that give no scene, or none from this source.
        CheckpointError: damaged heads.
    """
    name = path.stem if path.suffix in (".json", ".safetensors") else path.name
    supervision = load_supervision(path.parent, name)
    kind = kind_of(supervision)
    if kind not in LIFTINGS:
        raise InputError(
            f"{kind} heads give no scene  {path}", "they compare views, and predict no depth", "give other heads"
        )
    lifting = LIFTINGS[kind](supervision)
    if source is not None and source not in lifting.sources:
        allowed = " or ".join(lifting.sources)
        raise InputError(f"{kind} heads give no scene from {source}  {path}", "", f"allowed: --from {allowed}")
    lacking = {own: lifting.missing(own) for own in ([source] if source else lifting.sources)}
    possible = [own for own, missing in lacking.items() if not missing]
    if not possible:
        why = "; ".join(f"from {own} they lack {', '.join(missing)}" for own, missing in lacking.items())
        raise InputError(f"these heads give no such scene  {path}", why, "give heads that were trained for it")
    return LiftHeads(supervision, lifting, possible[0], str(path))


def require_fits(heads: LiftHeads, chat: ChatModel) -> None:
    """Refuse heads that were trained on another decoder.

    Raises:
        CheckpointError: another width or number of layers.
    """
    fit, decoder = heads.supervision.fit, chat.model.config.decoder
    if (fit.width, fit.num_layers) != (decoder.hidden_size, decoder.num_layers):
        raise CheckpointError(
            f"the heads {heads.name} do not belong to {chat.name}",
            f"they read {fit.num_layers} layers of width {fit.width}; the model has {decoder.num_layers} of width "
            f"{decoder.hidden_size}",
            "give the heads that were saved with this model",
        )


@torch.inference_mode()
def lift(
    chat: ChatModel, heads: LiftHeads, sources: Sequence[SourceImage], geometry: bool = False, width: int | None = None
) -> Scene:
    """The scene that heads read out of the semantic expert while it looks at images; no question is asked.

    All images are brought to the size of the first, since the heads know clips of one size.

    Args:
        chat: the model.
        heads: trained on it.
        sources: the S images.
        geometry: whether the geometric expert sees the images as well, as it did if the heads were trained so; what is
            lifted is then not the semantic expert's alone.
        width: of its views in pixels; by default the processor's.

    Raises:
        CheckpointError: heads of another model.
        InputError: more images than fit into the context, or one that an encoder does not take.
        CheckFailed: the heads give no finite cameras.
    """
    require_fits(heads, chat)
    shown = of_one_size(sources)
    context = look(chat, shown, shown if geometry else [], width)
    supervision = heads.supervision.to(chat.model.device)
    if supervision.aux is not None:
        supervision.aux.to(chat.model.dtype)
    tapped = _tapped(chat.model, supervision, context)
    patch, merge = chat.processor.rule.patch_size, chat.model.config.semantic_encoder.merge_size
    (grids,) = tapped.frames
    size = grids[0][0] * merge * patch, grids[0][1] * merge * patch
    (prediction,) = supervision.heads(tapped, [ClipShape(size)])
    return _scene(
        heads.lifting.scene(prediction, heads.source), sources, f"{chat.name} through {kind_of(supervision)} heads"
    )


def of_one_size(sources: Sequence[SourceImage]) -> list[SourceImage]:
    """All images in the size of the first, stretched where they are of another."""
    first = sources[0].size
    others = sum(source.size != first for source in sources)
    if others:
        log.warning("%d of %d images are stretched to the first one's %d x %d", others, len(sources), *first[::-1])
    return [source if source.size == first else replace(source, pixels=_stretched(source, first)) for source in sources]


def _stretched(source: SourceImage, size: tuple[int, int]) -> np.ndarray:
    return resize(source.pixels, size, Image.Resampling.LANCZOS)


def _tapped(model: G2VLMForConditionalGeneration, supervision: Supervision, context: Context) -> Tapped:
    """What the heads read of a prompt without a question."""
    assert context.images is not None
    taps, segments = supervision.taps, [*context.opening, *context.images.segments]
    if supervision.aux is not None:
        probes = supervision.aux()
        taps |= Taps(probes=probes)
        segments = with_probes(segments, probes.camera is not None, probes.scale is not None)
    views = context.views
    inputs = {
        "sequence": sequence_builder(model.config).build([segments]).to(model.device),
        "views": [] if views is None else [normalise_views(views.pixels.to(model.device))],
        "pixel_values": context.images.pixel_values,
        "image_grid_thw": context.images.grid_thw,
        "logits_at": torch.zeros(0, dtype=torch.long, device=model.device),
        "predict_geometry": False,
    }
    return G2VLMBackbone(model)(inputs, taps)


def _scene(lifted: LiftedScene, sources: Sequence[SourceImage], model: str) -> Scene:
    """As files are written from it; pixels without a finite point in front of the camera are not valid."""
    metres = lifted.metres_per_unit
    unit = torch.ones(()) if metres is None else metres.float().cpu()
    cam_to_world = lifted.cam_to_world.float().cpu().clone()
    intrinsics = usable_intrinsics(lifted.intrinsics.float().cpu(), lifted.depth.shape[-1])
    if lifted.points is None:
        local = unproject(lifted.depth.float().cpu(), intrinsics)
    else:
        local = apply_rigid(invert_rigid(cam_to_world), lifted.points.float().cpu())
    local = local * unit
    cam_to_world[:, :3, 3] *= unit
    valid = local.isfinite().all(-1) & (local[..., 2] > 0)
    local = torch.where(valid[..., None], local, 0)
    normals, _ = normals_from_points(local, valid)
    height, width = local.shape[1:3]
    images = np.stack([_stretched(source, (height, width)) for source in sources]).transpose(0, 3, 1, 2) / 255
    return Scene.from_prediction(
        local.numpy(),
        cam_to_world.numpy(),
        normals.numpy(),
        intrinsics.numpy(),
        images,
        sources,
        units="relative" if metres is None else "metre",
        model=model,
        valid=valid.numpy(),
        confidence=_finite(lifted.confidence),
    )


def _finite(confidence: Tensor | None) -> np.ndarray | None:
    """As numbers that a file can hold."""
    return None if confidence is None else torch.nan_to_num(confidence.float().cpu()).numpy()
