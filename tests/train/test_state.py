import errno
import json
import logging
import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import g2vlm
from g2vlm.checkpoint import random_model
from g2vlm.config import G2VLMConfig
from g2vlm.errors import CheckpointError, InputError, ResourceError, Stopped, TrainingAborted
from tests.train import worker
from tests.train.worker import mini_run, run
from train import state
from train.config import GuardConfig
from train.state import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoints, verify

FILES = (MODEL, OPTIMIZER, STATE, "config.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of six steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(mini_run(keep=3), folder)
    return folder


def equal_runs(one: Path, other: Path, step: int = 6) -> None:
    for name in FILES[:2]:
        a, b = (folder / f"checkpoints/step-{step:08d}" / name for folder in (one, other))
        assert a.read_bytes() == b.read_bytes(), name
    a, b = (json.loads((folder / f"checkpoints/step-{step:08d}" / STATE).read_text()) for folder in (one, other))
    assert {**a, "config": None} == {**b, "config": None}
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    assert Checkpoints(finished / "checkpoints").steps() == [2, 4, 6]
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert [line["step"] for line in lines if line["kind"] == "attention"] == [0, 3, 6]
    assert {"loss", "points", "rotation", "lr", "grad_norm", "dropped", "views", "size"} <= lines[1].keys()
    assert not list(finished.rglob(".*"))
    pictures = sorted((finished / "validation").iterdir())
    assert [picture.name for picture in pictures] == ["step-00000003.png", "step-00000006.png"]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    for folder in (finished / "model", finished / "checkpoints/step-00000006"):
        prediction = g2vlm.load(folder, device="cpu").predict(torch.rand(2, 3, 28, 28))
        assert prediction.local_points.isfinite().all()


def test_a_preset_is_written_with_its_tokenizer(tmp_path: Path) -> None:
    model = random_model(G2VLMConfig.tiny())
    state.write_model(tmp_path, model.state_dict(), model)
    assert g2vlm.G2VLMProcessor.from_pretrained(tmp_path)(text="How many chairs?")["sequence"].num_tokens > 10


@pytest.mark.parametrize("steps", [2, 4])
def test_resumed_is_undisturbed(finished: Path, tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(2, steps + 1, 2):
        shutil.copytree(finished / f"checkpoints/step-{step:08d}", tmp_path / f"run/checkpoints/step-{step:08d}")
    log = (finished / "log.jsonl").read_text()
    (tmp_path / "run/log.jsonl").write_text(log + '{"torn')
    with caplog.at_level(logging.INFO):
        run(mini_run(keep=3, resume="auto"), tmp_path / "run")
    assert f"going on from {tmp_path}/run/checkpoints/step-{steps:08d}" in caplog.text
    equal_runs(finished, tmp_path / "run")


def test_workers_do_not_change_a_run(finished: Path, tmp_path: Path) -> None:
    run(mini_run(keep=3, workers=2), tmp_path / "run")
    equal_runs(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 6 of a run of another seed and another attention."""
    folder = tmp_path_factory.mktemp("another") / "run"
    config = mini_run(6, seed=1, keep=1, validate_every=0)
    run(replace(config, model={**config.model, "geometry_attention": "frame"}), folder)
    return folder / "checkpoints/step-00000006"


def cut(content: bytes, length: int) -> bytes:
    """Torn: the end is missing."""
    return content[:length]


def flip(content: bytes, place: int) -> bytes:
    """One bit is wrong."""
    changed = bytearray(content)
    changed[place] ^= 4
    return bytes(changed)


def blank(content: bytes, place: int) -> bytes:
    """A lost block: zeros where data were promised, the size as it was."""
    return content[:place] + bytes(len(content[place : place + 40])) + content[place + 40 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut after a byte": lambda content: cut(content, 1),
    "cut in the header": lambda content: cut(content, 50),
    "cut in half": lambda content: cut(content, len(content) // 2),
    "cut before the last byte": lambda content: cut(content, -1),
    "longer": lambda content: content + b" ",
    "first bit": lambda content: flip(content, 0),
    "bit in the header": lambda content: flip(content, 20),
    "bit in the middle": lambda content: flip(content, len(content) // 2),
    "last bit": lambda content: flip(content, -1),
    "blank start": lambda content: blank(content, 0),
    "blank middle": lambda content: blank(content, len(content) // 2),
    "blank end": lambda content: blank(content, len(content) - 40),
}


@pytest.fixture
def two_checkpoints(finished: Path, tmp_path: Path) -> Checkpoints:
    """Those of steps 4 and 6, to be damaged."""
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 6):
        shutil.copytree(finished / f"checkpoints/step-{step:08d}", checkpoints.path(step), copy_function=os.link)
    return checkpoints


def put(file: Path, content: bytes) -> None:
    """Replace a file; the one that it is linked to stays as it is."""
    file.unlink()
    file.write_bytes(content)


def assert_refused(checkpoints: Checkpoints, name: str) -> None:
    """The file is named and the previous checkpoint is used."""
    newest, refused = checkpoints.newest()
    assert newest == 4
    assert refused[6].startswith(f"refused {checkpoints.path(6)}: {name} ")
    with pytest.raises(CheckpointError, match=name):
        verify(checkpoints.path(6))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damaged_files_are_refused(two_checkpoints: Checkpoints, name: str, damage: str) -> None:
    file = two_checkpoints.path(6) / name
    put(file, DAMAGES[damage](file.read_bytes()))
    assert_refused(two_checkpoints, name)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_files_are_refused(two_checkpoints: Checkpoints, name: str) -> None:
    (two_checkpoints.path(6) / name).unlink()
    assert_refused(two_checkpoints, name)
    (two_checkpoints.path(6) / name).mkdir()
    assert_refused(two_checkpoints, name)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])  # the config is the same at all steps
def test_files_of_another_step_are_refused(two_checkpoints: Checkpoints, name: str) -> None:
    put(two_checkpoints.path(6) / name, (two_checkpoints.path(4) / name).read_bytes())
    assert_refused(two_checkpoints, name)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_run_are_refused(two_checkpoints: Checkpoints, another: Path, name: str) -> None:
    put(two_checkpoints.path(6) / name, (another / name).read_bytes())
    assert_refused(two_checkpoints, name)


def test_the_manifest_of_another_run_is_refused(two_checkpoints: Checkpoints, another: Path) -> None:
    put(two_checkpoints.path(6) / MANIFEST, (another / MANIFEST).read_bytes())
    assert_refused(two_checkpoints, "config.json")  # the first file that it does not fit


@pytest.mark.parametrize(
    "forge",
    [
        lambda manifest: manifest["files"].pop(OPTIMIZER),
        lambda manifest: manifest["files"].update({"../x": manifest["files"][STATE]}),
        lambda manifest: manifest.update(step=4),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.pop("files"),
    ],
    ids=["file left out", "file added", "another step", "no files", "no list"],
)
def test_edited_manifests_are_refused(two_checkpoints: Checkpoints, forge) -> None:
    file = two_checkpoints.path(6) / MANIFEST
    manifest = json.loads(file.read_text())
    forge(manifest)
    put(file, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
    assert_refused(two_checkpoints, MANIFEST)


def test_swapped_folders_are_refused(finished: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    shutil.copytree(finished / "checkpoints/step-00000004", checkpoints.path(6))
    assert checkpoints.newest() == (
        None,
        {6: f"refused {checkpoints.path(6)}: {MANIFEST} belongs to another checkpoint"},
    )


def test_resume_passes_over_a_damaged_checkpoint(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000006" / OPTIMIZER
    file.write_bytes(cut(file.read_bytes(), -1))
    run(mini_run(keep=3, resume="auto"), tmp_path / "run")
    assert f"step-00000006: {OPTIMIZER} has" in caplog.text
    assert (tmp_path / "run/checkpoints/refused-step-00000006").is_dir()
    equal_runs(finished, tmp_path / "run")


def test_another_model_or_other_groups_are_refused(finished: Path, tmp_path: Path) -> None:
    """Even when runtime.changes lets them through."""
    shutil.copytree(finished, tmp_path / "run")
    config = mini_run(resume="auto", changes=("model", "trainable"))
    with pytest.raises(CheckpointError, match="another model"):
        run(replace(config, model="tiny"), tmp_path / "run")
    with pytest.raises(CheckpointError, match="it trained"):
        run(replace(config, trainable={"geometry_heads": 1.0}), tmp_path / "run")


def test_only_the_newest_are_kept(finished: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 12):
        checkpoints.write(step, lambda folder: (folder / "file").write_text("x") and None)
    assert checkpoints.steps() == [3, 12]


def at_step_4(finished: Path, folder: Path) -> None:
    """Make the folder of a run that goes on from its fourth step."""
    shutil.copytree(finished, folder, copy_function=os.link)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    for name in ("log.jsonl", "speed.jsonl"):
        put(folder / name, (finished / name).read_bytes())


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, ResourceError), (errno.EROFS, InputError)])
@pytest.mark.parametrize("place", ["save_file", "_sync", "_seal", "_discard"])
def test_failed_saves_leave_the_last_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int, error: type[Exception]
) -> None:
    at_step_4(finished, tmp_path / "run")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(state, place, fail)
    with pytest.raises(error, match="step-00000006"):
        run(mini_run(keep=1, resume="auto"), tmp_path / "run")
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run/checkpoints").newest() == (4, {})
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))


def test_every_file_can_be_read_by_the_same_people(finished: Path) -> None:
    modes = {
        file.name: oct(file.stat().st_mode) for file in finished.rglob("*") if file.suffix in (".json", ".safetensors")
    }
    assert set(modes) >= {"model.safetensors", "optimizer.safetensors", "manifest.json"}
    assert len(set(modes.values())) == 1, modes


def test_safetensors_meets_a_full_disk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer tells errors of the system in a class of its own; a limit on file sizes makes a real one."""
    at_step_4(finished, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*step-00000006"):
            run(mini_run(keep=3, resume="auto"), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", fail)
    with pytest.raises(ResourceError, match=r"disk full while writing .*step-00000006"):
        run(mini_run(keep=3, resume="auto"), tmp_path / "run")
    assert Checkpoints(tmp_path / "run/checkpoints").newest() == (4, {})


@pytest.mark.parametrize("name", ["log.jsonl", "speed.jsonl"])
def test_a_log_on_a_full_disk(finished: Path, tmp_path: Path, name: str) -> None:
    at_step_4(finished, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=f"disk full while writing .*{name}"):
        run(mini_run(keep=3, resume="auto"), tmp_path / "run")
    assert Checkpoints(tmp_path / "run/checkpoints").newest() == (4, {})


def test_abort_saves_the_state(tmp_path: Path) -> None:
    config = replace(mini_run(20, checkpoint_every=0), guards=GuardConfig(spike=1e-6, max_dropped_in_a_row=3))
    with pytest.raises(TrainingAborted, match="4 in a row"):
        run(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").newest() == (6, {})


def test_unreadable_scenes_end_the_run_above_the_quota(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingAborted, match="could not be read"):
        run(mini_run(20), tmp_path, num_scenes=4, broken=frozenset({1, 2}))
    assert caplog.text.count("passed over box_rooms/1") <= 1
    entry = json.loads((tmp_path / "bad_samples.jsonl").read_text().splitlines()[0])
    assert entry["scene"] in ("box_rooms/1", "box_rooms/2")


def test_sigterm_saves_and_exits_75(tmp_path: Path) -> None:
    process = worker.start(tmp_path / "run", 1000)
    worker.wait_for_steps(tmp_path / "run", process, 3)
    process.terminate()
    process.join()
    text = worker.told(tmp_path / "run")
    assert process.exitcode == Stopped.code == 75, text
    newest, refused = Checkpoints(tmp_path / "run/checkpoints").newest()
    assert newest is not None
    assert f"stopped after step {newest}" in text
    assert not refused


LONG = 24
SAVE_OPERATIONS = 16  # files opened, folders made and renamed while one checkpoint is written


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to compare killed ones with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(mini_run(LONG, keep=1), folder)
    return folder


def kill_and_finish(undisturbed: Path, folder: Path, seed: int) -> None:
    """Kill a run at five random moments, twice in the second save after it went on; resume it each time; compare."""
    moments = random.Random(seed)
    for kill in range(5):
        if kill % 2:
            worker.kill_while_saving(folder, LONG, SAVE_OPERATIONS + moments.randint(1, SAVE_OPERATIONS))
        else:
            worker.kill_at_random(folder, LONG, moments)
    worker.finish(folder, LONG)
    assert worker.told(folder).count("going on from") == 5
    equal_runs(undisturbed, folder, LONG)


def test_five_sigkills(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_finish(undisturbed, tmp_path / "run", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_25_sigkills(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    kill_and_finish(undisturbed, tmp_path / "run", seed)


@pytest.mark.slow
def test_sigkill_before_every_file_operation_of_a_save(finished: Path, tmp_path: Path) -> None:
    for operation in range(1, SAVE_OPERATIONS + 1):
        folder = tmp_path / f"run-{operation}"
        worker.kill_while_saving(folder, 6, operation)
        worker.finish(folder, 6)
        equal_runs(finished, folder)
