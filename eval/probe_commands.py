"""What `eval/probe.py` does, once its arguments are parsed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from torch import Tensor

from eval.baselines import CONSTANT, UNTRAINED
from eval.benchmarks import Benchmark, find_benchmark
from eval.compared import read_compared
from eval.conditions import Conditions
from eval.evaluate import MODEL
from eval.probe_data import STRIDE, Features, Room, Rooms, asked_rooms, collect, plain_rooms
from eval.probe_report import (
    GREY,
    bins_chart,
    depth_picture,
    markdown,
    models_chart,
    models_markdown,
    models_table,
    save,
    table,
    training_chart,
)
from eval.probe_scores import RoomScore, bins, constant_depth, errors_of, rank_correlation, score_rooms, summary
from eval.probe_training import ProbeConfig, train_probe
from eval.records import ITEMS, append_lines, write_record
from eval.runs import output_folder, require_positive
from eval.sources import distinct, evenly, file_name
from eval.student import OwnModel, Student, StudentModel, open_model, require_size
from eval.vqa_run import evaluate_vqa
from g2vlm.chat_model import ChatModel
from g2vlm.errors import InputError
from g2vlm.staging import write_errors
from g2vlm.supervision.layers import proportional_layers

log = logging.getLogger(__name__)
DEFAULT_SIZE = 224
"""Where nobody says what a model was trained at."""
GEOVR_BLOCKS, GEOVR_DEPTH = (4, 11, 17, 23), 24
WATCHED = 10
"""How often a probe is scored on held-out rooms while it trains."""
DEFAULTS = {"steps": 300, "rooms": 256, "channels": 32, "limit": None, "layers": None, "size": None}
"""Of the protocol; a run with others says so."""


@dataclass(eq=False)
class Probed:
    """A probe of one system.

    Args:
        student: the model, or what stands for it.
        depth: (F, H, W) of the held-out frames.
        rooms: its scores.
        curve: (steps, 2) mean error of training batches.
        heldout: (n, 2) RMSE of held-out rooms on the way.
        features: of the held-out frames.
    """

    student: Student
    depth: Tensor
    rooms: list[RoomScore]
    curve: np.ndarray
    heldout: np.ndarray
    features: Features


@dataclass(frozen=True, eq=False)
class Setting:
    """What a model is probed on.

    Args:
        rooms: what they are.
        training, heldout: to train and score on.
        size: width of the views.
        layers: four.
        config: of the probe.
        geometry: as of a student.
        device: of the probe.
    """

    rooms: Rooms
    training: Sequence[Room]
    heldout: Sequence[Room]
    size: int
    layers: tuple[int, ...]
    config: ProbeConfig
    geometry: Any
    device: str


def run(args: Namespace) -> None:
    """Probe one model or several; write everything into the output folder; print the table."""
    for name in ("steps", "rooms", "channels", "limit"):
        require_positive(name, args[name])
    require_size("--size", args.size)
    if args.channels % 8:
        raise InputError(f"--channels {args.channels}", "half of them hold sines and cosines", "give a multiple of 8")
    if args.model is not None and args.models:
        raise InputError("--model and --models", "they name the same thing", "leave one of them out")
    models = args.models or [args.model]
    if args.answers and args.benchmark is None:
        raise InputError("--answers needs --benchmark", "it says which questions they are", "add --benchmark rooms_qa")
    if args.answers and len(args.answers) != len(models):
        raise InputError(
            f"{len(args.answers)} --answers for {len(models)} models", "each belongs to one", "give one for each"
        )
    benchmark = None if args.benchmark is None else find_benchmark(args.benchmark)
    answers = read_answers(args.answers, benchmark, args.limit)
    output = output_folder(args.output, "probe")
    names = distinct([*map(short_name, models)])
    records: dict[str, dict[str, Any]] = {}
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for number, (name, model) in enumerate(zip(names, models, strict=True)):
            folder = output if len(models) == 1 else output / name
            given = answers[number] if answers else None
            records[name] = probe_model(open_model(model, args.device, args.dtype), benchmark, given, args, folder)
        if len(models) == 1:
            print(f"{table(records[names[0]])}\nresults in {output}", flush=True)
            return
        record = compared(records)
        write_record(output, record, models_markdown(record), args.device)
        if "spearman" in record["metrics"]:
            save(models_chart(record), output / "models.png")
    print(f"{models_table(record)}\nresults in {output}", flush=True)


def short_name(model: str | None) -> str:
    """Of a model in a table and as a folder: its run's, for a run keeps it in a folder `model`."""
    path = Path(model or "demo")
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def read_answers(paths: Sequence[Path], benchmark: Benchmark | None, limit: int | None) -> list[dict[str, float]]:
    """Scores by question of earlier runs, in order."""
    if benchmark is None:
        return []
    return [next(iter(read_compared([path], benchmark, limit).values())) for path in paths]


def probe_model(
    model: StudentModel,
    benchmark: Benchmark | None,
    answers: Mapping[str, float] | None,
    args: Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Probe a model and its baselines, and write its folder.

    Returns:
        What its `results.json` holds.
    """
    chat = chat_of(model) if benchmark is not None and answers is None else None
    folder.mkdir(parents=True, exist_ok=True)
    setting = setting_of(model, benchmark, args)
    log.info(
        "%s; views of %d pixels, layers %s; results in %s", setting.rooms.about, setting.size, setting.layers, folder
    )
    probed = {MODEL: probe(model.student(setting.size, setting.geometry), setting)}
    if not args.no_baselines:
        probed[UNTRAINED] = probe(model.untrained().student(setting.size, setting.geometry), setting)
        probed[GREY] = probe(model.student(setting.size, "off", blank=True), setting)
    own = probed[MODEL]
    for name, one in probed.items():
        append_lines(folder, ({"system": name, **asdict(room), "rmse": room.rmse} for room in one.rooms))
    found = summary(own.rooms)
    if benchmark is not None:
        known = answers if chat is None else asked(chat, benchmark, args)
        assert known is not None
        found |= answered(benchmark, known, own.rooms, args.limit)
    constant = {CONSTANT: summary(constant_depth(own.features))}
    record = {
        "benchmark": setting.rooms.name + modified(args),
        "protocol": protocol(setting, args),
        "model": model.name,
        "count": len(own.rooms),
        "skipped": [],
        "metrics": found,
        "baselines": constant | {name: summary(one.rooms) for name, one in probed.items() if name != MODEL},
        "per_item": ITEMS,
        "provenance": dict(own.student.provenance),
    }
    write_record(folder, record, markdown(record), args.device)
    save(training_chart({n: p.curve for n, p in probed.items()}, {n: p.heldout for n, p in probed.items()}),
         folder / "training.png")  # fmt: skip
    if "bin_accuracy/1" in found:
        save(bins_chart(found), folder / "bins.png")
    draw(setting.heldout, probed, folder / "pictures", args.pictures)
    return record


def setting_of(model: StudentModel, benchmark: Benchmark | None, args: Namespace) -> Setting:
    """What the arguments ask for, with what the model says where they are silent."""
    student = model.student(args.size or DEFAULT_SIZE, args.geometry)
    size, blocks = args.size or student.trained_size or DEFAULT_SIZE, student.backbone.num_layers
    layers = tuple(args.layers or proportional_layers(GEOVR_BLOCKS, GEOVR_DEPTH, blocks))
    if any(not 0 <= layer <= blocks for layer in layers):
        raise InputError(f"--layers {' '.join(map(str, layers))}", f"the model has 0 to {blocks}", "choose among them")
    rooms = (
        plain_rooms(size, args.rooms, args.limit)
        if benchmark is None
        else asked_rooms(benchmark, size, args.rooms, args.limit)
    )
    config = ProbeConfig(steps=args.steps, channels=args.channels)
    log.info("rendering %d training rooms and %d held-out ones", len(rooms.training), len(rooms.heldout))
    training, heldout = ([*map(Room.load, items)] for items in (rooms.training, rooms.heldout))
    return Setting(rooms, training, heldout, size, layers, config, args.geometry, args.device)


def probe(student: Student, setting: Setting) -> Probed:
    """Train and score a probe of a student."""
    training = collect(student, setting.training, setting.layers)
    heldout = collect(student, setting.heldout, setting.layers)
    log.info("%s: training a probe on %d frames", student.name, len(training))
    every = max(1, setting.config.steps // WATCHED)
    on_the_way: list[tuple[int, float]] = []

    def watch(step: int, trained: Any) -> None:
        if step % every == 0 or step == setting.config.steps:
            on_the_way.append((step, summary(score_rooms(trained.predict(heldout), heldout))["rmse"]))

    trained = train_probe(training, setting.config, setting.device, watch)
    depth = trained.predict(heldout)
    curve = np.array(trained.curve)
    return Probed(student, depth, score_rooms(depth, heldout), curve, np.array(on_the_way), heldout)


# ---------------------------------------------------------------------------------------------- answers


def chat_of(model: StudentModel) -> ChatModel:
    """The model as one that can be asked.

    Raises:
        InputError: it is none of ours.
        CheckpointError: it has no tokenizer, or another model's.
    """
    if not isinstance(model, OwnModel):
        raise InputError(f"{model.name} cannot be asked", "--benchmark asks our own models", "give its --answers")
    return model.pipeline.chat


def asked(chat: ChatModel, benchmark: Benchmark, args: Namespace) -> dict[str, float]:
    """Scores by question of a model that is asked now."""
    log.info("asking the questions of %s", benchmark.name)
    evaluation = evaluate_vqa(chat, benchmark, Conditions(args.geometry), args.limit)
    return {reply.question.id: reply.score for reply in evaluation.replies}


def answered(
    benchmark: Benchmark, answers: Mapping[str, float], rooms: Sequence[RoomScore], limit: int | None
) -> dict[str, float]:
    """`answers`, the mean score in percent, and `bin_accuracy/N`, `bin_rmse/N`, `bin_count/N` from the worst bin on."""
    error = errors_of(rooms)
    questions = [question for question in benchmark.questions()[:limit] if question.id in answers]
    scores = np.array([answers[question.id] for question in questions])
    found = {"answers": 100 * float(scores.mean())}
    for number, one in enumerate(bins(np.array([error[question.scene] for question in questions]), scores), 1):
        found |= {f"bin_accuracy/{number}": one.accuracy, f"bin_rmse/{number}": one.rmse}
        found[f"bin_count/{number}"] = one.count
    return found


# ---------------------------------------------------------------------------------------------- records


def protocol(setting: Setting, args: Namespace) -> dict[str, Any]:
    """Everything that decides whether two numbers can be compared."""
    return {
        "name": setting.rooms.name,
        "about": setting.rooms.about,
        "training_rooms": len(setting.rooms.training),
        "num_views": setting.rooms.num_views,
        "size": setting.size,
        "depth_size": setting.size // STRIDE,
        "layers": [*setting.layers],
        "geometry": setting.geometry,
        "probe": asdict(setting.config),
        "loss": "mean absolute error + gradient matching at 4 strides",
        "alignment": "none",
        "modified": changes(args),
    }


def changes(args: Namespace) -> dict[str, Any]:
    """Constants of the protocol that the arguments changed."""
    return {name: args[name] for name, value in DEFAULTS.items() if args[name] != value}


def modified(args: Namespace) -> str:
    """The same, behind the name of the benchmark."""
    told = ", ".join(f"{name} {value}" for name, value in changes(args).items())
    return f" (modified: {told})" if told else ""


def compared(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `results.json` of several models holds: their metrics, and the rank correlation of error and answers."""
    first = next(iter(records.values()))
    metrics = [own["metrics"] for own in records.values()]
    found = {}
    if all("answers" in own for own in metrics):
        found["spearman"] = rank_correlation([own["rmse"] for own in metrics], [own["answers"] for own in metrics])
    return {
        **{name: first[name] for name in ("benchmark", "protocol")},
        "model": ", ".join(records),
        "count": first["count"],
        "skipped": [],
        "metrics": found,
        "baselines": {},
        "models": {
            name: {key: own[key] for key in ("model", "protocol", "metrics", "baselines")}
            for name, own in records.items()
        },
        "per_item": {name: f"{name}/{ITEMS}" for name in records},
        "provenance": {name: own["provenance"] for name, own in records.items()},
    }


def draw(rooms: Sequence[Room], probed: Mapping[str, Probed], folder: Path, count: int) -> None:
    """Write pictures of at most `count` rooms, evenly chosen."""
    depths = {("probe" if name == MODEL else name): one.depth for name, one in probed.items()}
    for room in evenly(rooms, count):
        folder.mkdir(exist_ok=True)
        images = room.images.permute(0, 2, 3, 1).numpy()
        picture = depth_picture(room.name, images, depths, probed[MODEL].features)
        save(picture, folder / file_name(room.name, ".png"))
