"""What `eval/vqa.py` does, once its arguments are parsed."""

import logging
from typing import Any

from jsonargparse import Namespace

from eval.benchmarks import find_benchmark
from eval.compared import read_compared
from eval.conditions import Conditions
from eval.records import append_lines, write_record
from eval.runs import load_named, output_folder, provenance_of, require_positive
from eval.vqa_gate import judged, require_passed
from eval.vqa_pictures import write_transcript
from eval.vqa_report import markdown, table
from eval.vqa_run import evaluate_vqa, require_asked
from eval.vqa_summary import blind_scores, item_line, results
from g2vlm.staging import write_errors

log = logging.getLogger(__name__)


def vqa(args: Namespace) -> None:
    """Ask and score; write everything into the output folder; print the table."""
    require_positive("limit", args.limit)
    benchmark, conditions = find_benchmark(args.benchmark), Conditions(args.geometry, args.images)
    conditions.sources([*benchmark.scenes(args.limit)])  # which is refused before anything is written
    output = output_folder(args.output, "vqa")
    compared = read_compared(args.compare, benchmark, args.limit)
    told = f"geometry {conditions.geometry}, images {conditions.images}"
    log.info("questions %s, %s (choose with --benchmark, --geometry, --images); results in %s",
             benchmark.name, told, output)  # fmt: skip
    pipeline = load_named(args.model, args.device, args.dtype)
    provenance, chat = provenance_of(pipeline), pipeline.chat
    log.info("fitting blind baselines on training rooms")
    blind = blind_scores(benchmark, args.limit)
    with write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        evaluation = evaluate_vqa(
            chat,
            benchmark,
            conditions,
            args.limit,
            keep=lambda reply: append_lines(output, [item_line(reply, blind)]),
        )
        record = results(evaluation, blind, compared, pipeline.name, provenance)
        if args.gate is not None and evaluation.replies:
            record["gate"] = judged(record, args.gate)
        write_record(output, record, markdown(record), str(pipeline.model.device))
        require_asked(evaluation)
        if args.pictures > 0:
            write_transcript(evaluation, args.pictures, record, output)
    _tell(record, output)


def _tell(record: dict[str, Any], output: object) -> None:
    print(f"{table(record)}\nresults in {output}", flush=True)
    if "gate" in record:
        require_passed(record["gate"])
