"""`g2vlm lift`: what it writes, and what it says and does about bad input. All through `main`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from g2vlm.checkpoint import load_model, save_model
from g2vlm.cli import main
from g2vlm.lifting import lift, open_heads
from g2vlm.pipeline import Pipeline, read_sources
from g2vlm.scene import Scene
from g2vlm.supervision.backbones import backbone_of
from g2vlm.supervision.base import Fit, Supervision
from g2vlm.supervision.dense_head import DPTWidths
from g2vlm.supervision.geovr import GeoVR, GeoVRHeads
from g2vlm.supervision.saved import write_supervision
from g2vlm.supervision.spatialsv import SpatialSV, SpatialSVHeads
from tests.g2vlm.talkative import talkative_model
from tests.test_cli import assert_fails, empty_folder, missing_file, photo, text_as_jpeg, truncated_jpeg

ALL = SpatialSVHeads(output_dim=8, widths=DPTWidths((8, 8, 8, 8), 8), distill=False)
HEADS = {
    "spatialsv": ALL,
    "depth_alone": SpatialSVHeads(output_dim=8, tasks=("depth",), widths=ALL.widths, distill=False),
    "points_alone": SpatialSVHeads(output_dim=8, tasks=("point", "ray"), widths=ALL.widths, distill=False),
}
GEOVR = GeoVRHeads(
    terms=("camera", "depth", "scale"), camera_dim=8, scale_dim=8, dpt_levels=(8, 8, 8, 8), dpt_dim=8,
    predict_confidence=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that looks at its images, with the heads that a run leaves beside it."""
    folder = tmp_path_factory.mktemp("run")
    save_model(talkative_model(), folder / "model")
    fit = Fit.of(backbone_of(load_model(folder / "model")))
    for name, config in HEADS.items():
        write(folder / "heads", name, SpatialSV(config, fit))
    write(folder / "heads", "geovr", GeoVR(GEOVR, fit))
    write(folder / "heads", "narrow", SpatialSV(ALL, Fit(fit.width // 2, fit.num_layers)))
    write(folder / "heads", "deep", SpatialSV(ALL, Fit(fit.width, 28)))
    return folder / "model"


def write(folder: Path, name: str, module: Supervision) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_supervision(folder, name, module, module.state_dict())


@pytest.fixture
def run(model: Path):
    """Runs `g2vlm lift` with one of the heads."""

    def call(*arguments: object, heads: str = "spatialsv") -> int:
        options = ["--model", model, "--heads", model.parent / "heads" / heads, "--device", "cpu"]
        return main(["lift", *map(str, (*arguments, *options))])

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate(((120, 90), (120, 90), (60, 90))):  # the last one is portrait
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"view{index}.png")
    return folder


def test_lift_writes_every_format_and_says_what_it_lifted(run, photos: Path, tmp_path: Path, capsys, caplog) -> None:
    caplog.set_level("INFO")
    output = tmp_path / "out"
    assert run(photos, "-o", output) == 0
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    depths = {f"depth/{view:04d}.png" for view in range(3)}
    assert (
        names == {"points.ply", "points.glb", "cameras.json", "preview.png", "scene.json", "scene.safetensors"} | depths
    )
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == {Path(name).name for name in names}
    (said,) = [line for line in caplog.messages if line.startswith("lifted")]
    assert "3 views" in said
    assert "spatialsv heads" in said
    assert "depth seen from the cameras of the ray map; lengths are relative" in said
    assert sum("1 of 3 images are stretched" in line for line in caplog.messages) == 1
    for name in depths:
        with Image.open(output / name) as file:
            depth = np.array(file)
        assert depth.dtype == np.uint16
        assert depth.min() > 0
        assert len(np.unique(depth)) > 20
    cameras = json.loads((output / "cameras.json").read_text())
    assert cameras["units"] == "up to scale"
    assert [(view["width"], view["height"]) for view in cameras["views"]] == [(120, 90), (120, 90), (60, 90)]


def test_depth_and_points_are_different_views_of_the_same_cameras(run, photos: Path, tmp_path: Path) -> None:
    for source in ("depth", "points"):
        assert run(photos, "-o", tmp_path / source, "--from", source, "--formats", "scene") == 0
    depth, points = (Scene.load(tmp_path / source) for source in ("depth", "points"))
    np.testing.assert_array_equal(depth.cam_to_world, points.cam_to_world)
    assert np.abs(depth.local_points - points.local_points).max() > 1e-3
    assert points.confidence is not None
    assert points.confidence.min() > 1


def test_what_is_lifted_is_what_the_heads_predict(model: Path, photos: Path) -> None:
    """The depth is that of the heads, and follows the images; the geometric expert has a say when it sees them."""
    chat = Pipeline(load_model(model), "own").chat
    heads = open_heads(model.parent / "heads" / "spatialsv")
    sources = read_sources(str(photos))
    seen = []
    hook = heads.supervision.heads.register_forward_hook(lambda *given: seen.append(given[-1][0]))
    scene = lift(chat, heads, sources)
    hook.remove()
    np.testing.assert_allclose(scene.depth, seen[0].maps["depth"].values[..., 0], rtol=1e-6)
    np.testing.assert_array_equal(scene.confidence, seen[0].maps["depth"].confidence)
    other = lift(chat, heads, [sources[i] for i in (1, 0, 2)])
    assert np.abs(other.depth[[1, 0, 2]] - scene.depth).max() > 1e-6  # the second image is seen after the first
    assert np.abs(other.depth[0] - scene.depth[0]).max() > 1e-4
    assert np.abs(lift(chat, heads, sources, geometry=True).depth - scene.depth).max() > 1e-6


def test_geovr_heads_give_metres(run, photos: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    assert run(photos, "-o", tmp_path / "out", "--formats", "scene", "cameras", heads="geovr") == 0
    scene = Scene.load(tmp_path / "out")
    assert scene.units == "metre"
    np.testing.assert_allclose(scene.cam_to_world[0], np.eye(4), atol=1e-6)
    assert any("lengths are in metres, as the heads have it" in line for line in caplog.messages)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_one_image_of_any_mode(run, mode: str, tmp_path: Path) -> None:
    assert run(photo(tmp_path / "one.png", (60, 90), mode), "-o", tmp_path / "out", "--formats", "depth") == 0


def test_a_photo_on_its_side_is_turned_upright(run, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(photo(tmp_path / "one.png", (120, 60))) as image:
        image.save(tmp_path / "turned.jpg", exif=exif)
    assert run(tmp_path / "turned.jpg", "-o", tmp_path / "out", "--formats", "cameras", "depth") == 0
    (view,) = json.loads((tmp_path / "out" / "cameras.json").read_text())["views"]
    assert (view["width"], view["height"]) == (60, 120)
    with Image.open(tmp_path / "out" / "depth" / "0000.png") as depth:
        assert depth.height > depth.width


@pytest.mark.parametrize("make", [empty_folder, text_as_jpeg, truncated_jpeg, missing_file])
def test_bad_images(run, make, tmp_path: Path, capsys) -> None:
    image = make(tmp_path)
    assert_fails(2, capsys, run(image, "-o", tmp_path / "out"), image.name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("heads", "options", "code", "named"),
    [
        ("absent", (), 2, "spatialsv"),
        ("narrow", (), 5, "do not belong to"),
        ("deep", (), 5, "28 layers"),
        ("depth_alone", (), 2, "lack ray"),
        ("points_alone", ("--from", "depth"), 2, "lack depth"),
        ("spatialsv", ("--from", "rays"), 2, "--from depth or points"),
        ("geovr", ("--from", "points"), 2, "--from depth"),
    ],
)
def test_wrong_heads(run, photos: Path, tmp_path: Path, capsys, heads, options, code, named) -> None:
    assert_fails(code, capsys, run(photos, "-o", tmp_path / "out", *options, heads=heads), named)
    assert not (tmp_path / "out").exists()


def test_without_depth_the_points_are_lifted(run, photos: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    assert run(photos, "-o", tmp_path / "out", "--formats", "ply", heads="points_alone") == 0
    assert any("points as predicted" in line for line in caplog.messages)


def test_damaged_heads(run, model: Path, photos: Path, tmp_path: Path, capsys) -> None:
    for name in ("spatialsv.json", "spatialsv.safetensors"):
        (tmp_path / name).write_bytes((model.parent / "heads" / name).read_bytes()[:200])
    assert_fails(5, capsys, run(photos, "-o", tmp_path / "out", heads=str(tmp_path / "spatialsv")), "spatialsv.json")


def test_an_output_with_content_is_left_alone(run, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    assert_fails(2, capsys, run(photos, "-o", tmp_path / "out"), "out")
    assert run(photos, "-o", tmp_path / "out", "--formats", "depth", "--overwrite") == 0
    assert (tmp_path / "out" / "kept.txt").read_text() == "mine"
