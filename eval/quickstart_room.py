"""A room that no training saw, for people to look at: `python -m eval.quickstart_room FOLDER`.

FOLDER holds `stage1` and `stage2`, training runs. The views of the room become photographs in FOLDER/room; what the
model of stage 2 makes of them comes from the commands `g2vlm recon` and `g2vlm ask`, run here in one process.
`room.json` has the questions with replies and true answers, and what stage 2 left as it was.
"""

import io
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from eval.benchmarks import Benchmark, find_benchmark
from eval.qa_scoring import score_reply
from eval.records import write_text
from eval.vqa_run import MAX_NEW_TOKENS
from g2vlm import cli
from g2vlm.data.qa.question import Question
from g2vlm.errors import CheckFailed
from g2vlm.images import geometry_pixels
from g2vlm.pipeline import Pipeline, load, read_sources
from geometry.io.common import atomic_file

disable_progress_bar()
STAGE1, STAGE2, MODEL = "stage1", "stage2", "model"
ROOM, PHOTOS, RECON, QUESTIONS, RECORD = "room", "photos", "recon", "questions.jsonl", "room.json"
TASKS = ("object_counting", "object_abs_distance", "object_rel_direction_easy")
GEOMETRY = re.compile(
    r"geometry_encoder\.|geometry_projection\.|decoder\.(layers\.\d+\.geometric|geometric_norm)\.|heads\."
)
"""Beginnings of the names of the weights that reconstruct."""
PREDICTED = ("local_points", "cam_to_world", "normals")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reconstruct, ask, compare; returns the exit code."""
    parser = ArgumentParser(prog="python -m eval.quickstart_room", description="Look at a room after stage 2.")
    parser.add_argument("folder", type=Path, help="holds stage1 and stage2; gets room")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    cli.log_to_stderr()
    return cli.guarded(lambda: look_at_room(args.folder), args.debug)


def look_at_room(folder: Path) -> None:
    """Write FOLDER/room.

    Raises:
        CheckFailed: a command failed.
    """
    benchmark, room = find_benchmark("rooms_qa"), folder / ROOM
    model, photos, questions = folder / STAGE2 / MODEL, room / PHOTOS, three_questions(benchmark)
    before, after = load(folder / STAGE1 / MODEL, "cpu"), load(model, "cpu")
    write_photos(benchmark, questions[0].scene, after.chat.processor.view_width, photos)
    run_command("recon", photos, "--model", model, "--device", "cpu", "-o", room / RECON)
    prompts = [question.prompt(benchmark.num_views) for question in questions]
    lines = [{"id": question.id, "question": prompt} for question, prompt in zip(questions, prompts, strict=True)]
    write_text(room / QUESTIONS, "".join(f"{json.dumps(line)}\n" for line in lines))
    record = {
        "scene": questions[0].scene,
        "questions": [answered(*pair) for pair in zip(questions, ask(photos, model, prompts), strict=True)],
        "frozen": frozen(before, after, photos),
    }
    write_text(room / RECORD, json.dumps(record, indent=1) + "\n")


def three_questions(benchmark: Benchmark) -> list[Question]:
    """A question of each of `TASKS` about the first scene that has them all."""
    for asked in benchmark.scenes().values():
        by_task = {question.task: question for question in asked}
        if all(task in by_task for task in TASKS):
            return [by_task[task] for task in TASKS]
    raise AssertionError(f"{benchmark.name} has no scene with {TASKS}")


def write_photos(benchmark: Benchmark, scene: str, width: int, folder: Path) -> None:
    """The views of a scene as the benchmark shows them, one PNG each."""
    folder.mkdir(parents=True)
    for number, view in enumerate(benchmark.load(scene, (width, width)).images.permute(0, 2, 3, 1).cpu().numpy(), 1):
        with atomic_file(folder / f"frame-{number}.png") as file:
            Image.fromarray(view).save(file, format="PNG")


def ask(photos: Path, model: Path, questions: Sequence[str]) -> list[str]:
    """What `g2vlm ask` replies; errors as in `run_command`."""
    asked = [part for question in questions for part in ("-q", question)]
    options = ("--json", "--model", model, "--device", "cpu", "--max-new-tokens", MAX_NEW_TOKENS)
    return [json.loads(line)["answer"] for line in run_command("ask", photos, *asked, *options).splitlines()]


def run_command(*arguments: object) -> str:
    """What a command prints.

    Raises:
        CheckFailed: it failed; its own message is on stderr.
    """
    with redirect_stdout(io.StringIO()) as printed:
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise CheckFailed(f"g2vlm {arguments[0]} failed", f"exit code {code}, see above", "")
    return printed.getvalue()


def answered(question: Question, reply: str) -> dict[str, Any]:
    """A question with the reply to it and its score."""
    return {
        **asdict(question),
        "answer_text": question.answer_text,
        "reply": reply,
        "score": score_reply(question.kind, reply, question.answer),
    }


@torch.inference_mode()
def frozen(before: Pipeline, after: Pipeline, photos: Path) -> dict[str, Any]:
    """Which weights that reconstruct, and what of the reconstruction of some photographs, differ between two models."""
    own, other = (dict(pipeline.model.named_parameters()) for pipeline in (before, after))
    names = [name for name in own if GEOMETRY.match(name)]
    pixels = torch.from_numpy(geometry_pixels(read_sources(photos), before.model.config.view_width))
    first, second = (pipeline.predict(pixels) for pipeline in (before, after))
    return {
        "weights": sum(own[name].numel() for name in names),
        "changed_weights": [name for name in names if not torch.equal(own[name], other[name])],
        "changed_outputs": [name for name in PREDICTED if not torch.equal(getattr(first, name), getattr(second, name))],
    }


if __name__ == "__main__":
    sys.exit(main())
