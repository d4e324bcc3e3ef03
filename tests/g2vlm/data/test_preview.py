from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.cli import main
from g2vlm.data.canonical import CanonicalSource
from g2vlm.data.frames import assemble
from g2vlm.data.image_folder import ImageFolderSource
from g2vlm.data.preview import contact_sheet, instance_colours, load_samples
from g2vlm.errors import InputError
from g2vlm.preview import NOTHING, WIDTH
from tests.g2vlm.data.scenes import FACTS, room_frames, write_canonical


def has_colour(page: Image.Image, colour: tuple[int, ...]) -> bool:
    return bool((np.asarray(page) == colour).all(-1).any())


def test_one_block_per_scene_one_column_per_view(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_canonical(tmp_path / name, room_frames(5))
    samples = load_samples(CanonicalSource(tmp_path), num_scenes=2, num_views=3)
    assert [sample.view_ids for sample in samples] == [("view-00", "view-02", "view-04")] * 2
    sheet, one = contact_sheet(samples), contact_sheet(samples[:1])
    assert sheet.width == WIDTH
    assert sheet.height - one.height == pytest.approx(one.height, abs=30)


def test_rows_show_what_is_known(tmp_path: Path) -> None:
    full = assemble(room_frames(2), FACTS, (84, 112))
    instances = torch.arange(2 * 84 * 112, dtype=torch.int32).reshape(2, 84, 112) // 2000
    with_instances = contact_sheet([replace(full, instances=instances)])
    without = contact_sheet([full])
    plain = contact_sheet([replace(full, depth=None, valid=None)])
    assert with_instances.height > without.height > plain.height


def test_invalid_pixels_are_grey_in_depth_and_normals() -> None:
    full = assemble(room_frames(1), FACTS, (84, 112))
    assert full.depth is not None
    assert not has_colour(contact_sheet([full]), NOTHING)
    holes = torch.ones_like(full.depth, dtype=torch.bool)
    holes[:, 20:60, 20:60] = False
    page = np.asarray(contact_sheet([replace(full, valid=holes, depth=torch.where(holes, full.depth, torch.nan))]))
    grey = (page == NOTHING).all(-1)
    assert grey.mean() > 0.02
    assert len(set(grey.sum(1).nonzero()[0].tolist())) > 100


def test_instances_keep_their_colours() -> None:
    first = instance_colours(np.array([[0, 1, 2], [2, -1, 30]]))
    assert (first[0, 2] == first[1, 0]).all()
    assert tuple(first[1, 1]) == NOTHING
    colours = instance_colours(np.arange(25)[None])[0].astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(25, dtype=int)
    assert distance.min() > 10


def test_images_alone(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert contact_sheet(load_samples(ImageFolderSource(tmp_path))).width == WIDTH


def test_rooms(tmp_path: Path) -> None:
    output = tmp_path / "rooms.png"
    assert main(["data", "preview", "rooms", "-o", str(output), "--views", "2", "--scenes", "1"]) == 0
    with Image.open(output) as sheet:
        assert sheet.width == WIDTH


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_canonical(tmp_path / "room")
    output = tmp_path / "out" / "sheet.png"
    arguments = ["data", "preview", str(tmp_path / "room"), "-o", str(output), "--views", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as sheet:
        assert sheet.width == WIDTH
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main([*arguments[:3], "-o", str(tmp_path / "sheet.jpg")]) == 2
    with pytest.raises(InputError, match="nothing to show"):
        load_samples(CanonicalSource(tmp_path), num_views=0)
