"""The cache of a teacher's targets: what is lost on the way, what is refused, what a killed process leaves behind."""

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from g2vlm.errors import CheckpointError, G2VLMError, InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.targets import TeacherTargets
from g2vlm.supervision.teachers import cache_writer
from g2vlm.supervision.teachers.base import targets_of
from g2vlm.supervision.teachers.cache import CachedTeacher
from g2vlm.supervision.teachers.cache_format import FIELDS, decoded, encoded
from g2vlm.supervision.teachers.cache_writer import (
    CacheWriter,
    Counts,
    Identity,
    prepare_folder,
    shard_files,
    write_clips,
    write_manifest,
)
from g2vlm.supervision.teachers.ground_truth import GroundTruth
from g2vlm.supervision.teachers.registry import build_teacher
from tests.g2vlm.supervision.teachers.fakes import AnalyticScene, SyntheticTeacher

SIZE = (28, 42)
EXACT = ("valid", "cam_to_world", "intrinsics", "metric_scale")


def clip_of(number: int, views: int = 2, size: tuple[int, int] = SIZE) -> Clip:
    """Clip `number` of some; no two have the same pictures."""
    clip = AnalyticScene(size, corner=False, views=views).clip()
    assert clip.scene is not None
    images = ((clip.images + 0.11 * number) % 1 * 255).round().to(torch.uint8)
    return Clip.of(replace(clip.scene, images=images, scene=f"room-{number}"))


CLIPS = [clip_of(number) for number in range(7)]


def make(folder: Path, clips: list[Clip] = CLIPS, fields: tuple[str, ...] = FIELDS, per_shard: int = 2) -> Counts:
    """Fill a cache as one process does."""
    teacher = SyntheticTeacher()
    identity = Identity.of([teacher], fields)
    prepare_folder(folder, identity)
    counts = write_clips(CacheWriter(folder, identity, per_shard), [teacher], clips)
    write_manifest(folder, identity)
    return counts


def taught(clip: Clip) -> TeacherTargets:
    found = SyntheticTeacher().complete(clip, None)
    assert found is not None
    return found


def content(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every clip that the manifest names, wherever it is."""
    manifest = json.loads((folder / "manifest.json").read_text())
    every = {key: value for shard in shard_files(folder) for key, value in load_file(shard).items()}
    assert manifest["count"] == len({name.split(".")[0] for name in every})
    return every


def same_content(one: Path, other: Path) -> None:
    first, second = content(one), content(other)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for clip in CLIPS:
        assert CachedTeacher(other).complete(clip, None) is not None


# What is written is read.


def test_round_trip_is_within_the_stated_error(tmp_path: Path) -> None:
    assert make(tmp_path / "c") == Counts(made=7)
    teacher = build_teacher("cache", tmp_path / "c")
    assert not teacher.online
    assert teacher.features == SyntheticTeacher.features
    for clip in CLIPS:
        ours, truth = teacher.complete(clip, None), taught(clip)
        for name in EXACT:
            assert torch.equal(getattr(ours, name), getattr(truth, name)), name
        seen = truth.valid
        assert ((ours.depth / truth.depth - 1).abs()[seen] <= 2**-11 * 1.01).all()
        assert (ours.depth[~seen] == 0).all()
        log, true_log = ours.confidence.log(), truth.confidence.log()
        assert (log - true_log).abs().max() <= (true_log.max() - true_log.min()) / 510 * 1.01
        assert (log - true_log).abs().max() > 0
        torch.testing.assert_close(ours.points, truth.points, rtol=2**-10, atol=1e-4)
        assert all(torch.equal(ours.features[block], truth.features[block]) for block in truth.features)
        assert ours.info == truth.info
        assert (ours.num_views, ours.size, ours.confidence_kind) == (2, SIZE, "one_plus_exp")
        torch.testing.assert_close(ours.mean_distance, truth.mean_distance, rtol=1e-3, atol=0)


def test_what_was_not_kept_or_not_wanted_is_absent(tmp_path: Path) -> None:
    make(tmp_path / "few", fields=("depth", "features"))
    found = CachedTeacher(tmp_path / "few").complete(CLIPS[0], None)
    for name in (*EXACT, "confidence", "points"):
        assert getattr(found, name) is None, name
    plain = CachedTeacher(tmp_path / "few", features=False)
    assert plain.features is None
    assert plain.complete(CLIPS[0], None).features is None
    make(tmp_path / "none", fields=("depth",))
    assert CachedTeacher(tmp_path / "none").features is None
    with pytest.raises(InputError, match="known are depth"):
        make(tmp_path / "wrong", fields=("deepness",))


@pytest.mark.parametrize("kind", ["sigmoid", "one_plus_exp"])
def test_odd_numbers_survive(kind: str) -> None:
    clip, truth = CLIPS[0], taught(CLIPS[0])
    depth = truth.depth.clone()
    depth[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -1.0, 1e9])
    confidence = torch.sigmoid(truth.confidence) if kind == "sigmoid" else truth.confidence
    confidence[0, 1, 0] = torch.nan
    odd = replace(truth, depth=depth, confidence=confidence, valid=None, confidence_kind=kind, points=None)
    ours = decoded(encoded(clip, odd, FIELDS))
    assert ours.confidence_kind == kind
    assert not ours.valid[0, 0, :4].any()
    assert ours.valid.sum() == ours.valid.numel() - 4
    torch.testing.assert_close(ours.depth[ours.valid], truth.depth[ours.valid], rtol=2**-11, atol=0)
    usable = confidence.isfinite()
    torch.testing.assert_close(ours.confidence[usable], confidence[usable], rtol=0.02, atol=0)
    torch.testing.assert_close(ours.confidence[0, 1, 0], confidence[usable].min())
    flat = decoded(encoded(clip, replace(odd, confidence=torch.full_like(confidence, 1.5)), FIELDS))
    torch.testing.assert_close(flat.confidence, torch.full_like(confidence, 1.5))
    nothing = decoded(encoded(clip, replace(odd, depth=torch.zeros_like(depth)), FIELDS))
    assert not nothing.valid.any()
    wide = torch.where(torch.arange(depth.shape[2]) < 2, 1e-9, depth.nan_to_num(1).clamp(1, 2))
    assert not decoded(encoded(clip, replace(odd, depth=wide), FIELDS)).valid[:, :, :2].any()  # below float16's range


def test_targets_made_under_inference_mode_are_stored() -> None:
    with torch.inference_mode():
        truth = taught(CLIPS[0])
        truth = replace(truth, depth=truth.depth * 2)
    torch.testing.assert_close(decoded(encoded(CLIPS[0], truth, ("depth", "valid"))).valid, truth.valid)


def test_clips_that_are_not_supervised_are_known_as_such(tmp_path: Path) -> None:
    mute = replace(CLIPS[1], scene=None)
    make(tmp_path / "c", [CLIPS[0], mute])
    teacher = CachedTeacher(tmp_path / "c")
    assert teacher.complete(mute, None) is None
    known = taught(mute if mute.scene else CLIPS[0])
    assert teacher.complete(mute, replace(known, features=None)).depth is known.depth


def test_it_adds_features_to_known_geometry(tmp_path: Path) -> None:
    make(tmp_path / "c", fields=("features",))
    found = targets_of([GroundTruth(), CachedTeacher(tmp_path / "c")], CLIPS[2])
    assert torch.equal(found.depth, CLIPS[2].scene.depth)
    assert set(found.features) == {1, 3}
    assert found.info.teacher == "ground truth of analytic + synthetic"
    complete = taught(CLIPS[2])
    assert CachedTeacher(tmp_path / "c").complete(clip_of(99), complete) is complete


# What is refused.


def cut_frames(clip: Clip) -> Clip:
    return Clip.of(clip_of(3, views=3).scene.views(torch.tensor([0, 2])))


def swapped(clip: Clip) -> Clip:
    return Clip.of(clip.scene.views(torch.tensor([1, 0])))


REFUSED: list[tuple[Callable[[Clip], Clip], str]] = [
    (lambda clip: clip_of(50), "holds 7 other clips"),
    (cut_frames, "the cache has other frames of it"),
    (swapped, "the cache has other frames of it"),
    (lambda clip: clip_of(3, size=(42, 42)), "at another size"),
    (lambda clip: replace(clip, images=(clip.images + 0.05).clamp(0, 1)), "shows other pictures"),
    (lambda clip: replace(clip, images=clip.images.flip(0)), "frames 0, 1 of 2 differ"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_other_clips_and_frames_are_refused(tmp_path: Path, change: Callable[[Clip], Clip], message: str) -> None:
    make(tmp_path / "c")
    with pytest.raises(InputError, match=message) as raised:
        CachedTeacher(tmp_path / "c").complete(change(CLIPS[3]), None)
    assert raised.value.fix
    assert "\n" not in raised.value.what + raised.value.why + raised.value.fix


def test_other_decoders_are_not_refused(tmp_path: Path) -> None:
    make(tmp_path / "c")
    noise = torch.randint(-1, 2, CLIPS[3].images.shape, generator=torch.Generator().manual_seed(0)) / 255
    near = replace(CLIPS[3], images=(CLIPS[3].images + noise).clamp(0, 1))
    assert CachedTeacher(tmp_path / "c").complete(near, None) is not None


def test_folders_that_are_no_complete_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is none"):
        CachedTeacher(tmp_path / "nowhere")
    make(tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    whole = manifest.read_text()
    for text in (whole[:100], "[]", whole.replace('"count": 7', '"count": 6'), whole.replace('"version": 1', '"v": 1')):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            CachedTeacher(tmp_path / "c")
    manifest.write_text(whole.replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2"):
        CachedTeacher(tmp_path / "c")
    manifest.unlink()
    with pytest.raises(InputError, match="not complete"):
        CachedTeacher(tmp_path / "c")


def test_another_revision_or_preprocessing_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "c")
    CachedTeacher(tmp_path / "c", revision="1", preprocessing="wide")
    with pytest.raises(InputError, match="revision"):
        CachedTeacher(tmp_path / "c", revision="2")
    with pytest.raises(InputError, match="preprocessing"):
        CachedTeacher(tmp_path / "c", preprocessing="narrow")
    other = SyntheticTeacher(wide=False)
    with pytest.raises(InputError, match="preprocessing: wide there, narrow now"):
        prepare_folder(tmp_path / "c", Identity.of([other], FIELDS))
    with pytest.raises(InputError, match="fields"):
        prepare_folder(tmp_path / "c", Identity.of([SyntheticTeacher()], ["depth"]))


def test_nothing_is_written_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no cache"):
        make(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def flipped(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-50])


def of_another_cache(shard: Path) -> None:
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
    identity = replace(Identity.of([SyntheticTeacher()], FIELDS), preprocessing="narrow")
    save_file(load_file(shard), shard, {**metadata, "identity": json.dumps(identity.plain)})


def record_changed(shard: Path) -> None:
    data = shard.read_bytes()
    assert data.count(b"one_plus_exp") > 0
    shard.write_bytes(data.replace(b"one_plus_exp", b"one_plus_exq"))


def refusal(folder: Path, clip: Clip) -> CheckpointError | None:
    try:
        CachedTeacher(folder).complete(clip, None)
    except CheckpointError as error:
        return error
    return None


@pytest.mark.parametrize("harm", [flipped, cut, of_another_cache, record_changed, Path.unlink])
def test_damaged_shards_are_refused_and_made_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    make(tmp_path / "whole")
    make(tmp_path / "c")
    shard = shard_files(tmp_path / "c")[1]
    harm(shard)
    refused = [error for clip in CLIPS if (error := refusal(tmp_path / "c", clip)) is not None]
    assert len(refused) in (1, 2)
    assert all(shard.name in error.what and "run train.cache_teacher again" in error.fix for error in refused)
    shard.unlink(missing_ok=True)
    assert make(tmp_path / "c").made == 2
    same_content(tmp_path / "whole", tmp_path / "c")


# Processes.


def killed(folder: Path, work: Callable[[], None]) -> None:
    """Run something in a forked process that ends by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()


def dying(monkeypatch: pytest.MonkeyPatch, holder: object, name: str, call: int) -> None:
    """Let a function kill its process, leaving half a file, when it is called for the `call`-th time."""
    original, calls = getattr(holder, name), [0]

    def late(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            if name == "save_file":
                Path(str(arguments[1])).write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    monkeypatch.setattr(holder, name, late)


MOMENTS = {"asking": (SyntheticTeacher, "complete", 6), "writing": (cache_writer, "save_file", 2),
           "renaming": (cache_writer.os, "replace", 3)}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_process_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    make(tmp_path / "whole")
    folder = tmp_path / "c"

    def work() -> None:
        dying(monkeypatch, *MOMENTS[moment])
        make(folder)

    killed(folder, work)
    with pytest.raises(InputError, match="not complete"):
        CachedTeacher(folder)
    written = len(shard_files(folder))
    assert written in (1, 2)
    assert make(folder) == Counts(made=7 - 2 * written, there=2 * written)
    assert not [entry for entry in folder.iterdir() if entry.name.endswith(".partial")]
    same_content(tmp_path / "whole", folder)


def test_several_processes_make_the_cache_of_one(tmp_path: Path) -> None:
    make(tmp_path / "one")
    identity = Identity.of([SyntheticTeacher()], FIELDS)
    prepare_folder(tmp_path / "two", identity)
    context = multiprocessing.get_context("fork")
    shares = [CLIPS[:4], CLIPS[3:]]  # they overlap
    processes = [
        context.Process(
            target=write_clips, args=(CacheWriter(tmp_path / "two", identity, 2), [SyntheticTeacher()], share)
        )
        for share in shares
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert write_manifest(tmp_path / "two", identity)["count"] == 7
    same_content(tmp_path / "one", tmp_path / "two")


def test_repeated_clips_are_asked_about_once(tmp_path: Path) -> None:
    teacher, identity = SyntheticTeacher(), Identity.of([SyntheticTeacher()], FIELDS)
    prepare_folder(tmp_path / "c", identity)
    counts = write_clips(CacheWriter(tmp_path / "c", identity), [teacher], [CLIPS[0], CLIPS[1], CLIPS[0]])
    assert counts == Counts(made=2, there=1)
    assert teacher.asked == [CLIPS[0].name, CLIPS[1].name]


def _ask(teacher: CachedTeacher, results: "multiprocessing.SimpleQueue[float]") -> None:
    results.put(float(sum(teacher.complete(clip, None).depth.sum() for clip in CLIPS)))


def test_forked_workers_read_what_their_parent_reads_and_few_files_stay_open(tmp_path: Path) -> None:
    make(tmp_path / "c", per_shard=1)
    teacher = CachedTeacher(tmp_path / "c")
    expected = float(sum(teacher.complete(clip, None).depth.sum() for clip in CLIPS))
    assert len(teacher._open) <= 4 < len(shard_files(tmp_path / "c"))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_ask, args=(teacher, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(), results.get()] == [expected, expected]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    copy = pickle.loads(pickle.dumps(teacher))  # what a process that is not forked gets
    assert torch.equal(copy.complete(CLIPS[0], None).depth, teacher.complete(CLIPS[0], None).depth)


def test_full_disks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_writer, "save_file", full)
    with pytest.raises(G2VLMError, match="disk full"):
        make(tmp_path / "c")
