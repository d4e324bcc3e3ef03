"""From image files to RGB and to the pixels of the geometry encoder, with numpy and PIL alone.

H, W are pixels of an image; N images. Sizes are always (height, width).
"""

import glob
import logging
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from g2vlm.errors import InputError, ResourceError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")  # what a file may hold; nothing that runs a program
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what undoes it
PATCH = 14
MAX_GEOMETRY_HEIGHT = 4 * 518  # 148 patches; taller inputs are a mistake far more often than a wish

_quiet_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One image in RGB together with where it came from and what was done to it.

    Args:
        pixels: (H, W, 3) uint8 RGB, upright.
        path: the file, or None for an image that was given as an array.
        orientation: the EXIF orientation that was undone; 1 means that the file was upright.
        steps: what was done on the way to RGB, in order, for people.
    """

    pixels: np.ndarray
    path: Path | None = None
    orientation: int = 1
    steps: tuple[str, ...] = ()

    def __post_init__(self):
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise InputError(
                f"cannot use image  {self.path or 'given as an array'}",
                f"pixels are {self.pixels.dtype} of shape {shape}",
                "give RGB pixels as uint8 of shape (height, width, 3)",
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright original image; intrinsics for users refer to it."""
        return self.pixels.shape[0], self.pixels.shape[1]


# ---------------------------------------------------------------------------------------------- finding files


def list_images(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """Image files named by files, folders and glob patterns.

    Files keep the order in which they are given. A folder (not its sub-folders) and a glob stand for the images in
    them, in natural order (`img2` before `img10`); their other files are counted in the log and left out.

    Raises:
        InputError: a path does not exist, is no image by its suffix, or a folder or glob holds no image.
    """
    paths = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if not paths:
        raise InputError("no images given", "the list of inputs is empty", "name image files, a folder or a glob")
    try:
        return [image for path in paths for image in _expand(Path(path))]
    except OSError as error:
        raise InputError(
            f"cannot look at  {error.filename}", _reason(error), "check the name and its permissions"
        ) from error


def natural_key(path: Path) -> tuple:
    """Sort key that compares runs of digits as numbers, folder by folder; ties are broken by the exact name."""
    return tuple(_numbers_and_text(part) for part in path.parts), str(path)


def _numbers_and_text(name: str) -> tuple:
    """`img10a` -> ("img", 10, "a"): text at even places, numbers at odd ones, so that any two names compare."""
    return tuple(int(s) if i % 2 else s.casefold() for i, s in enumerate(re.split(r"([0-9]+)", name)))


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _images_in(path, list(path.iterdir()))
    if path.exists():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(
                f"cannot use as an image  {path}",
                f"the suffix {path.suffix or '(none)'} is not one of {' '.join(SUFFIXES)}",
                "convert it first; a video becomes a folder of frames",
            )
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True, include_hidden=True)]
        return _images_in(path, matches)
    raise InputError(
        f"cannot find  {path}",
        "there is no file or folder of that name",
        f"check the spelling; relative paths start at {Path.cwd()}",
    )


def _images_in(place: Path, candidates: list[Path]) -> list[Path]:
    images = [path for path in candidates if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    others = len(candidates) - len(images)
    if not images:
        why = f"{others} other entries and no image" if others else "nothing there"
        raise InputError(f"no images in  {place}", why, f"accepted are {' '.join(SUFFIXES)}; sub-folders are not read")
    if others:
        log.info("%s: %d images used, %d other entries left out", place, len(images), others)
    return sorted(images, key=natural_key)


# ---------------------------------------------------------------------------------------------- reading files


def read_image(path: str | Path, max_pixels: int = 100_000_000, max_side: int = 16_384) -> SourceImage:
    """Read one file as upright 8-bit RGB.

    The size is checked in the header before anything is decoded. EXIF orientation is applied; transparency (alpha,
    palette or colour key) is laid over white; 16-bit values are mapped from 0..65535 to 0..255 by their high byte, in
    grey images as PIL does it in colour ones; CMYK, grey and 1-bit become RGB; of an animation the first image is used.

    Raises:
        InputError: the file is missing, empty, too large, damaged, or its value range is unknown (32-bit, float).
        ResourceError: too little memory to decode it.
    """
    path = Path(path)
    num_bytes = _check_file(path)
    try:
        with _open(path) as image:
            _check_size(path, image, max_pixels, max_side)
            return _to_source(image, path)
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit, far above our default
        raise _too_large(path, _reason(error).split(", could")[0]) from error
    except MemoryError as error:
        raise ResourceError(
            f"not enough memory to decode  {path}", "the decoder asked for more than is free", "make it smaller"
        ) from error
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise _unreadable(path, f"{num_bytes:,} bytes present, {_reason(error)}") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_image` gives, from the file's header alone.

    Raises:
        InputError: the file is missing, empty or no image.
    """
    path = Path(path)
    _check_file(path)
    try:
        with _open(path) as image:
            width, height = image.size
            return (width, height) if _orientation(image, path) > 4 else (height, width)
    except Exception as error:  # as in read_image
        raise _unreadable(path, _reason(error)) from error


def read_images(paths: Iterable[str | Path], skip_bad: bool = False) -> tuple[list[SourceImage], list[InputError]]:
    """Read many files; with `skip_bad` unreadable ones are logged and returned as errors instead of raised.

    Raises:
        InputError: a file cannot be read and `skip_bad` is off, or no file can be read at all.
    """
    images, errors = [], []
    for path in paths:
        try:
            images.append(read_image(path))
        except InputError as error:
            if not skip_bad:
                raise
            log.warning("skipped: %s (%s)", error.what, error.why)
            errors.append(error)
    if errors and not images:
        raise InputError("none of the images can be read", f"{errors[0].what}: {errors[0].why}", "check the files")
    return images, errors


def from_memory(image: Image.Image | np.ndarray) -> SourceImage:
    """A PIL image or an (H, W, 3) array, uint8 or floating point in [0, 1], as upright 8-bit RGB of its own.

    Raises:
        InputError: another shape or type, values outside [0, 1] or not finite, or a PIL mode of unknown range.
    """
    if isinstance(image, Image.Image):
        return _to_source(image, None)
    if np.issubdtype(image.dtype, np.floating):
        if not (image.size and image.min() >= 0 and image.max() <= 1):  # NaN fails both comparisons
            raise InputError(
                "cannot use image  given as an array", "floating-point values must lie in [0, 1]", "scale it"
            )
        image = np.round(image * 255).astype(np.uint8)
    return SourceImage(image.copy())


def to_source(image: SourceImage | Image.Image | np.ndarray | str | Path) -> SourceImage:
    """One image of whatever kind as upright 8-bit RGB.

    Raises:
        InputError: as `read_image` and `from_memory`, or something that is no image.
    """
    if isinstance(image, SourceImage):
        return image
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image | np.ndarray):
        return from_memory(image)
    raise InputError(f"cannot use a {type(image).__name__} as an image", "", "give a path, a PIL image or an array")


def _check_file(path: Path) -> int:
    """Size of a regular, non-empty file in bytes. A pipe or device is refused: reading one may never end."""
    try:
        if not path.is_file():
            raise _unreadable(path, "it is not a regular file" if path.exists() else "there is no file of that name")
        num_bytes = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, _reason(error)) from error
    if num_bytes == 0:
        raise _unreadable(path, "the file is empty (0 bytes)")
    return num_bytes


def _open(path: Path) -> Image.Image:
    """Read the header only. PIL's own size warning is silenced: `_check_size` decides, with limits the caller knows."""
    with _quiet():
        return Image.open(path, formats=FORMATS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PIL's warnings about damaged metadata; one thread at a time, because the filter list is global."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(path: Path, image: Image.Image, max_pixels: int, max_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > max_side:
        limits = f"the limits are {max_pixels:,} pixels and {max_side:,} per side"
        raise _too_large(path, f"its header says {width} x {height}; {limits}")


def _too_large(path: Path, why: str) -> InputError:
    fix = "make a smaller copy, or pass --skip-bad to continue with the other images"
    return InputError(f"image too large  {path}", why, fix)


def _to_source(image: Image.Image, path: Path | None) -> SourceImage:
    steps = []
    if getattr(image, "is_animated", False):
        steps.append("first of several images in the file")
        log.info("%s holds several images; the first is used", path)
    rgb, conversion = _to_rgb(image, path)
    orientation = _orientation(image, path)
    if orientation != 1:
        rgb = rgb.transpose(UPRIGHT[orientation])
        conversion.append(f"EXIF orientation {orientation} undone")
    return SourceImage(np.array(rgb), path, orientation, (*steps, *conversion))


def _orientation(image: Image.Image, path: Path | None) -> int:
    """The EXIF orientation, 1 when there is none; damaged metadata does not make the picture unusable."""
    try:
        with _quiet():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in read_image
        log.warning("%s: EXIF data ignored (%s)", path, _reason(error))
        return 1
    return orientation if orientation in UPRIGHT else 1


def _to_rgb(image: Image.Image, path: Path | None) -> tuple[Image.Image, list[str]]:
    mode = image.mode
    if mode.startswith("I"):
        return _from_16_bit(image, path).convert("RGB"), ["16-bit grey to 8 bit by the high byte"]
    if mode == "F":
        raise _unreadable(path, "it holds floating-point values of unknown range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"), [f"{mode}, laid over white"]
    return image.convert("RGB"), [] if mode == "RGB" else [f"{mode} to RGB"]


def _from_16_bit(image: Image.Image, path: Path | None) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise _unreadable(path, f"its values reach from {values.min()} to {values.max()}, beyond 16 bits")
    return Image.fromarray((values // 256).astype(np.uint8))


def _unreadable(path: Path | None, why: str) -> InputError:
    fix = "remove or replace it, or pass --skip-bad to continue with the other images"
    return InputError(f"cannot read image  {path or 'given in memory'}", why, fix)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"the content is none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------- geometry encoder


def geometry_size(size: tuple[int, int], width: int = 518) -> tuple[int, int]:
    """(height, width) of the Lanczos resize for a first image of `size`: round(H0 * width / W0 / 14) * 14, at least 14.

    Raises:
        InputError: the image is so narrow that the height would exceed `MAX_GEOMETRY_HEIGHT`, or `width` is below 14.
    """
    if width < PATCH:
        raise InputError(f"cannot resize to width {width}", f"one patch has {PATCH} pixels", "use a multiple of 14")
    height = max(PATCH, round(size[0] * width / size[1] / PATCH) * PATCH)
    if height > MAX_GEOMETRY_HEIGHT:
        raise InputError(
            "the first image is too narrow",
            f"{size[1]} x {size[0]} at width {width} would be {height} high; the limit is {MAX_GEOMETRY_HEIGHT}",
            "crop it, or use a smaller width",
        )
    return height, width


def geometry_pixels(images: Sequence[SourceImage], width: int = 518) -> np.ndarray:
    """Pixels for the geometry encoder, (N, 3, H, W) float32 in [0, 1]; H and W are multiples of 14.

    The released rule: the first image fixes the size (`geometry_size`), all images are stretched to it with PIL's
    Lanczos filter, never cropped or padded. A width that is no multiple of 14 follows the released evaluation code
    (512 requested, 504 used): a second, antialiased bilinear resize down to the next multiples of 14.

    Raises:
        InputError: no image, or a first image that `geometry_size` refuses.
    """
    if not images:
        raise InputError("no images given", "the geometry encoder needs at least one view", "name an image or a folder")
    height, width = geometry_size(images[0].size, width)
    _warn_about_stretching(images)
    resized = [resize(image.pixels, (height, width), Image.Resampling.LANCZOS) for image in images]
    pixels = np.stack(resized).astype(np.float32) / np.float32(255)  # (N, H, W, 3)
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels if width % PATCH == 0 else _reduce_width(pixels, width // PATCH * PATCH)


def _warn_about_stretching(images: Sequence[SourceImage]) -> None:
    aspects = [image.size[1] / image.size[0] for image in images]
    others = sum(abs(aspect / aspects[0] - 1) > 0.01 for aspect in aspects)
    if others:
        log.warning("%d of %d images are stretched to the aspect ratio of the first", others, len(images))


def resize(pixels: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """(H, W, 3) uint8 stretched to `size` by PIL."""
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), resample))


def _reduce_width(pixels: np.ndarray, width: int) -> np.ndarray:
    """Antialiased bilinear resize. PIL's differs from torch's, which the released code uses, by up to 4e-5."""
    import torch  # only this rule needs it; everything else here starts without torch

    size = (pixels.shape[2], width)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels), size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized.numpy()
