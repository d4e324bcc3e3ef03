"""The report of `make quickstart`: `python -m eval.quickstart FOLDER`.

FOLDER holds `stage1`, a training run; `trained` and `demo`, what eval/recon.py wrote about its model, with a gate, and
about the demo weights. The report and a picture of the losses are written beside them; stdout gets the table. The exit
code is 1 when the trained model missed its gate.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser

from eval.baselines import CONSTANT, IDENTITY, UNTRAINED
from eval.charts import Series, line_chart, running_mean
from eval.gate import require_passed, told
from eval.records import REPORT, RESULTS, RUN
from eval.report import markdown_table, notes, text_table
from g2vlm.checkpoint import DEMO_NAME
from g2vlm.cli import guarded, log_to_stderr, to_stdout
from g2vlm.errors import InputError
from geometry.io.common import atomic_file

STAGE1, TRAINED, DEMO, LOSSES = "stage1", "trained", "demo", "losses.png"
NUM_ON_THE_WAY = 4
PALE, BLUE, ORANGE = (196, 210, 232), (38, 84, 160), (222, 110, 40)


@dataclass(frozen=True)
class Training:
    """What a training run left: `run.json`, and the lines of `log.jsonl` and `speed.jsonl`."""

    run: dict[str, Any]
    log: list[dict[str, Any]]
    speed: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Training":
        """Read the folder of a run."""
        return cls(read_json(folder / RUN), read_lines(folder / "log.jsonl"), read_lines(folder / "speed.jsonl"))

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of the log about steps."""
        return [line for line in self.log if line["kind"] == "step"]

    @property
    def views(self) -> int:
        """Images that the model was trained on."""
        return sum(line["scenes"] * line["views"] for line in self.steps)

    @property
    def seconds(self) -> float:
        """Time of all steps, with data, validation and checkpoints; what was repeated after an interruption not."""
        ends = [line["step"] for line in self.speed]
        counts = np.diff([0, *ends])
        return float(sum(n / line["steps_per_second"] for n, line in zip(counts, self.speed, strict=True)))

    def losses(self, kind: str) -> np.ndarray:
        """(N, 2) step and loss of the lines of a kind."""
        return np.array([(line["step"], line["loss"]) for line in self.log if line["kind"] == kind]).reshape(-1, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and return the exit code."""
    parser = ArgumentParser(prog="python -m eval.quickstart", description="Write the report of make quickstart.")
    parser.add_argument("folder", type=Path, help="holds stage1, trained and demo")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(arguments)
    log_to_stderr()
    return guarded(lambda: to_stdout(lambda: tell(args.folder)), args.debug)


def tell(folder: Path) -> None:
    """Write the report, print the table and where the report is.

    Raises:
        InputError: a part is missing.
        CheckFailed: the trained model missed its gate; the report is written.
    """
    training = Training.read(folder / STAGE1)
    trained, demo = (read_json(folder / name / RESULTS) for name in (TRAINED, DEMO))
    if "gate" not in trained:
        raise InputError(f"no gate in {folder / TRAINED / RESULTS}", "eval/recon.py had no --gate", "pass one")
    with atomic_file(folder / LOSSES) as file:
        loss_chart(training).save(file, format="PNG")
    text = markdown(folder, training, trained, demo)
    with atomic_file(folder / REPORT) as file:
        file.write(text.encode())
    lines = [trained["benchmark"], "", text_table(systems(trained, demo)), "", verdict(trained), rotation(trained)]
    print("\n".join([*lines, f"report in {folder / REPORT}"]), flush=True)
    require_passed(trained["gate"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; errors as in `read`."""
    return read(path, json.loads)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with one JSON object a line; errors as in `read`."""
    return read(path, lambda text: [json.loads(line) for line in text.splitlines()])


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    """What a file holds.

    Raises:
        InputError: it is absent or damaged.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", str(error), "make quickstart writes all parts of the report") from None


# ---------------------------------------------------------------------------------------------- what is told


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


def loss_chart(training: Training) -> Any:
    """Losses over the steps: of every step, their running mean, and on held-out rooms."""
    steps = training.losses("step")
    window = max(1, len(steps) // 40)
    return line_chart(
        "loss of stage 1",
        "step",
        [
            Series("training, each step", steps, PALE, width=1),
            Series(f"training, mean of {window}", running_mean(steps, window), BLUE, width=2.5),
            Series("held-out rooms", training.losses("validation"), ORANGE, dots=True),
        ],
    )


def markdown(folder: Path, training: Training, trained: Mapping[str, Any], demo: Mapping[str, Any]) -> str:
    """The report."""
    parts = [
        "# What make quickstart did",
        f"A small G2VLM learned geometry from rendered rooms, starting from random weights, on this machine. Then it "
        f"reconstructed {trained['count']} rooms that it never saw, and its depth, points, normals and cameras were "
        "compared with the truth.",
        f"- **{verdict(trained)}**\n- {rotation(trained)}",
        f"## Scores\n\n{trained['benchmark']}: {trained['count']} rooms, {len(trained['skipped'])} skipped.",
        markdown_table(systems(trained, demo)),
        "\n".join(
            [
                "- trained here: the model of this run",
                f"- {DEMO_NAME}: what the package brings, trained for longer on rooms of the same kind "
                "(g2vlm/assets/demo/README.md)",
                *notes(trained),
            ]
        ),
        f"## Rooms that it never saw\n\n{rooms(folder)}",
        f"## Stage 1: training\n\n{facts(training, read_json(folder / TRAINED / RUN)['date'])}",
        f"![losses over the steps]({LOSSES})",
        on_the_way(folder),
        f"## Where to go next\n\n{next_steps(folder)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(training: Training, date: str) -> str:
    """A table of what was run."""
    run, config = training.run, training.run["config"]
    commit = run["commit"]
    changed = ", with changed files" if commit and commit["dirty"] else ""
    versions = {"python": run["python"], **run["versions"]}
    minutes, seconds = divmod(round(training.seconds), 60)
    rows = {
        "command": f"`{shlex.join(run['command'])}`",
        "config": f"`{STAGE1}/config.yaml` holds every value",
        "model": f"{config['model']}, from random weights, seed {config['runtime']['seed']}",
        "steps": f"{len(training.steps):,}",
        "images seen": f"{training.views:,}, {config['data']['width']} pixels wide",
        "time": f"{minutes} min {seconds} s on {run['device']}, threads: {run['threads']}",
        "finished": date,
        "commit": f"{commit['hash'][:12]}{changed}" if commit else "unknown: not a git checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


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
    model = f"{folder.as_posix()}/{STAGE1}/model"
    return f"""```bash
source .venv/bin/activate
# photos of your own, reconstructed by the demo weights, or by the model of this run
g2vlm recon photos/ -o out/room
g2vlm recon photos/ -o out/mine --model {model}
# what it was trained on
g2vlm data preview rooms -o rooms.png
# train for longer; a larger model on a GPU (docs/training.md)
bash train/stage1_geometry.sh --runtime.steps 20000
bash train/stage1_geometry.sh --config configs/small_stage1.yaml
# score it on real scenes (docs/evaluation.md)
python eval/recon.py --dataset seven_scenes --data 7scenes --width 84 --model {model}
```"""


if __name__ == "__main__":
    sys.exit(main())
