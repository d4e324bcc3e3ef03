"""The room of make quickstart: photographs, files of the reconstruction, answers, and what stage 2 left as it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval.benchmarks import find_benchmark
from eval.conditions import Conditions
from eval.quickstart_room import GEOMETRY, TASKS, main, three_questions
from g2vlm import load
from g2vlm.checkpoint import load_model, save_model
from g2vlm.cli import main as cli
from g2vlm.sampling import GenerationOptions
from train.trainable import group_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo weights in place of stage 1; in place of stage 2 the same with another semantic expert."""
    folder = tmp_path_factory.mktemp("quickstart")
    model = load_model("g2vlm/assets/demo", dtype=torch.float32)
    save_model(model, folder / "stage1" / "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not GEOMETRY.match(name):
                parameter.mul_(1.1)
    save_model(model, folder / "stage2" / "model")
    assert main([str(folder)]) == 0
    return folder


def room(folder: Path) -> dict:
    return json.loads((folder / "room" / "room.json").read_text())


def test_the_views_become_photographs_and_are_reconstructed(folder: Path) -> None:
    benchmark = find_benchmark("rooms_qa")
    photos = sorted((folder / "room" / "photos").iterdir())
    assert [photo.name for photo in photos] == [f"frame-{number}.png" for number in range(1, 5)]
    views = benchmark.load(room(folder)["scene"], (84, 84)).images
    for photo, view in zip(photos, views, strict=True):
        pixels = torch.frombuffer(bytearray(Image.open(photo).tobytes()), dtype=torch.uint8).reshape(84, 84, 3)
        assert torch.equal(pixels.permute(2, 0, 1), view)
    for name in ("points.ply", "points.glb", "preview.png", "cameras.json"):
        assert (folder / "room" / "recon" / name).stat().st_size


def test_the_replies_are_those_of_the_evaluation_and_of_the_command(folder: Path, capsys) -> None:
    questions = three_questions(find_benchmark("rooms_qa"))
    assert tuple(question.task for question in questions) == TASKS
    model, views = folder / "stage2" / "model", find_benchmark("rooms_qa").load(questions[0].scene, (84, 84)).images
    replies = []
    for question in questions:
        context = Conditions().context(load(model, "cpu").chat, views, views, question)
        replies.append(context.ask(question.prompt(4), GenerationOptions(max_new_tokens=16)).text)
    told = room(folder)["questions"]
    assert [item["reply"] for item in told] == replies
    assert [item["id"] for item in told] == [question.id for question in questions]
    assert [item["answer"] for item in told] == [question.answer for question in questions]
    first = json.loads((folder / "room" / "questions.jsonl").read_text().splitlines()[0])
    asked = ("ask", folder / "room" / "photos", "--model", model, "-q", first["question"], "--max-new-tokens", 16)
    capsys.readouterr()
    assert cli([*map(str, asked), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{replies[0]}\n"


def test_another_semantic_expert_leaves_the_geometry_as_it_was(folder: Path) -> None:
    frozen = room(folder)["frozen"]
    assert (frozen["changed_weights"], frozen["changed_outputs"]) == ([], [])
    model = load_model(str(folder / "stage1" / "model"))
    geometry = ("geometry_encoder", "projection", "geometric_expert", "geometry_heads")
    expected = sum(p.numel() for name, p in model.named_parameters() if group_of(name) in geometry)
    assert frozen["weights"] == expected


def test_a_changed_weight_is_found_and_so_is_what_it_changes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "stage1", tmp_path / "stage1")
    model = load_model(str(folder / "stage2" / "model"), dtype=torch.float32)
    name = "decoder.geometric_norm.weight"
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.001)
    save_model(model, tmp_path / "stage2" / "model")
    assert main([str(tmp_path)]) == 0
    frozen = room(tmp_path)["frozen"]
    assert frozen["changed_weights"] == [name]
    assert "local_points" in frozen["changed_outputs"]


def test_a_command_that_fails_ends_it(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(folder / "stage1", tmp_path / "stage1")
    shutil.copytree(folder / "stage2", tmp_path / "stage2")
    (tmp_path / "room" / "recon" / "here").mkdir(parents=True)
    assert main([str(tmp_path)]) == 1
    assert "g2vlm recon failed" in capsys.readouterr().err
    assert not (tmp_path / "room" / "room.json").exists()
