"""Every file is made by the test that reads it."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm import images
from g2vlm.errors import InputError
from g2vlm.images import SourceImage, from_memory, geometry_pixels, list_images, read_image, read_images


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for contents that PIL does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def source(height: int, width: int, seed: int = 0) -> SourceImage:
    return SourceImage(picture(height, width, seed))


def saved(folder: Path, name: str, image: Image.Image, **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


# ---------------------------------------------------------------------------------------------- finding files


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("img10.png", "img2.PNG", "img1.jpg", ".hidden.png", "img2_depth.png", "notes.txt", "clip.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "sub.png" / "inner.png").write_bytes(b"x")
    return tmp_path


def test_folder_is_sorted_naturally_and_counts_what_it_leaves_out(folder, caplog):
    with caplog.at_level("INFO"):
        found = list_images(folder)
    assert names(found) == [".hidden.png", "img1.jpg", "img2.PNG", "img2_depth.png", "img10.png"]
    assert "5 images used, 3 other entries" in caplog.text


def test_natural_sort_compares_numbers_as_numbers():
    order = ["2", "10", "a", "a1b2", "a1b10", "a02", "a2", "a²", "b"]
    shuffled = sorted(order, key=lambda name: name[::-1])
    assert sorted(shuffled, key=lambda name: images.natural_key(Path(name))) == order
    assert sorted(["d10/1.png", "d9/2.png"], key=lambda n: images.natural_key(Path(n))) == ["d9/2.png", "d10/1.png"]


def test_files_keep_their_order_and_inputs_mix(folder):
    assert names(list_images([folder / "img10.png", folder / "img1.jpg"])) == ["img10.png", "img1.jpg"]
    assert names(list_images([str(folder / "img10.png"), folder / "sub.png"])) == ["img10.png", "inner.png"]
    assert names(list_images(str(folder / "img1.jpg"))) == ["img1.jpg"]


def test_glob_is_sorted_naturally(folder):
    assert names(list_images(str(folder / "img*"))) == ["img1.jpg", "img2.PNG", "img2_depth.png", "img10.png"]
    assert names(list_images(str(folder / "**" / "inner*"))) == ["inner.png"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "view[1].png").write_bytes(b"x")
    assert names(list_images(tmp_path / "view[1].png")) == ["view[1].png"]


@pytest.mark.parametrize(
    ("entry", "what", "why"),
    [
        ("absent", "cannot find", "no file or folder"),
        ("bad\0name", "cannot find", "no file or folder"),
        ("n" * 300, "cannot look at", "too long"),
        ("notes.txt", "cannot use as an image", "suffix .txt"),
        ("empty", "no images in", "nothing there"),
        ("texts", "no images in", "2 other entries"),
        ("*.bmp", "no images in", "nothing there"),
    ],
)
def test_what_cannot_be_listed_is_an_input_error(folder, entry, what, why):
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    for name in "ab":
        (folder / "texts" / f"{name}.txt").write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        list_images(folder / entry)
    assert what in caught.value.what
    assert why in caught.value.why
    assert caught.value.fix


def test_an_empty_list_is_an_input_error():
    with pytest.raises(InputError, match="no images given"):
        list_images([])


# ---------------------------------------------------------------------------------------------- reading files


def test_rgb_png_is_read_exactly(tmp_path):
    path = saved(tmp_path, "a.png", Image.fromarray(picture()))
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, picture())
    assert (image.path, image.size, image.orientation, image.steps) == (path, (40, 60), 1, ())


TURNED = {  # EXIF orientation -> how a camera stores an upright picture
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_undone(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(TURNED[orientation](picture()))
    image = read_image(saved(tmp_path, "a.png", Image.fromarray(stored), exif=exif))
    np.testing.assert_array_equal(image.pixels, picture())
    assert image.orientation == orientation
    assert bool(image.steps) == (orientation != 1)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    path = saved(tmp_path, "a.jpg", Image.fromarray(picture()), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12rubbish")
    assert read_image(path).orientation == 1


def test_exif_that_makes_pil_fail_does_not_cost_the_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 8, 2, b"\0\1\2\3", extra=chunk(b"eXIf", b"no exif at all")))
    assert read_image(path).pixels.tolist() == [[[1, 2, 3]]]


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    expected = [255, 127, 0]
    for mode in ("RGBA", "LA"):
        image = read_image(saved(tmp_path, f"{mode}.png", Image.fromarray(rgba).convert(mode)))
        np.testing.assert_allclose(image.pixels[0], np.repeat(np.array(expected)[:, None], 3, 1), atol=1)
        assert "white" in image.steps[0]


def test_palette_with_transparency_is_laid_over_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None).convert("P")
    image.putdata([0, 1])
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert read_image(saved(tmp_path, "a.png", image)).pixels.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    transparent = read_image(saved(tmp_path, "b.png", image, transparency=0))
    assert transparent.pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_colour_key_is_laid_over_white(tmp_path):
    path = tmp_path / "a.png"
    key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    path.write_bytes(png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), extra=key))
    assert read_image(path).pixels.tolist() == [[[255, 255, 255], [4, 5, 6]]]


VALUES_16 = np.array([[0, 255, 256, 32768, 65279, 65535]], dtype=np.uint16)
VALUES_8 = [0, 0, 1, 128, 254, 255]


def test_16_bit_grey_keeps_its_range(tmp_path):
    for name, image in {
        "a.png": Image.fromarray(VALUES_16),
        "a.tif": Image.fromarray(VALUES_16),
        "b.tif": Image.fromarray(VALUES_16.astype(np.int32)),
    }.items():
        read = read_image(saved(tmp_path, name, image))
        assert read.pixels[0, :, 1].tolist() == VALUES_8, name
        assert "16-bit" in read.steps[0]
    (tmp_path / "a.pgm").write_bytes(b"P5 6 1 65535\n" + VALUES_16.astype(">u2").tobytes())
    assert read_image(tmp_path / "a.pgm").pixels[0, :, 2].tolist() == VALUES_8


def test_16_bit_colour_keeps_its_range(tmp_path):
    rows = b"\0" + np.repeat(VALUES_16[0, :, None], 3, 1).astype(">u2").tobytes()
    (tmp_path / "a.png").write_bytes(png(6, 1, 16, 2, rows))
    assert read_image(tmp_path / "a.png").pixels[0, :, 0].tolist() == VALUES_8


@pytest.mark.parametrize(
    "values", [np.array([[0, 70_000]], np.int32), np.array([[-1, 5]], np.int32), np.ones((2, 2), np.float32)]
)
def test_values_of_unknown_range_are_refused(tmp_path, values):
    with pytest.raises(InputError, match=r"a\.tif"):
        read_image(saved(tmp_path, "a.tif", Image.fromarray(values)))


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "a.jpg"), ("L", "a.png"), ("1", "a.png"), ("YCbCr", "a.jpg")])
def test_other_modes_become_rgb(tmp_path, mode, name):
    grey = Image.fromarray(np.array([[0, 255] * 8] * 16, np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
    image = read_image(saved(tmp_path, name, grey.convert(mode)))
    assert image.pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(image.pixels[2, [1, 6]], [[0] * 3, [255] * 3], atol=12)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_first_image_of_an_animation_is_used(tmp_path, name, caplog):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, name, first, save_all=True, append_images=[second], **options)
    with caplog.at_level("INFO"):
        image = read_image(path)
    assert image.pixels[0, 0].tolist() == [200, 0, 0]
    assert "first of several" in image.steps[0]
    assert "several images" in caplog.text


def test_content_decides_over_the_suffix(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg", format="GIF")
    assert read_image(tmp_path / "a.jpg").size == (40, 60)


def test_one_pixel_is_an_image(tmp_path):
    image = read_image(saved(tmp_path, "a.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    assert image.pixels.tolist() == [[[1, 2, 3]]]
    assert geometry_pixels([image]).shape == (1, 3, 518, 518)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "jpg"])
def test_a_huge_header_is_refused_without_decoding(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(huge_header(suffix))
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "too large" in caught.value.what
    assert "400000000 pixels" in caught.value.why
    assert "--skip-bad" in caught.value.fix
    assert peak < 10_000_000


def huge_header(suffix: str) -> bytes:
    if suffix == "png":
        return png(20_000, 20_000, 8, 2, b"\0")
    if suffix == "ppm":
        return b"P6 20000 20000 255\n\0\0\0"
    buffer = io.BytesIO()
    Image.new("RGB", (100, 100)).save(buffer, {"bmp": "BMP", "tif": "TIFF", "jpg": "JPEG"}[suffix])
    data, small = bytearray(buffer.getvalue()), {"bmp": "<ii", "tif": "", "jpg": ">HH"}[suffix]
    if suffix == "tif":
        for tag in (256, 257):
            data = data.replace(struct.pack("<HHII", tag, 4, 1, 100), struct.pack("<HHII", tag, 4, 1, 20_000))
        return bytes(data)
    return bytes(data.replace(struct.pack(small, 100, 100), struct.pack(small, 20_000, 20_000), 1))


def test_the_limits_are_arguments(tmp_path):
    path = saved(tmp_path, "a.png", Image.fromarray(picture(40, 60)))
    assert read_image(path, max_pixels=2400, max_side=60).size == (40, 60)
    with pytest.raises(InputError, match="60 x 40"):
        read_image(path, max_pixels=2399)
    with pytest.raises(InputError, match="too large"):
        read_image(path, max_side=59)


def test_an_image_between_pils_limit_and_ours_is_read_without_a_warning(tmp_path, monkeypatch):
    path = saved(tmp_path, "a.png", Image.fromarray(picture(40, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert read_image(path).size == (40, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(path)


def test_pil_keeps_its_global_settings(tmp_path):
    import warnings

    from PIL import ImageFile

    path = saved(tmp_path, "a.png", Image.fromarray(picture()))
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    read_image(path)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("keep", [0.5, 0.01])
def test_truncated_files_name_path_and_bytes(tmp_path, kind, keep):
    data = encoded(kind)
    path = tmp_path / "IMG_0007.png"
    path.write_bytes(data[: max(3, int(keep * len(data)))])
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert str(path) in caught.value.what
    assert f"{path.stat().st_size:,} bytes" in caught.value.why
    assert "--skip-bad" in caught.value.fix


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
def test_damaged_files_are_read_or_refused_but_never_crash(tmp_path, kind):
    data, rng = encoded(kind), np.random.default_rng(7)
    for i in range(40):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 6):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{i}.png"
        path.write_bytes(bytes(damaged))
        try:
            image = read_image(path)
        except InputError:
            continue
        assert (image.pixels.dtype, image.pixels.ndim) == (np.uint8, 3)


@pytest.mark.parametrize(("name", "content", "why"), [
    ("text.jpg", b"hello, I am a letter\n" * 20, "the content is none of"),
    ("zero.png", b"", "empty (0 bytes)"),
    ("page.tif", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "the content is none of"),
])  # fmt: skip
def test_what_is_no_image_is_refused(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in caught.value.what
    assert why in caught.value.why
    assert caught.value.fix


def test_missing_files_folders_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("absent.png", "pipe.png", "link.png", ".", "n" * 300):
        with pytest.raises(InputError):
            read_image(tmp_path / name)


def test_skip_bad_keeps_the_good_ones_in_order(tmp_path, caplog):
    good = [saved(tmp_path, f"{i}.png", Image.fromarray(picture(seed=i))) for i in range(2)]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.png"):
        read_images([good[0], bad, good[1]])
    read, errors = read_images([good[0], bad, good[1]], skip_bad=True)
    assert [image.path for image in read] == good
    assert len(errors) == 1
    assert "bad.png" in errors[0].what
    assert "bad.png" in caplog.text
    with pytest.raises(InputError, match="none of the images"):
        read_images([bad, bad], skip_bad=True)


def test_images_from_memory():
    np.testing.assert_array_equal(from_memory(picture()).pixels, picture())
    np.testing.assert_array_equal(from_memory(picture().astype(np.float32) / 255).pixels, picture())
    np.testing.assert_array_equal(from_memory(Image.fromarray(picture())).pixels, picture())
    for wrong in (
        picture().astype(np.float32),
        np.full((4, 4, 3), np.nan),
        picture()[..., 0],
        picture().astype(np.int64),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((0, 4, 3)),
    ):
        with pytest.raises(InputError):
            from_memory(wrong)


# ---------------------------------------------------------------------------------------------- geometry encoder


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (392, 518)), ((1080, 1920), (294, 518)), ((640, 480), (686, 518)), ((1, 1000), (14, 518)),
     ((1, 1), (518, 518)), ((320, 640), (252, 518)), ((2072, 518), (2072, 518))],
)  # fmt: skip
def test_geometry_size(size, expected):
    assert images.geometry_size(size) == expected
    assert geometry_pixels([source(*size)]).shape == (1, 3, *expected)


def test_geometry_pixels_stretch_everything_to_the_first(caplog):
    pictures = [source(30, 40), source(40, 30, 1), source(60, 80, 2)]
    assert geometry_pixels(pictures[::-1], width=56).shape == (3, 3, 42, 56)
    assert geometry_pixels(pictures[1:], width=56).shape == (2, 3, 70, 56)
    caplog.clear()
    pixels = geometry_pixels(pictures, width=56)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 42, 56), np.float32)
    assert 0 <= pixels.min() < pixels.max() <= 1
    for view, image in zip(pixels, pictures, strict=True):
        expected = np.asarray(Image.fromarray(image.pixels).resize((56, 42), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(np.round(view * 255).astype(np.uint8), expected.transpose(2, 0, 1))
    assert "1 of 3 images are stretched" in caplog.text


def test_width_512_follows_the_evaluation_rule():
    image = source(480, 640)
    lanczos = np.array(Image.fromarray(image.pixels).resize((512, 378), Image.Resampling.LANCZOS))
    tensor = torch.from_numpy(lanczos).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.interpolate(tensor, (378, 504), mode="bilinear", antialias=True)
    pixels = geometry_pixels([image], width=512)
    assert pixels.shape == (1, 3, 378, 504)
    np.testing.assert_array_equal(pixels, expected.numpy())


def test_geometry_pixels_refuse_what_makes_no_sense():
    for wrong in ([], [source(2100, 518)]):
        with pytest.raises(InputError):
            geometry_pixels(wrong)
    with pytest.raises(InputError, match="width 13"):
        geometry_pixels([source(4, 4)], width=13)
