"""The command `python eval/recon.py`: data sets in, tables, files and exit codes out."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.baselines import System
from eval.commands import OPEN
from eval.evaluate import MODEL, evaluate
from eval.gate import judged, require_passed
from eval.predictions import load_prediction
from eval.protocols import PROTOCOLS, find_protocol
from eval.recon import DATASETS, main
from eval.runs import output_folder
from eval.scoring import score
from g2vlm.data.types import SceneSample
from g2vlm.errors import CheckFailed
from geometry import GeometryPrediction, normals_from_points
from tests.eval.samples import random_rotation
from tests.g2vlm.data.scenes import SHARED_DATA, write_canonical, write_seven_scenes

ROOT = Path(__file__).resolve().parents[2]
REAL = SHARED_DATA / "seven_scenes"
FILES = {"results.json", "items.jsonl", "report.md", "run.json", "pictures", "predictions"}


@pytest.fixture(scope="module")
def seven_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("7scenes")
    write_seven_scenes(folder / "lab" / "seq-01", num_views=3, step=20)
    return folder


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def oracle(sample: SceneSample) -> GeometryPrediction:
    """The truth as a prediction, in another world and scale."""
    assert sample.cam_to_world is not None
    turn, scale = random_rotation(7), 0.3
    poses = sample.cam_to_world.clone()
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = scale * poses[:, :3, 3] @ turn.mT + torch.tensor([1.0, 2.0, 3.0])
    normals = sample.normals
    if normals is None:
        normals, _ = normals_from_points(sample.local_points, sample.valid)
    return GeometryPrediction(scale * sample.local_points, poses, normals)


ON_FILES = ["7scenes-proj-clean", "7scenes-pi3-518", "7scenes-g2vlm-512", "7scenes-rawdepth", "canonical-v1"]


@pytest.mark.parametrize("name", ON_FILES)
def test_a_perfect_prediction_scores_perfectly_from_the_files_on(name: str, seven_scenes: Path, tmp_path: Path) -> None:
    dataset = "canonical" if name == "canonical-v1" else "seven_scenes"
    data = write_canonical(tmp_path / "room") if dataset == "canonical" else seven_scenes
    width = 100 if name == "7scenes-g2vlm-512" else 112  # a truth whose width is no multiple of 14, as 512
    items, protocol = OPEN[dataset](data, find_protocol(dataset, name).changed(width=width))
    result = evaluate(items, {MODEL: System(oracle)}, protocol)
    assert not result.skipped
    metrics = result.metrics(MODEL)
    perfect = {"abs_rel": 0, "delta_1": 1, "accuracy_mean": 0, "completion_mean": 0, "normal_derived_mean_deg": 0}
    perfect |= {"normal_output_mean_deg": 0, "rotation_median_deg": 0, "rra_5": 100, "rta_5": 100, "auc_30": 100}
    assert {key: metrics[key] for key in perfect} == pytest.approx(perfect, abs=0.05)
    assert metrics["abs_rel"] < 1e-6
    assert metrics["accuracy_mean"] < 1e-5
    assert metrics["nc_mean"] > 0.999
    assert result.rows[MODEL][0].width == width


def test_a_sequence_is_scored_beside_baselines(seven_scenes: Path, tmp_path: Path, capsys, caplog) -> None:
    output = tmp_path / "out"
    arguments = ("--model", "tiny", "--dataset", "seven_scenes", "--data", seven_scenes, "--width", 56)
    code, out, _ = run(capsys, *arguments, "--save-predictions", "--output", output)
    assert code == 0
    assert_scores_follow_from_the_saved_prediction(output, seven_scenes)
    assert out.startswith("7scenes-proj-clean (modified: width 56)\n")
    assert "RANDOM WEIGHTS" in caplog.text
    assert "RANDOM WEIGHTS" in out
    assert {path.name for path in output.iterdir()} == FILES
    record = json.loads((output / "results.json").read_text())
    assert record["protocol"]["options"] == {"depth": "proj_clean", "split": "all"}
    assert set(record["baselines"]) == {"constant depth", "identity pose", "untrained"}
    assert "abs_rel" in record["baselines"]["constant depth"]
    assert "rra_15" in record["baselines"]["identity pose"]
    assert set(record["baselines"]["untrained"]) == set(record["metrics"])
    assert {"nc_mean", "normal_derived_mean_deg", "normal_output_mean_deg"} <= set(record["metrics"])
    assert "not the published test sequences" in out
    assert record["provenance"]["checkpoint"]["files"] == {}
    assert record["provenance"]["checkpoint"]["config"]["model_type"] == "g2vlm"
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == ["lab/seq-01"] * 4
    assert lines[0]["view_ids"] == ["seq-01/frame-000000", "seq-01/frame-000040"]
    with Image.open(output / "pictures" / "lab_seq-01.png") as picture:
        assert picture.width == 1680
    assert (output / "pictures" / "lab_seq-01.truth.png").is_file()

    before = {path: path.read_bytes() for path in output.glob("*.*")}
    code, out, err = run(capsys, *arguments, "--output", output)
    assert (code, out) == (2, "")
    assert "will not overwrite" in err
    assert {path: path.read_bytes() for path in output.glob("*.*")} == before


def assert_scores_follow_from_the_saved_prediction(output: Path, data: Path) -> None:
    """Scoring the file again gives the row of the model."""
    items, protocol = OPEN["seven_scenes"](data, find_protocol("seven_scenes").changed(width=56))
    (file,) = (output / "predictions").iterdir()
    assert file.name == "lab_seq-01.safetensors"
    again = score(load_prediction(file), items[0].load(), protocol)
    row = json.loads((output / "items.jsonl").read_text().splitlines()[0])
    assert {name: row[name] for name in ("abs_rel", "accuracy_mean", "nc_mean", "normal_output_mean_deg")} == {
        "abs_rel": again.abs_rel, "accuracy_mean": again.accuracy_mean, "nc_mean": again.nc_mean,
        "normal_output_mean_deg": again.normal_output_mean_deg,
    }  # fmt: skip
    assert row["rotation_deg"] == list(again.rotation_deg)


def test_a_perfect_prediction_scores_perfectly_on_the_held_out_rooms() -> None:
    protocol = find_protocol("rooms")
    items, protocol = OPEN["rooms"](None, protocol)
    assert len(items) == 64
    result = evaluate(items[:2], {MODEL: System(oracle)}, protocol)
    metrics = result.metrics(MODEL)
    assert metrics["num_pairs"] == 12
    assert metrics["abs_rel"] < 1e-6
    assert metrics["accuracy_mean"] < 1e-5
    assert metrics["completion_mean"] < 1e-5
    assert metrics["nc_mean"] > 0.999
    assert (metrics["rra_5"], metrics["rta_5"], metrics["auc_30"]) == (100, 100, 100)
    assert metrics["normal_derived_mean_deg"] < 0.05
    assert [row.item for row in result.rows[MODEL]] == ["heldout-00", "heldout-01"]


def test_the_held_out_rooms_are_the_default_and_the_gate_holds_back_random_weights(tmp_path: Path, capsys) -> None:
    arguments = ("--limit", 2, "--views", 2, "--pictures", 0, "--gate", 0.8)
    code, out, err = run(capsys, *arguments, "--model", "tiny", "-o", tmp_path / "out")
    assert code == 1
    assert out.startswith("rooms-heldout-v1 (modified: views 2, limit 2)\n")
    assert "2 scenes, 0 skipped, 2 pairs of views" in out
    assert "misses its gate" in err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["count"] == 2
    assert (record["gate"]["share"], record["gate"]["passed"]) == (0.8, False)


def test_a_model_can_be_scored_alone(tmp_path: Path, capsys) -> None:
    arguments = ("--limit", 1, "--views", 2, "--pictures", 0, "--model", "tiny")
    for folder, more in (("all", ()), ("alone", ("--no-baselines",))):
        assert run(capsys, *arguments, *more, "-o", tmp_path / folder)[0] == 0
    beside, alone = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("all", "alone"))
    assert alone["metrics"] == beside["metrics"]
    assert beside["baselines"]
    assert not alone["baselines"]


def test_the_gate_lets_a_better_model_pass() -> None:
    record = {"metrics": {"abs_rel": 0.15}, "baselines": {"constant depth": {"abs_rel": 0.2}}}
    require_passed(judged(record, 0.8))
    with pytest.raises(CheckFailed, match=r"0\.75 times"):
        require_passed(judged(record, 0.7))


def test_a_damaged_scene_is_skipped_and_counted(tmp_path: Path, capsys) -> None:
    for scene in ("a", "b"):
        write_canonical(tmp_path / "data" / scene)
    damaged = next((tmp_path / "data" / "b").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    arguments = ("--model", "tiny", "--dataset", "canonical", "--data", tmp_path / "data", "--width", 56)
    code, out, _ = run(capsys, *arguments, "--pictures", 0, "-o", tmp_path / "out")
    assert code == 0
    assert "1 scene, 1 skipped" in out
    assert damaged.name in out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["count"], len(record["skipped"])) == (1, 1)


def test_photographs_are_reconstructed_by_the_demo_weights_and_not_scored(
    tmp_path: Path, demo_weights: Path, capsys
) -> None:
    photos = tmp_path / "photos" / "desk"
    photos.mkdir(parents=True)
    for view in range(3):
        Image.linear_gradient("L").rotate(20 * view).convert("RGB").save(photos / f"{view}.png")
    arguments = ("--dataset", "images", "--data", photos.parent, "--views", 2)
    code, out, _ = run(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 0
    assert "nothing was scored" in out
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["count"], record["metrics"], record["baselines"]) == (1, {}, {})
    assert record["model"] == "demo weights"
    (line,) = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert (line["item"], line["num_views"], line["width"]) == ("desk", 2, 84)
    assert (tmp_path / "out" / "desk" / "points.ply").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--dataset", "seven_scenes"], 2, "needs a folder"),
        (["--dataset", "seven_scenes", "--data", "absent"], 2, "no folder"),
        (["--dataset", "images", "--data", "empty"], 2, "no images"),
        (["--dataset", "seven_scenes", "--data", "empty"], 2, "no sequences"),
        (["--protocol", "7scenes-proj"], 2, "it belongs to --dataset seven_scenes"),
        (["--dataset", "seven_scenes", "--protocol", "7scenes-dense"], 2, "7scenes-g2vlm-512-sparse"),
        (["--dataset", "images", "--data", "photos", "--save-predictions"], 2, "photographs are always exported"),
        (["--width", "85"], 2, "multiples of 14"),
        (["--dataset", "images", "--data", "photos", "--gate", "0.8"], 2, "--gate needs scores"),
        (["--no-baselines", "--gate", "0.8"], 2, "nothing to compare with"),
        (["--views", "0"], 2, "--views must be at least 1"),
        (["--data", "empty"], 2, "takes no --data"),
        (["--dataset", "images", "--data", "photos", "--model", "absent"], 2, "no model absent"),
        (["--dataset", "images", "--data", "photos", "--model", "empty"], 5, "no G2VLM checkpoint"),
    ],
)
def test_bad_usage_has_a_clear_line_and_the_right_code(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    given, out, err = run(capsys, *arguments)
    assert (given, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "photos"]


def test_an_unknown_flag_or_choice_is_refused_by_the_parser(capsys) -> None:
    for arguments in (["--dataset", "roms"], ["--vews", "3"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_the_default_folder_is_a_new_one(tmp_path: Path) -> None:
    assert output_folder(None, "recon", tmp_path) == tmp_path / "recon"
    (tmp_path / "recon").mkdir()
    assert output_folder(None, "recon", tmp_path) == tmp_path / "recon-2"


def test_the_datasets_of_the_flag_are_those_of_the_protocols() -> None:
    from eval.protocols import DATASETS as with_protocols

    assert with_protocols == DATASETS == (*OPEN, "images")


def test_started_by_path_from_another_directory(tmp_path: Path) -> None:
    script = str(ROOT / "eval" / "recon.py")
    help_text = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr
    assert "--dataset" in help_text.stdout
    refused = subprocess.run(
        [sys.executable, script, "--dataset", "images"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-3].startswith("error: the dataset images needs a folder")


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample of the real data set is absent")
def test_a_real_sequence_runs_and_its_table_names_the_protocol(tmp_path: Path, capsys) -> None:
    arguments = ("--model", "tiny", "--dataset", "seven_scenes", "--data", REAL, "--protocol", "7scenes-proj")
    code, out, _ = run(capsys, *arguments, "--views", 2, "--width", 56, "--pictures", 0, "-o", tmp_path / "out")
    assert code == 0
    assert out.startswith("7scenes-proj (modified: width 56, views 2)")


# ---------------------------------------------------------------------------------------------- another sequence


@pytest.fixture(scope="module")
def another_sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG colours, frame numbers with gaps that do not begin at 0, invalid and empty pixels; a second one is torn."""
    folder = tmp_path_factory.mktemp("data") / "hall"
    for sequence in ("seq-02", "seq-11"):
        write_seven_scenes(folder / sequence, num_views=3, step=20, suffix="jpg")
        for file in sorted((folder / sequence).iterdir(), reverse=True):
            number = int(file.name[6:12]) * 2 + 7  # 7, 47, 87
            file.rename(file.with_name(f"frame-{number:06d}{file.name[12:]}"))
    stored = folder / "seq-02" / "frame-000047.depth.png"
    Image.fromarray(np.full((480, 640), 65535, dtype=np.uint16)).save(stored)  # a view without any depth
    colour = folder / "seq-11" / "frame-000047.color.jpg"
    colour.write_bytes(colour.read_bytes()[:2000])
    (folder / "TestSplit.txt").write_text("sequence2\nsequence11\nsequence12\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["7scenes-proj-clean", "7scenes-g2vlm-512-sparse"])
def test_another_sequence_runs_and_what_is_torn_is_named(name: str, another_sequence: Path, tmp_path, capsys) -> None:
    arguments = ("--model", "tiny", "--dataset", "seven_scenes", "--data", another_sequence, "--protocol", name)
    sparse = name.endswith("sparse")
    width = 100 if sparse else 56
    code, out, _ = run(capsys, *arguments, "--width", width, "--pictures", 1, "-o", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert code == 0
    assert out.startswith(f"{name} (modified: width {width})")
    assert record["protocol"]["options"] == {**PROTOCOLS[name].options, "split": "test"}
    assert rows[0]["view_ids"] == [f"seq-02/frame-{i:06d}" for i in ((7,) if sparse else (7, 47, 87))]
    assert record["count"] == (2 if sparse else 1)  # the sparse frames do not meet the torn one
    assert [skipped["item"] for skipped in record["skipped"]] == ([] if sparse else ["hall/seq-11"])
    if not sparse:
        assert "frame-000047.color.jpg" in record["skipped"][0]["reason"]
        assert "frame-000047.color.jpg" in out


def test_a_dataset_of_which_nothing_can_be_scored_leaves_its_reasons(another_sequence: Path, tmp_path, capsys) -> None:
    arguments = ("--model", "tiny", "--dataset", "seven_scenes", "--data", another_sequence / "seq-11", "--width", 56)
    code, out, err = run(capsys, *arguments, "-o", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "no scene could be scored" in err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (record["count"], record["metrics"]) == (0, {})
    assert "frame-000047.color.jpg" in record["skipped"][0]["reason"]


def test_a_truncated_photograph_is_left_out_and_named(tmp_path: Path, capsys) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.linear_gradient("L").convert("RGB").save(photos / f"{name}.png")
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:200])
    arguments = ("--model", "tiny", "--dataset", "images", "--data", photos, "--width", 56)
    code, out, _ = run(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 0
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["count"] == 1
    assert "b.png" in record["skipped"][0]["reason"]
    assert "b.png" in out


def test_a_checkpoint_is_named_with_the_hash_of_its_weights(tmp_path: Path, capsys) -> None:
    model = ROOT / "tests" / "golden" / "g2vlm_tiny"
    arguments = ("--model", model, "--limit", 1, "--views", 1, "--width", 28, "--pictures", 0)
    code, out, _ = run(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 0
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    checkpoint = json.loads((tmp_path / "out" / "results.json").read_text())["provenance"]["checkpoint"]
    assert checkpoint["files"] == {"model.safetensors": digest}
    assert checkpoint["name"] == str(model)
    assert digest[:12] in out
    assert "RRA" not in out  # one view


# ---------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("name", "size", "factors", "centre"),
    [
        ("7scenes-proj", (392, 518), (518 / 640, 392 / 480), (320.5 * 518 / 640 - 0.5, 240.5 * 392 / 480 - 0.5)),
        ("7scenes-pi3-518", (392, 518), (392 / 480,) * 2, (320.5 * 392 / 480 - 0.5, 240.5 * 392 / 480 - 0.5)),
        ("7scenes-g2vlm-512", (378, 512), (512 / 640,) * 2, (320.5 * 0.8 - 0.5, 240.5 * 0.8 - 0.5)),
    ],
)
def test_published_grids_scale_intrinsics_by_one_factor(name, size, factors, centre, seven_scenes: Path) -> None:
    items, _ = OPEN["seven_scenes"](seven_scenes, PROTOCOLS[name].changed(views=1))
    sample = items[0].load()
    assert sample.size == size
    assert sample.intrinsics is not None
    (fx, _, cx), (_, fy, cy), _ = sample.intrinsics[0].tolist()
    assert (fx, fy) == pytest.approx((525 * factors[0], 525 * factors[1]), rel=1e-6)
    assert (cx, cy) == pytest.approx(centre, rel=1e-6)


def test_published_strides() -> None:
    strides = {name: protocol.views.stride for name, protocol in PROTOCOLS.items() if name.startswith("7scenes")}
    assert set(strides.values()) == {40, 200}
    assert all((stride == 200) == name.endswith("-sparse") for name, stride in strides.items())
