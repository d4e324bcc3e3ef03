import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.cli import main
from g2vlm.data.canonical import CanonicalSource
from g2vlm.data.checks import CheckRules, Report, check_source, intrinsics_faults
from g2vlm.data.frames import Frame, assemble
from g2vlm.data.types import SceneSample, ViewRequest
from tests.g2vlm.data.scenes import FACTS, changed, room_frames, write_canonical

FLIP = np.diag([1.0, -1, -1, 1])


def check(folder: Path, frames: Sequence[Frame] | None = None, **rules) -> Report:
    write_canonical(folder, frames, depth_encoding="npz")
    return check_source(CanonicalSource(folder), CheckRules(**rules))


def test_a_good_scene_passes(tmp_path: Path) -> None:
    report = check(tmp_path, room_frames(8))
    assert report.failures == []
    scene = report.scenes[0]
    assert (scene.name, scene.views, scene.bad, scene.verdict) == ("room", 8, [], "ok")
    assert scene.agreement is not None
    assert scene.agreement.pairs >= 8
    assert scene.agreement.error < 0.01
    assert scene.valid_depth == 1


def ray_distances(frame: Frame) -> Frame:
    assert frame.depth is not None
    assert frame.intrinsics is not None
    rows, columns = np.mgrid[: frame.depth.shape[0], : frame.depth.shape[1]]
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(frame.intrinsics).T
    return replace(frame, depth=(frame.depth * np.linalg.norm(rays, axis=-1)).astype(np.float32))


WRONG = {
    "world_to_cam": lambda frames: changed(frames, cam_to_world=np.linalg.inv),
    "OpenGL axes": lambda frames: changed(frames, cam_to_world=lambda pose: pose @ FLIP),
    "distances along the rays": lambda frames: [ray_distances(frame) for frame in frames],
    "do not fit": lambda frames: changed(frames, intrinsics=lambda K: K * [[1.6, 0, 1], [0, 1.6, 1], [0, 0, 1]]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("num_views", [4, 8])
def test_mistakes_are_caught_and_named(tmp_path: Path, mistake: str, num_views: int) -> None:
    report = check(tmp_path, WRONG[mistake](room_frames(num_views)))
    assert len(report.failures) == 1
    assert mistake in report.failures[0]


def test_poses_in_millimetres_are_caught(tmp_path: Path) -> None:
    def in_millimetres(pose: np.ndarray) -> np.ndarray:
        return np.block([[pose[:3, :3], 1000 * pose[:3, 3:]], [pose[3:]]])

    scene = check(tmp_path, changed(room_frames(8), cam_to_world=in_millimetres)).scenes[0]
    assert scene.verdict != "ok"


def test_views_of_different_places_are_a_warning(tmp_path: Path) -> None:
    frames = list(room_frames(4)[::3])  # looking at each other from both sides
    far = np.eye(4)
    far[0, 3] = 100
    frames[1] = replace(frames[1], cam_to_world=far)
    report = check(tmp_path, frames)
    assert report.failures == []
    assert "unchecked" in report.scenes[0].warnings[0]


def test_views_that_hardly_move_are_a_warning(tmp_path: Path) -> None:
    frame = room_frames()[0]
    report = check(tmp_path, [replace(frame, name=f"{i}") for i in range(3)])
    assert report.failures == []
    assert "hardly move" in report.scenes[0].warnings[0]


def test_little_depth_is_bad(tmp_path: Path) -> None:
    frames = list(room_frames(8))
    frames[2] = replace(frames[2], depth=np.zeros_like(frames[2].depth))
    report = check(tmp_path, frames)
    assert report.scenes[0].bad == ["room/view-02: only 0.00% of its depth is valid"]
    assert report.failures == ["1 of 8 frames are bad, more than 5.0%"]
    assert check(tmp_path / "again", frames, max_bad=0.2).failures == []


def test_rotations_nearly_orthonormal_are_a_warning(tmp_path: Path) -> None:
    report = check(tmp_path, changed(room_frames(), cam_to_world=lambda pose: pose * [[1.002], [1], [1], [1]]))
    assert report.failures == []
    assert "orthonormal to 4.0e-03" in report.scenes[0].warnings[0]


@pytest.mark.parametrize(
    ("K", "message"),
    [
        ([[0, 0, 50], [0, 100, 40], [0, 0, 1]], "not positive"),
        ([[100, 0, 50], [0, -100, 40], [0, 0, 1]], "not positive"),
        ([[100, 0, 10], [0, 100, 40], [0, 0, 1]], "middle 60%"),
        ([[100, 0, 50], [0, 100, 70], [0, 0, 1]], "middle 60%"),
        ([[100, 0, np.nan], [0, 100, 40], [0, 0, 1]], "not finite"),
    ],
)
def test_intrinsics(K: list, message: str) -> None:
    assert message in intrinsics_faults(np.array(K, float), (80, 100))[0]
    assert intrinsics_faults(np.array([[100, 0, 50], [0, 100, 40], [0, 0, 1.0]]), (80, 100)) == []


class Rendered:
    """A source that stores no frames."""

    name = "rendered"

    def __init__(self, frames: Sequence[Frame]):
        self.frames = frames

    def __len__(self) -> int:
        return 1_000_000

    def num_views(self, scene: int) -> int:
        return len(self.frames)

    def load(self, scene: int, request: ViewRequest) -> SceneSample:
        return assemble(self.frames[: request.num_views], FACTS, request.size)


def test_rendered_sources_are_checked_by_their_samples() -> None:
    report = check_source(Rendered(room_frames()))
    assert len(report.scenes) == 8
    assert report.failures == []
    wrong = check_source(Rendered(WRONG["world_to_cam"](room_frames())), CheckRules(max_scenes=2))
    assert len(wrong.failures) == 2


def test_values_that_are_not_finite_in_samples(tmp_path: Path) -> None:
    class Broken(Rendered):
        def load(self, scene: int, request: ViewRequest) -> SceneSample:
            sample = super().load(scene, request)
            assert sample.depth is not None
            assert sample.cam_to_world is not None
            sample.depth[1, 5, 5] = torch.nan
            sample.cam_to_world[2, 0, 0] = torch.inf
            return sample

    bad = check_source(Broken(room_frames()), CheckRules(max_scenes=1)).scenes[0].bad
    assert "1 depth values are not finite" in bad[0]
    assert "the pose is not finite" in bad[1]


# ---------------------------------------------------------------------------------------------- command


def test_command_passes_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_canonical(tmp_path, room_frames(8))
    assert main(["data", "check", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["scene", "views", "bad", "size", "rotation", "depth", "reprojection", "pairs", "result"]
    assert row.split()[:4] == ["room", "8", "0", "112x84"]
    assert row.split()[-1] == "ok"


def test_command_checks_rooms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "rooms", "--max-scenes", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_command_fails_on_swapped_poses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_canonical(tmp_path, WRONG["world_to_cam"](room_frames(8)))
    assert main(["data", "check", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "FAIL  room: " in out
    assert "look like world_to_cam" in out
    assert "failed" in err
    assert "Traceback" not in err


def test_command_lists_damaged_files_and_keeps_the_quota(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        Image.fromarray(np.full((40, 60, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"\x89PNG")
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count(str(tmp_path / "7.png")) == 1
    assert main(["data", "check", str(tmp_path), "--max-bad", "0.04"]) == 1
    assert "1 of 20 frames are bad, more than 4.0%" in capsys.readouterr().out


def test_command_reports_a_scene_it_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_canonical(tmp_path / "good", room_frames(4))
    write_canonical(tmp_path / "worse", room_frames(4))
    path = tmp_path / "worse" / "scene_meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frame": []}))
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "room" in out
    assert str(path) in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "missing data folder"),
        (["nothing", "--max-bad", "3"], "limits"),
        (["nothing", "--max-frames", "0"], "limits"),
        (["nothing", "--dataset", "images", "--depth", "proj"], "unknown option"),
    ],
)
def test_command_refuses_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", "check", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
