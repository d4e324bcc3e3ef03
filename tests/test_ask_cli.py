"""`g2vlm ask` and `g2vlm chat`: what they print, and what they say and do about bad input. All through `main`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm.asking import Answer
from g2vlm.checkpoint import load_model, save_model
from g2vlm.cli import main
from g2vlm.fusion_config import FusionConfig
from g2vlm.pipeline import Pipeline
from g2vlm.sampling import GenerationOptions
from g2vlm.scene import Scene
from tests.g2vlm.talkative import talkative_model
from tests.test_cli import assert_fails, text_as_jpeg, truncated_jpeg

QUESTION = "How many chairs are in this room?"
OPTIONS = ["--device", "cpu", "--max-new-tokens", "5"]
FIVE = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "talker"
    save_model(talkative_model(), folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(talker: Path) -> Pipeline:
    return Pipeline(load_model(talker), str(talker))


@pytest.fixture
def ask(talker: Path):
    """Runs `g2vlm ask` with that model."""
    return lambda *arguments: main(["ask", *map(str, arguments), "--model", str(talker), *OPTIONS])


@pytest.fixture
def chat(talker: Path):
    """Runs `g2vlm chat` with that model."""
    return lambda *arguments: main(["chat", *map(str, arguments), "--model", str(talker), *OPTIONS])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    for index in range(2):
        Image.fromarray(pixels[index]).save(folder / f"view{index}.png")
    return folder


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model with a fusion of large weights."""
    model = talkative_model()
    torch.manual_seed(0)
    model.add_fusion(FusionConfig())
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("models") / "fused"
    save_model(model, folder)
    return folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    """Puts text on stdin."""

    def put(text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return put


def lines_of(*answers: Answer) -> str:
    """What is printed."""
    return "".join(f"{answer.text}\n" for answer in answers)


def test_a_fused_model_is_asked_like_any_other(fused: Path, talker: Path, photos: Path, capsys) -> None:
    said = []
    for model in (fused, talker):
        assert main(["ask", str(photos), "-q", QUESTION, "--model", str(model), *OPTIONS]) == 0
        said.append(capsys.readouterr().out)
    images = sorted(photos.iterdir())
    assert said[0].strip() == Pipeline(load_model(fused), "fused").ask(images, QUESTION, options=FIVE).text.strip()
    assert said[0] != said[1]


def test_tokens_of_another_model_cannot_be_given_on_the_command_line(
    talker: Path, photos: Path, tmp_path, capsys
) -> None:
    model = load_model(talker)
    model.add_fusion(FusionConfig(source="given"))
    save_model(model, tmp_path / "given")
    assert main(["ask", str(photos), "-q", QUESTION, "--model", str(tmp_path / "given"), *OPTIONS]) == 2
    assert "reads what another model knows of them" in capsys.readouterr().err


def test_one_answer(photos: Path, ask, pipeline: Pipeline, capsys) -> None:
    assert ask(photos, "-q", QUESTION) == 0
    assert capsys.readouterr().out == lines_of(pipeline.ask(photos, QUESTION, options=FIVE))


def test_weights_without_a_language(photos: Path, demo_weights: Path, caplog) -> None:
    for command, name in (([], "demo weights"), (["--model", "tiny"], "tiny")):
        assert main(["ask", str(photos), "-q", QUESTION, *OPTIONS, *command]) == 0
        assert caplog.text.count(f"{name}: the semantic expert was never trained, its answers mean nothing") == 1


def test_answers_as_json(photos: Path, ask, pipeline: Pipeline, capsys) -> None:
    interleaved = "Here <image> and there <image>?"
    assert ask(photos, "-q", QUESTION, "-q", interleaved, "--json", "--geometry", "off") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.pop("seconds") > 0
    answer = pipeline.ask(photos, QUESTION, "off", options=FIVE)
    assert first == {
        "question": QUESTION, "answer": answer.text, "tokens": 5, "finish": "length",
        "geometry": "off", "images": 2, "model": pipeline.name,
    }  # fmt: skip
    assert second["answer"] == pipeline.ask(photos, interleaved, "off", options=FIVE).text


def test_sampled_answers_repeat(photos: Path, ask, capsys) -> None:
    answers = []
    for seed in (1, 1, 2):
        assert ask(photos, "-q", QUESTION, "--temperature", "2.0", "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_geometry_is_saved_and_the_answer_stays(photos: Path, ask, pipeline: Pipeline, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    command = [photos, "-q", QUESTION, "--save-geometry", output, "--width", 56]
    assert ask(*command) == 0
    assert capsys.readouterr().out == lines_of(pipeline.ask(photos, QUESTION, options=FIVE, width=56))
    scene = pipeline.ask(photos, QUESTION, return_geometry=True, options=FIVE, width=56).scene
    assert scene is not None
    saved = Scene.load(output)
    np.testing.assert_array_equal(saved.local_points, scene.local_points)
    np.testing.assert_array_equal(saved.cam_to_world, scene.cam_to_world)
    assert (output / "points.ply").is_file()
    assert_fails(2, capsys, ask(*command), "not empty")
    command = [photos, "-q", QUESTION, "--save-geometry", tmp_path / "no", "--geometry", "off"]
    assert_fails(2, capsys, ask(*command), "geometry is off")


def test_questions_of_stdin(photos: Path, ask, pipeline: Pipeline, typed, capsys) -> None:
    questions = ["How many chairs?", "Where is <image>the lamp <image>?", "Why?"]
    typed("\n\n".join(questions))
    assert ask(photos, "--stdin", "--batch-size", 2) == 0
    assert capsys.readouterr().out == lines_of(*(pipeline.ask(photos, q, options=FIVE) for q in questions))


def test_malformed_lines_of_stdin(photos: Path, ask, typed, capsys, caplog) -> None:
    """Each is told with its number, and the others are answered."""
    lines = [
        b'{"question": "How many chairs?", "id": "a"}',
        b'{"question": "How many',
        b"not json",
        b"[1]",
        b'{"question": 3}',
        b'{"question": " "}',
        b'{"question": "one <image> of two"}',
        b'{"question": "\xff"}',
        b"",
        b'{"id": 7, "question": "Why?", "answer": "2"}',
    ]
    typed(b"\r\n".join(lines))
    code = ask(photos, "--stdin", "--json")
    captured = capsys.readouterr()
    assert code == 1
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["a", 7]
    told = [record.message.split(":")[0] for record in caplog.records if "is not answered" in record.message]
    assert told == [f"line {number} is not answered" for number in range(2, 9)]
    assert "7 lines of stdin were not answered" in captured.err
    assert "lines 2, 3, 4, 5, 6, 7, 8; the others were" in captured.err
    assert "Traceback" not in captured.err


def test_json_among_plain_questions(photos: Path, ask, pipeline: Pipeline, typed, capsys, caplog) -> None:
    typed('Why?\n{"question": "Where?"}\n')
    assert ask(photos, "--stdin") == 1
    assert capsys.readouterr().out == lines_of(pipeline.ask(photos, "Why?", options=FIVE))
    assert "line 2 is not answered: JSON among plain questions" in caplog.text


@pytest.mark.parametrize("make", [text_as_jpeg, truncated_jpeg, lambda folder: folder / "absent.png"])
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_bad_images(make, command: str, tmp_path: Path, capsys) -> None:
    image = make(tmp_path)
    question = ["-q", QUESTION] if command == "ask" else []
    assert_fails(2, capsys, main([command, str(image), *question, *OPTIONS]), image.name)


def test_bad_images_can_be_skipped(photos: Path, ask, pipeline: Pipeline, capsys) -> None:
    answer = pipeline.ask(photos, QUESTION, options=FIVE)
    text_as_jpeg(photos)
    assert ask(photos, "-q", QUESTION, "--skip-bad") == 0
    assert capsys.readouterr().out == lines_of(answer)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no question"),
        (["-q", ""], "the question is empty"),
        (["-q", " "], "the question is empty"),
        (["-q", "<image>?"], "1 <image>, and there are 2 images"),
        (["-q", QUESTION, "--max-context", "60"], "2 images do not fit into the context"),
        (["-q", QUESTION, "--max-context", "100"], "2 images do not fit into the context"),
        (["-q", QUESTION, "--temperature", "-1"], "temperature"),
        (["-q", QUESTION, "--batch-size", "0"], "batch_size"),
        (["-q", QUESTION, "--width", "3"], "width 3"),
    ],
)
def test_bad_usage(arguments: list[str], named: str, photos: Path, ask, capsys) -> None:
    assert_fails(2, capsys, ask(photos, *arguments), named)


def test_no_images_at_all(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ask", "-q", QUESTION])
    assert stop.value.code == 2


def test_a_checkpoint_without_a_tokenizer(photos: Path, tmp_path: Path, capsys) -> None:
    model = load_model("tiny")
    model.config.tokens = type(model.config.tokens)(bos=20, eos=21, vision_start=22, vision_end=23)
    save_model(model, tmp_path / "model")
    for command in (["ask", str(photos), "-q", QUESTION], ["chat", str(photos)]):
        code = main([*command, "--model", str(tmp_path / "model"), "--device", "cpu"])
        assert_fails(5, capsys, code, "has no tokenizer, so it cannot be asked")


# ---------------------------------------------------------------------------------------------- chat


def test_chat_remembers_until_told_otherwise(photos: Path, chat, pipeline: Pipeline, typed, capsys) -> None:
    context = pipeline.context(photos)
    first = context.ask("Why?", FIVE)
    second = context.then("Why?", first).ask("Why?", FIVE)
    off = pipeline.ask(photos, "Why?", "off", options=FIVE)
    one = pipeline.ask(photos / "view1.png", "Why?", "off", options=FIVE)
    assert len({answer.text for answer in (first, second, off, one)}) == 4
    lines = ["Why?", "Why?", "/reset", "Why?", "/geometry off", "Why?", "/reset", "Why?"]
    typed("\n".join([*lines, f"/images '{photos}/view1.png'", "Why?", "/quit", "What?"]))
    assert chat(photos) == 0
    captured = capsys.readouterr()
    assert captured.out == lines_of(first, second, first, off, off, one)
    assert "> " not in captured.out + captured.err


def test_chat_without_photos(typed, chat, pipeline: Pipeline, capsys) -> None:
    typed("/help\nWhy?")
    assert chat() == 0
    captured = capsys.readouterr()
    assert captured.out == lines_of(pipeline.ask(None, "Why?", options=FIVE))
    assert "/geometry on|off" in captured.err


def test_mistakes_in_a_chat_change_nothing(photos: Path, chat, pipeline: Pipeline, typed, capsys) -> None:
    context = pipeline.context(photos)
    first = context.ask("Why?", FIVE)
    second = context.then("Why?", first).ask("Where?", FIVE)
    wrong = ["/nothing", "/images", "/images absent.png", "/images 'open", "/geometry", "/geometry maybe", "<image>?"]
    typed("\n".join(["Why?", *wrong, "/quit now", "Where?"]))
    assert chat(photos) == 1
    captured = capsys.readouterr()
    assert captured.out == lines_of(first, second)
    assert captured.err.count("error:") == len(wrong) + 2
    assert "8 lines of stdin were not followed" in captured.err
    assert "lines 2, 3, 4, 5, 6, 7, 8, 9; the others were" in captured.err
    assert "Traceback" not in captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_terminal(monkeypatch: pytest.MonkeyPatch, lines: list) -> Terminal:
    """Types lines, an exception where one is given, and returns what is shown."""
    shown = Terminal()
    answers = iter(lines)

    def read(prompt: str) -> str:
        line = next(answers, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr("builtins.input", read)
    return shown


def test_chat_at_a_terminal(photos: Path, chat, pipeline: Pipeline, monkeypatch) -> None:
    answer = pipeline.ask(photos, "Why?", options=FIVE)
    shown = at_terminal(monkeypatch, ["Why?", "/nothing", "", "/reset", "Why?"])
    assert chat(photos) == 0
    assert shown.getvalue() == lines_of(answer, answer)


def test_an_interrupt_ends_the_answer_then_the_chat(photos: Path, chat, pipeline: Pipeline, monkeypatch) -> None:
    answer = pipeline.ask(photos, "Why?", options=FIVE)
    shown = at_terminal(monkeypatch, ["Where?", "Why?", KeyboardInterrupt(), "Why?"])
    pieces: list[str] = []

    def interrupted_once(_: int, piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 1:
            raise KeyboardInterrupt
        shown.write(piece)

    monkeypatch.setattr("g2vlm.chat_commands._show", interrupted_once)
    assert chat(photos) == 0
    assert shown.getvalue() == lines_of(answer)


def test_one_answer_is_streamed_at_a_terminal(photos: Path, ask, pipeline: Pipeline, monkeypatch) -> None:
    answer = pipeline.ask(photos, QUESTION, options=FIVE)
    shown = at_terminal(monkeypatch, [])
    assert ask(photos, "-q", QUESTION) == 0
    assert shown.getvalue() == lines_of(answer)
