"""`load` a model and `reconstruct` scenes with it: the only place that joins files, pixels and the model."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from g2vlm.checkpoint import DEMO_NAME, load_model, or_demo
from g2vlm.errors import InputError
from g2vlm.images import SourceImage, from_memory, geometry_pixels, list_images, read_images
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import recon_inputs
from g2vlm.scene import Scene
from geometry import GeometryPrediction

log = logging.getLogger(__name__)

ImageInput = str | Path | Image.Image | np.ndarray


def load(
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> "Pipeline":
    """Load a model for inference.

    Args:
        model: a folder in our layout or in the released one, a hub id, or the name of a preset (random weights); by
            default the demo weights of the package.
        device: where to run; by default the first GPU, else the CPU.
        dtype: precision of the weights; by default bfloat16 on a GPU, float32 on the CPU.
        revision: commit of a hub id.

    Raises:
        CheckpointError: the weights are absent, incomplete, damaged or of another architecture.
        InputError: there is no such model.
    """
    source = or_demo(model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    name = DEMO_NAME if model is None else str(model)
    return Pipeline(load_model(source, dtype=dtype, device=device, revision=revision), name)


class Pipeline:
    """A loaded model with the steps from photographs to a scene."""

    def __init__(self, model: G2VLMForConditionalGeneration, name: str):
        self.model = model.eval()
        self.name = name
        if not model.config.tokens.recon_prompt:
            log.warning("%s knows no reconstruction prompt (converted without a tokenizer): bos alone is used", name)

    def reconstruct(
        self,
        images: ImageInput | Iterable[ImageInput],
        width: int | None = None,
        max_views: int | None = None,
        skip_bad: bool = False,
    ) -> Scene:
        """Points, depth, normals and cameras of the views of one scene.

        Args:
            images: a folder, files, glob patterns, PIL images or uint8 arrays (H, W, 3).
            width: width in pixels that the views are brought to; by default the config's `view_width`.
            max_views: use at most this many views, evenly chosen.
            skip_bad: continue without unreadable files instead of refusing.

        Raises:
            InputError: nothing to read, or an unreadable file.
        """
        return self.reconstruct_sources(read_sources(images, max_views, skip_bad), width)

    def reconstruct_sources(self, sources: list[SourceImage], width: int | None = None) -> Scene:
        """Like `reconstruct`, from images already read."""
        width = self.model.config.view_width if width is None else width
        pixels = torch.from_numpy(geometry_pixels(sources, width))  # (S, 3, H, W)
        prediction = self.predict(pixels)
        confidence = None if prediction.confidence is None else torch.sigmoid(prediction.confidence).numpy()
        return Scene.from_prediction(
            prediction.local_points.numpy(),
            prediction.cam_to_world.numpy(),
            prediction.normals.numpy(),
            usable_intrinsics(prediction.intrinsics, pixels.shape[-1]).numpy(),
            pixels.numpy(),
            sources,
            units="relative",
            model=self.name,
            confidence=confidence,
        )

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor, backend: str | None = None) -> GeometryPrediction:
        """The model's prediction for the views (S, 3, H, W) in [0, 1] of one scene, float32 on the CPU.

        Args:
            pixels: the views.
            backend: attention backend; None chooses.
        """
        inputs = recon_inputs(pixels, self.model.config, self.model.device)
        output = self.model(**inputs, backend=backend)
        (prediction,) = output.geometry
        return prediction.to("cpu")


def usable_intrinsics(intrinsics: torch.Tensor, width: int) -> torch.Tensor:
    """Intrinsics (S, 3, 3) whose focal lengths are positive and at most 100 image widths.

    Points that follow no pinhole camera, as an untrained model's, may have no such fit; those views get a focal length
    of one image width, and the log says so.
    """
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[:, :2]  # (S, 2)
    usable = ((focal > 0) & (focal < 100 * width)).all(dim=-1)
    if not usable.all():
        log.warning(
            "%d of %d views: the points fit no pinhole camera (untrained weights?); focal length set to %d pixels",
            int((~usable).sum()),
            len(usable),
            width,
        )
    default = intrinsics.clone()
    default[:, 0, 0] = default[:, 1, 1] = width
    return torch.where(usable[:, None, None], intrinsics, default)


def read_sources(
    images: ImageInput | Iterable[ImageInput], max_views: int | None = None, skip_bad: bool = False
) -> list[SourceImage]:
    """Read the views of a scene from files or memory, in order.

    Raises:
        InputError: nothing to read, or an unreadable file.
    """
    items = [images] if isinstance(images, str | Path | Image.Image | np.ndarray) else list(images)
    if not items:
        raise InputError("no images given", "the list is empty", "name a folder, files or a glob pattern")
    if all(isinstance(item, str | Path) for item in items):
        paths = evenly_chosen(list_images(items), max_views)  # pyright: ignore[reportArgumentType]
        return read_images(paths, skip_bad)[0]
    if any(isinstance(item, str | Path) for item in items):
        raise InputError("paths and in-memory images are mixed", "", "give only one kind")
    return [from_memory(item) for item in evenly_chosen(items, max_views)]  # pyright: ignore[reportArgumentType]


def evenly_chosen(items: list, count: int | None) -> list:
    """At most `count` items, evenly spread, first and last included."""
    if count is None or len(items) <= count:
        return items
    log.info("using %d of %d views, evenly chosen", count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
