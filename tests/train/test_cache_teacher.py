"""The command that caches a teacher's targets for a run: the same clips as the run sees, in any number of processes."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from g2vlm.data.chat.batch import shown_clip
from g2vlm.data.chat.fixed import FixedSamples
from g2vlm.data.chat.registry import build_chat_source
from g2vlm.errors import InputError
from g2vlm.geometry_tokens import Clip
from g2vlm.supervision.teachers.cache import CachedTeacher
from g2vlm.supervision.teachers.cache_writer import CacheWriter, shard_files
from g2vlm.supervision.teachers.ground_truth import GroundTruth
from tests.train.chats import Colours
from train import cache_teacher
from train.cache_teacher import carry_out, main

FIXED = {"fixed_samples": 5, "fixed_seed": 2}


def write_run(folder: Path, *sources: dict, **data: object) -> str:
    chat = {"sources": list(sources), "view_size": [28, 28], "tokens_per_pack": 2048, **data}
    run = {"objectives": {"geometry": None, "language": {}}, "data": {"chat": chat}}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return str(file)


def rooms(**options: object) -> dict:
    return {"name": "rooms_qa", "options": {**FIXED, **options}}


def cache(folder: Path, run: str, *arguments: str) -> str:
    options = ["--config", run, "--teacher", "ground_truth", "--output", str(folder), "--clips-per-shard", "2"]
    return carry_out([*options, *arguments])


def source_of(**options: object) -> FixedSamples:
    source = build_chat_source("rooms_qa", None, (28, 28), **{**FIXED, **options})
    assert isinstance(source, FixedSamples)
    return source


def every_clip(source: FixedSamples) -> list[Clip]:
    return [Clip.of(clip) for sample in source if (clip := shown_clip(sample)) is not None]


def content(folder: Path) -> dict[str, torch.Tensor]:
    return {clip.name: CachedTeacher(folder).complete(clip, None).depth for clip in every_clip(source_of())}


def test_a_run_finds_what_its_teacher_said(tmp_path: Path) -> None:
    line = cache(tmp_path / "c", write_run(tmp_path, rooms()))
    assert line.startswith(f"{tmp_path / 'c'}: 5 clips of ground_truth (5 new, 0 of them without targets), 0 samples")
    teacher = CachedTeacher(tmp_path / "c")
    source = source_of()
    for index in range(5):
        for seed in (0, 123):  # whatever seed a run draws
            clip = Clip.of(shown_clip(source.load(index, seed)))
            ours, truth = teacher.complete(clip, None), GroundTruth().complete(clip, None)
            torch.testing.assert_close(ours.depth, truth.depth, rtol=2**-11, atol=0)
            assert torch.equal(ours.cam_to_world, truth.cam_to_world)
            assert ours.info == truth.info
    assert "(0 new" in cache(tmp_path / "c", write_run(tmp_path, rooms()))


@pytest.mark.parametrize(
    "options", [{"fixed_seed": 3}, {"fixed_samples": 6}, {"views": [4, 4]}, {"split": "heldout", "seed": 1}]
)
def test_a_run_with_other_frames_stops_with_a_clear_error(tmp_path: Path, options: dict) -> None:
    cache(tmp_path / "c", write_run(tmp_path, rooms()))
    teacher = CachedTeacher(tmp_path / "c")
    clips = every_clip(source_of(**options))
    with pytest.raises(InputError, match="is not in the cache") as raised:
        [teacher.complete(clip, None) for clip in clips]
    assert "fixed_seed" in raised.value.fix or "train.cache_teacher" in raised.value.fix


def test_validation_sources_are_cached_too(tmp_path: Path) -> None:
    held_out = {**rooms(split="heldout", seed=1, fixed_samples=2), "weight": 1.0}
    line = cache(tmp_path / "c", write_run(tmp_path, rooms(), validation=[held_out]))
    assert "7 clips" in line
    for clip in every_clip(source_of(split="heldout", seed=1, fixed_samples=2)):
        assert CachedTeacher(tmp_path / "c").complete(clip, None) is not None


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_two_processes_make_the_cache_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(cache_teacher, "START", start)
    run = write_run(tmp_path, rooms())
    cache(tmp_path / "one", run)
    assert "5 new" in cache(tmp_path / "two", run, "--processes", "2")
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, rooms())
    cache(tmp_path / "whole", run)

    def work() -> None:
        original, calls = CacheWriter.flush, [0]

        def late(self: CacheWriter) -> None:
            calls[0] += 1
            if calls[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self)

        monkeypatch.setattr(CacheWriter, "flush", late)
        cache(tmp_path / "c", run)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(shard_files(tmp_path / "c")) == 1
    assert "5 clips of ground_truth (3 new" in cache(tmp_path / "c", run)
    whole, again = content(tmp_path / "whole"), content(tmp_path / "c")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_sources_that_draw_other_frames_every_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loose = {"name": "rooms_qa"}
    with pytest.raises(InputError, match="rooms_qa draws other frames every time"):
        cache(tmp_path / "c", write_run(tmp_path, loose))
    assert not (tmp_path / "c").exists()
    scenes = tmp_path / "scenes.yaml"
    scenes.write_text("{}")
    with pytest.raises(InputError, match="the run trains on scenes"):
        cache(tmp_path / "c", str(scenes))
    file = write_run(tmp_path, rooms())
    assert main(["--config", file, "--teacher", "{name: x, roots: 1}", "--output", str(tmp_path / "c")]) == 2
    assert main(["--config", file, "--teacher", "vggt", "--output", str(tmp_path / "c")]) == 3
    assert not (tmp_path / "c").exists()


def test_a_folder_of_another_cache_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, rooms())
    cache(tmp_path / "c", run)
    with pytest.raises(InputError, match="made otherwise"):
        cache(tmp_path / "c", run, "--fields", "depth")


def test_teachers_given_several_times_complete_each_other(tmp_path: Path) -> None:
    run = write_run(tmp_path, rooms(fixed_samples=2))
    both = ["--teacher", "{name: expert, options: {pool: 2}}", "--fields", "depth", "features"]
    assert "2 clips of ground_truth + expert" in cache(tmp_path / "c", run, *both)
    clip = every_clip(source_of())[0]
    found = CachedTeacher(tmp_path / "c").complete(clip, None)
    torch.testing.assert_close(found.depth, clip.scene.depth, rtol=2**-11, atol=0)
    assert next(iter(found.features.values())).shape[:3] == (len(clip.images), 1, 1)


# Finite lists.


def test_fixed_samples_do_not_depend_on_the_seed_that_is_asked_for() -> None:
    source = FixedSamples(Colours(pictures=2, views=0), 7, 1)
    assert len(source) == 7
    for index in (0, 6):
        assert source.load(index, 5).shape == source.load(index, 9).shape == source.shape(index, 11)
    seeds = {source._seed(index) for index in range(7)} | {
        FixedSamples(Colours(), 7, 2)._seed(index) for index in range(7)
    }
    assert len(seeds) == 14
    assert len(FixedSamples(Colours())) == len(Colours())
    assert len(FixedSamples(Colours(), 10_000)) == len(Colours())
    with pytest.raises(InputError, match="at least 1"):
        FixedSamples(Colours(), 0)


def test_every_source_of_questions_takes_the_options() -> None:
    assert len(source_of()) == 5
    assert source_of().name == "rooms_qa"
    only_seed = build_chat_source("rooms_qa", None, (28, 28), fixed_seed=1)
    assert isinstance(only_seed, FixedSamples)
    assert not isinstance(build_chat_source("rooms_qa", None, (28, 28)), FixedSamples)
    with pytest.raises(InputError, match="did you mean fixed_samples"):
        build_chat_source("rooms_qa", None, (28, 28), fixed_sample=3)
