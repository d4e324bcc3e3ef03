"""The report of `make quickstart`: `python -m eval.quickstart FOLDER`.

FOLDER holds `stage1` and `stage2`, training runs; `trained` and `demo`, what eval/recon.py wrote about the model of
stage 1, with a gate, and about the demo weights; `answers`, what eval/vqa.py wrote about the model of stage 2; and
`room` of eval/quickstart_room.py. The report and pictures of the losses are written beside them; stdout gets the
tables. The exit code is 1 when the model of stage 1 missed its gate, or stage 2 had losses that are not finite.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from eval.baselines import CONSTANT, IDENTITY, UNTRAINED
from eval.gate import require_passed, told
from eval.quickstart_answers import ANSWERS, kept, learned, questions_text, room_section, score_section, standing
from eval.quickstart_room import MODEL, PHOTOS, RECORD, ROOM, STAGE1, STAGE2
from eval.quickstart_runs import Training, facts, loss_chart, read_json
from eval.records import REPORT, RESULTS, RUN, write_text
from eval.report import markdown_table, notes, text_table
from g2vlm.checkpoint import DEMO_NAME
from g2vlm.cli import guarded, log_to_stderr, to_stdout
from g2vlm.errors import InputError
from geometry.io.common import atomic_file

TRAINED, DEMO = "trained", "demo"
LOSSES = {STAGE1: "losses.png", STAGE2: "losses-stage2.png"}
NUM_ON_THE_WAY = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code."""
    parser = ArgumentParser(prog="python -m eval.quickstart", description="Write the report of make quickstart.")
    parser.add_argument("folder", type=Path, help="holds stage1, stage2, trained, demo, answers and room")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    log_to_stderr()
    return guarded(lambda: to_stdout(lambda: tell(args.folder)), args.debug)


def tell(folder: Path) -> None:
    """Write the report, print the tables and where the report is.

    Raises:
        InputError: a part is missing.
        CheckFailed: the model of stage 1 missed its gate, or stage 2 had losses that are not finite; the report is
            written.
    """
    stages = {"stage 1": Training.read(folder / STAGE1), "stage 2": Training.read(folder / STAGE2)}
    trained, demo, answers = (read_json(folder / name / RESULTS) for name in (TRAINED, DEMO, ANSWERS))
    room = read_json(folder / ROOM / RECORD)
    if "gate" not in trained:
        raise InputError(f"no gate in {folder / TRAINED / RESULTS}", "eval/recon.py had no --gate", "pass one")
    held_out = ("held-out rooms", "questions about held-out rooms")
    for (name, training), file, validated in zip(stages.items(), LOSSES.values(), held_out, strict=True):
        with atomic_file(folder / file) as target:
            loss_chart(training, f"loss of {name}", validated).save(target, format="PNG")
    records = Records(trained, demo, answers, room)
    write_text(folder / REPORT, markdown(folder, stages, records))
    print("\n".join([*said(records, stages["stage 2"]), f"report in {folder / REPORT}"]), flush=True)
    stages["stage 2"].require_finite("stage 2")
    require_passed(trained["gate"])


# ---------------------------------------------------------------------------------------------- what is told


@dataclass(frozen=True)
class Records:
    """What the evaluations wrote: about the model of stage 1, the demo weights, the model of stage 2, and a room."""

    trained: Mapping[str, Any]
    demo: Mapping[str, Any]
    answers: Mapping[str, Any]
    room: Mapping[str, Any]


def systems(trained: Mapping[str, Any], demo: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The columns of the table: name -> metrics."""
    baselines = {name: trained["baselines"][name] for name in (UNTRAINED, CONSTANT, IDENTITY)}
    return {"trained here": trained["metrics"], DEMO_NAME: demo["metrics"], **baselines}


def verdict(trained: Mapping[str, Any]) -> str:
    """Whether the gate was passed, with both numbers."""
    return f"gate {'passed' if trained['gate']['passed'] else 'MISSED'}: {told(trained['gate'])}"


def rotation(trained: Mapping[str, Any]) -> str:
    """The rotations between views beside those of identity poses."""
    model, identity = trained["metrics"], trained["baselines"][IDENTITY]
    return (
        f"rotation: median error {model['rotation_median_deg']:.1f} degrees, identity pose "
        f"{identity['rotation_median_deg']:.1f}; within 15 degrees {model['rra_15']:.1f} % of the pairs of views, "
        f"identity pose {identity['rra_15']:.1f} %"
    )


def said(records: Records, stage2: Training) -> list[str]:
    """What stdout gets."""
    return [
        records.trained["benchmark"],
        "",
        text_table(systems(records.trained, records.demo)),
        "",
        verdict(records.trained),
        rotation(records.trained),
        "",
        questions_text(records.room),
        "",
        standing(records.answers),
        learned(records.answers, stage2),
        kept(records.room["frozen"]),
        "",
    ]


def markdown(folder: Path, stages: Mapping[str, Training], records: Records) -> str:
    """The report."""
    trained, answers, room = records.trained, records.answers, records.room
    parts = [
        "# What make quickstart did",
        "A small G2VLM, starting from random weights, learned on this machine: in stage 1 geometry from rendered "
        "rooms, in stage 2 to answer questions about them. Then it reconstructed rooms that it never saw, and answered "
        "questions about them.",
        f"- **{verdict(trained)}**\n- {rotation(trained)}\n- **{standing(answers)}**\n- {kept(room['frozen'])}",
        f"## Three questions about a room that it never saw\n\n{room_section(folder, room, frames(folder))}",
        f"## Scores: answers\n\n{score_section(answers, stages['stage 2'])}",
        f"## Scores: reconstruction\n\n{trained['benchmark']}: {trained['count']} rooms, {len(trained['skipped'])} "
        "skipped. Depth, points, normals and cameras are compared with the truth.",
        markdown_table(systems(trained, records.demo)),
        "\n".join(
            [
                "- trained here: the model of this run",
                f"- {DEMO_NAME}: what the package brings, trained for longer on rooms of the same kind "
                "(g2vlm/assets/demo/README.md)",
                *notes(trained),
            ]
        ),
        f"## Reconstructions\n\n{rooms(folder)}",
        f"## Training\n\n{facts(stages, read_json(folder / ANSWERS / RUN)['date'])}",
        picture_table({name: folder / file for name, file in zip(stages, LOSSES.values(), strict=True)}, folder, 480),
        on_the_way(folder),
        f"## Where to go next\n\n{next_steps(folder)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def frames(folder: Path) -> str:
    """The views of the room."""
    photos = sorted((folder / ROOM / PHOTOS).glob("frame-*.png"))
    return picture_table({photo.stem.replace("-", " "): photo for photo in photos}, folder, 160)


def on_the_way(folder: Path) -> str:
    """The same held-out room after some of the validations; nothing when there was none."""
    pictures = sorted((folder / STAGE1 / "validation").glob("step-*.png"))
    if not pictures:
        return ""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, NUM_ON_THE_WAY).round().astype(int))
    columns = {f"after step {int(p.stem.removeprefix('step-')):,}": p for p in (pictures[i] for i in chosen)}
    text = "One held-out room during training: images, true and predicted depth, true and predicted normals."
    return f"{text}\n\n{picture_table(columns, folder, 220)}"


def rooms(folder: Path) -> str:
    """The pictured rooms: the truth, the trained model and the demo weights side by side."""
    shown = []
    for picture in sorted((folder / TRAINED / "pictures").glob("*.truth.png")):
        name = picture.name.removesuffix(".truth.png")
        kinds = {"truth": picture, "trained here": picture.with_name(f"{name}.png")}
        columns = {**kinds, DEMO_NAME: folder / DEMO / "pictures" / f"{name}.png"}
        shown.append(f"{name}\n\n{picture_table(columns, folder, 400)}")
    return "\n\n".join(shown)


def picture_table(columns: Mapping[str, Path], folder: Path, width: int) -> str:
    """A row of pictures, each a link to itself, under their names."""
    paths = {name: path.relative_to(folder).as_posix() for name, path in columns.items()}
    cells = [f'<a href="{path}"><img src="{path}" alt="{name}" width="{width}"></a>' for name, path in paths.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), cells))


def next_steps(folder: Path) -> str:
    """Commands for what one may want to do now."""
    first, second = (f"{folder.as_posix()}/{stage}/{MODEL}" for stage in (STAGE1, STAGE2))
    return f"""```bash
source .venv/bin/activate
# photos of your own, reconstructed by the demo weights, or by the model of this run
g2vlm recon photos/ -o out/room
g2vlm recon photos/ -o out/mine --model {second}
g2vlm chat photos/ --model {second}
# what it was trained on and asked about
g2vlm data preview rooms -o rooms.png
g2vlm data preview rooms_qa -o questions.png
# train for longer; stage 2 starts from train/weights/stage1, or from --model (docs/training.md)
bash train/stage1_geometry.sh --runtime.steps 20000
bash train/stage2_joint.sh --runtime.steps 20000
# a larger model on a GPU
bash train/stage1_geometry.sh --config configs/small_stage1.yaml
# does it use the geometry? asked with that of another room (docs/evaluation.md)
python eval/vqa.py --model {second} --geometry shuffled --compare {folder.as_posix()}/{ANSWERS}
# score it on real scenes
python eval/recon.py --dataset seven_scenes --data 7scenes --width 84 --model {first}
```"""


if __name__ == "__main__":
    sys.exit(main())
