"""Writes the two files that rooms QA ships with: `python -m g2vlm.data.qa.build table`, then `... heldout`.

Both take minutes and give the same files on every machine; `rooms-qa-heldout-v1` is fixed, so that writing it again
changes nothing unless it is about to become another set.
"""

import sys

from g2vlm.data.qa import heldout_v1
from g2vlm.data.qa.balance import TABLE, Balance, measure, write_table
from g2vlm.data.qa.question import write_questions
from g2vlm.data.qa.selection import select
from g2vlm.data.qa.source import RoomsQA, sweep

TABLE_SCENES = 200  # training scenes that the table is measured over


def write_balance() -> None:
    """Measure what training rooms offer."""
    offers = [found for _, found in sweep(RoomsQA(), heldout_v1.request(), range(TABLE_SCENES))]
    write_table(measure(offers), TABLE)


def write_heldout() -> None:
    """Select the held-out questions."""
    scenes = range(heldout_v1.NUM_SCENES)
    offers = [found for _, found in sweep(heldout_v1.source(), heldout_v1.request(), scenes)]
    write_questions(heldout_v1.FILE, select(offers, Balance.standard()))


if __name__ == "__main__":
    {"table": write_balance, "heldout": write_heldout}[sys.argv[1]]()
