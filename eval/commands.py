"""What `eval/recon.py` does, once its arguments are parsed."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace

from eval.baselines import baseline_systems, model_system
from eval.evaluate import MODEL, Evaluation, Scored, evaluate, require_scored
from eval.gate import judged, require_passed
from eval.pictures import draw
from eval.predictions import save_prediction
from eval.protocols import Protocol, find_protocol
from eval.reconstructions import photo_folders, reconstruct_folders
from eval.records import append_lines
from eval.report import append_rows, outputs_only, results, table, write
from eval.runs import load_named, output_folder, provenance_of, require_positive
from eval.sources import Item, evenly, file_name, first_views, frame_items, require_folder
from g2vlm.data.canonical import CanonicalSource
from g2vlm.data.rooms.heldout_v1 import SIZE, requests, source
from g2vlm.data.seven_scenes import DepthMode, SevenScenesSource
from g2vlm.errors import CheckFailed, InputError
from g2vlm.images import PATCH
from g2vlm.staging import write_errors

log = logging.getLogger(__name__)
PREDICTIONS = "predictions"


def recon(args: Namespace) -> None:
    """Evaluate, or only reconstruct; write everything into the output folder; print the table."""
    for name in ("views", "width", "max_points", "limit"):
        require_positive(name, args[name])
    if args.dataset == "rooms" and args.width is not None and args.width % PATCH:
        raise InputError(f"cannot use --width {args.width}", "", f"rooms are rendered in multiples of {PATCH}")
    if args.gate is not None and args.dataset == "images":
        raise InputError("--gate needs scores", "photographs have no ground truth", "leave it out")
    if args.gate is not None and args.no_baselines:
        raise InputError("--gate compares", "with --no-baselines there is nothing to compare with", "leave one out")
    if args.save_predictions and args.dataset == "images":
        raise InputError("--save-predictions is for scores", "photographs are always exported", "leave it out")
    protocol = find_protocol(args.dataset, args.protocol).changed(args.width, args.views, args.max_points, args.limit)
    output = output_folder(args.output, "recon")
    log.info("protocol %s (choose with --dataset, --protocol); results in %s", protocol.label, output)
    run = reconstruct_photos if args.dataset == "images" else evaluate_dataset
    record = run(args, protocol, output)
    print(f"{table(record)}\nresults in {output}", flush=True)
    if "gate" in record:
        require_passed(record["gate"])


def evaluate_dataset(args: Namespace, protocol: Protocol, output: Path) -> dict[str, Any]:
    """Score the model and its baselines on a dataset with ground truth."""
    items, protocol = OPEN[args.dataset](args.data, protocol)
    items = items[: args.limit]
    pipeline = load_named(args.model, args.device, args.dtype)
    own_width = pipeline.model.config.view_width
    if protocol.width not in (None, own_width):
        log.info("views are %d pixels wide; the model's own width is %d (--width)", protocol.width, own_width)
    provenance = provenance_of(pipeline)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        keep = keeper(output, protocol, pipeline.name, args.save_predictions)
        baselines = {} if args.no_baselines else baseline_systems(pipeline, protocol)
        evaluation = evaluate(items, {MODEL: model_system(pipeline), **baselines}, protocol, keep)
        record = results(evaluation, pipeline.name, provenance)
        if args.gate is not None and evaluation.count:
            record["gate"] = judged(record, args.gate)
        write(output, record, str(pipeline.model.device))
        require_scored(evaluation)
        if args.pictures > 0:
            draw(evenly(scored(items, evaluation), args.pictures), pipeline, protocol, output / "pictures")
    return record


def reconstruct_photos(args: Namespace, protocol: Protocol, output: Path) -> dict[str, Any]:
    """Reconstruct folders of photographs; nothing is scored."""
    folders = photo_folders(require_folder(args.dataset, args.data))[: args.limit]
    pipeline = load_named(args.model, args.device, args.dtype)
    provenance = provenance_of(pipeline)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        done, skipped = reconstruct_folders(folders, pipeline, protocol, output)
        record = outputs_only(protocol, done, skipped, pipeline.name, provenance)
        append_lines(output, [asdict(scene) for scene in done])
        write(output, record, str(pipeline.model.device))
    if not done:
        raise CheckFailed("nothing could be reconstructed", f"{skipped[0].item}: {skipped[0].reason}", "")
    return record


def keeper(output: Path, protocol: Protocol, model: str, save_predictions: bool) -> Callable[[Scored], None]:
    """Writes each scored item's rows, and if wished the model's prediction, as soon as they exist."""

    def keep(scored: Scored) -> None:
        append_rows(output, scored.rows)
        if save_predictions:
            folder = output / PREDICTIONS
            folder.mkdir(exist_ok=True)
            facts = {"item": scored.item, "views": json.dumps(scored.sample.view_ids)}
            facts |= {"model": model, "protocol": protocol.label}
            save_prediction(folder / file_name(scored.item, ".safetensors"), scored.predictions[MODEL], facts)

    return keep


def scored(items: Sequence[Item], evaluation: Evaluation) -> list[Item]:
    """The items that were not skipped."""
    skipped = {skipped.item for skipped in evaluation.skipped}
    return [item for item in items if item.name not in skipped]


# ---------------------------------------------------------------------------------------------- data


def rooms(data: Path | None, protocol: Protocol) -> tuple[list[Item], Protocol]:
    """The held-out rooms, at their size or a --width; --views takes the first of each room's."""
    if data is not None:
        raise InputError("rooms-heldout-v1 is rendered", "it takes no --data", "leave it out")
    size = SIZE if protocol.width is None else (protocol.width, protocol.width)
    held_out = source()
    items = [
        Item(f"heldout-{scene:02d}", lambda scene=scene, request=request: held_out.load(scene, request))
        for scene, request in enumerate(requests(size))
    ]
    return first_views(items, protocol.views.count), protocol


def seven_scenes(data: Path | None, protocol: Protocol) -> tuple[list[Item], Protocol]:
    """The test sequences of a folder in the 7-Scenes layout, or all of them where none is known as test sequence."""
    root = require_folder("seven_scenes", data)
    depth = cast(DepthMode, protocol.options["depth"])
    try:
        split, source = "test", SevenScenesSource(root, split="test", depth=depth)
    except InputError:
        split, source = "all", SevenScenesSource(root, depth=depth)
    log.info("%d sequences (split %s)", len(source), split)
    return frame_items(source, protocol), replace(protocol, options={**protocol.options, "split": split})


def canonical(data: Path | None, protocol: Protocol) -> tuple[list[Item], Protocol]:
    """Every scene folder of a folder."""
    return frame_items(CanonicalSource(require_folder("canonical", data)), protocol), protocol


OPEN: dict[str, Callable[[Path | None, Protocol], tuple[list[Item], Protocol]]] = {
    "rooms": rooms,
    "seven_scenes": seven_scenes,
    "canonical": canonical,
}
"""Items of a dataset, and the protocol with what was found out about the data."""
