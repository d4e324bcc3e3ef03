"""What the report of `make quickstart` says about stage 2: scores, three questions, what stayed as it was."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.quickstart_room import MODEL, PHOTOS, QUESTIONS, RECON, ROOM, STAGE2
from eval.quickstart_runs import Training
from eval.records import NO_METRICS, markdown_rows, told_skips
from eval.vqa_report import WELL_FORMED, rows, span
from eval.vqa_run import MAX_NEW_TOKENS

ANSWERS = "answers"
LONGEST = 60  # characters of a reply that are shown
Record = Mapping[str, Any]


def best_blind(record: Record) -> str:
    """The name of the blind baseline with the highest macro score."""
    return max(record["baselines"], key=lambda name: record["baselines"][name]["macro"])


def standing(record: Record) -> str:
    """Where the model stands beside the best answers that are given without looking: words from the interval."""
    if not record["metrics"]:
        return f"answers: {NO_METRICS}"
    name = best_blind(record)
    lead, macro = record["leads"][name], record["metrics"]["macro"]
    if lead["low"] > 0:
        place = "above what can be answered without looking"
    elif lead["high"] < 0:
        place = "BELOW what can be answered without looking"
    else:
        place = "at the level of answers without looking"
    numbers = f"macro {macro:.1f}, best blind baseline ({name}) {record['baselines'][name]['macro']:.1f}"
    between = f"difference {lead['macro']:+.1f}, 95 % interval {span(lead['low'], lead['high'], '+')}"
    return f"answers {place}: {numbers}, {between}, {record['count']:,} questions"


def learned(record: Record, training: Training) -> str:
    """What the training taught, as far as the score shows it."""
    if not record["metrics"]:
        return ""
    form, looks = record["metrics"]["of_form"], record["leads"][best_blind(record)]["low"] > 0
    how = f"{form:.0f} % of the replies begin with a letter or number as asked"
    after = f"after {training.time} of stage 2"
    if form < WELL_FORMED:
        return f"{after} the model has not even learned the form of an answer: {how}"
    if looks:
        return f"{after} the model answers in the form asked for ({how}) and uses what it sees"
    return f"{after} the model answers in the form asked for ({how}), but nothing shows that it uses what it sees"


def kept(frozen: Record) -> str:
    """Whether stage 2 left the geometry as it was."""
    changed = [*frozen["changed_weights"], *frozen["changed_outputs"]]
    if changed:
        return f"frozen geometry CHANGED in stage 2: {', '.join(changed[:4])}{', ...' if len(changed) > 4 else ''}"
    return (
        f"frozen geometry: after stage 2 all {frozen['weights']:,} weights that reconstruct, and the reconstruction of "
        "this room, are bit for bit those of stage 1"
    )


def questions_text(room: Record) -> str:
    """The three questions with replies and true answers, a few lines each."""
    lines = [f"three questions about {room['scene']}, a room that no training saw"]
    for item in room["questions"]:
        lines += [f"  {' '.join([item['question'], *item['options']])}", f"    {told_reply(item)}"]
    return "\n".join(lines)


def told_reply(item: Record) -> str:
    """Reply, truth and score on one line."""
    return f"model: {_reply(item)}   true: {_truth(item)}   score {100 * item['score']:.0f}"


def _reply(item: Record) -> str:
    """On one line, also when the model babbles."""
    text = " ".join(item["reply"].replace("`", "'").split()) or "(nothing)"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _truth(item: Record) -> str:
    return f"{item['answer']}. {item['answer_text']}" if item["options"] else item["answer"]


def score_section(record: Record, training: Training) -> str:
    """The scores as Markdown."""
    head = f"{record['benchmark']}: {record['count']:,} questions, {len(record['skipped'])} skipped."
    if not record["metrics"]:
        return "\n\n".join([head, NO_METRICS])
    head_row, *body = rows(record)
    table = markdown_rows([["", "items", "trained here", *head_row[3:]], *body], names=1)
    links = f"[notes]({ANSWERS}/report.md), [more questions with their views]({ANSWERS}/transcript.md)"
    lines = [f"percent; {learned(record, training)}", *told_skips(record), links]
    return "\n\n".join([head, table, "\n".join(f"- {line}" for line in lines)])


def room_section(folder: Path, room: Record, frames: str) -> str:
    """The room, its reconstruction and the three questions as Markdown.

    Args:
        folder: of the report.
        room: what eval/quickstart_room.py wrote.
        frames: its views as a table.
    """
    files = ", ".join(f"[{name}]({ROOM}/{RECON}/{name})" for name in ("points.ply", "points.glb", "preview.png"))
    table = [["question", "reply", "true answer", "score"], *map(_row, room["questions"])]
    photos, model = (f"{folder.as_posix()}/{name}" for name in (f"{ROOM}/{PHOTOS}", f"{STAGE2}/{MODEL}"))
    questions = f"{folder.as_posix()}/{ROOM}/{QUESTIONS}"
    commands = [
        f"g2vlm recon {photos} --model {model} -o out/room",
        f"g2vlm ask {photos} --model {model} --stdin --max-new-tokens {MAX_NEW_TOKENS} < {questions}",
    ]
    preview = f"{ROOM}/{RECON}/preview.png"
    return "\n\n".join(
        [
            f"{room['scene']}, {len(frames.splitlines()[0].split('|')) - 2} views:",
            frames,
            markdown_rows(table, names=3),
            f"The reconstruction by the model of stage 2: {files}. {_sentence(kept(room['frozen']))}",
            f'<a href="{preview}"><img src="{preview}" alt="reconstruction" width="640"></a>',
            "\n".join(["The same again:", "", "```bash", *commands, "```"]),
        ]
    )


def _row(item: Record) -> list[str]:
    words: Sequence[str] = [item["question"], *item["options"]]
    cells = ["<br>".join(" ".join(line.split()) for line in words), f"`{_reply(item)}`", _truth(item)]
    return [*(cell.replace("|", "\\|") for cell in cells), f"{100 * item['score']:.0f}"]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
