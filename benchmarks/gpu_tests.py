"""The tests marked `gpu`, with their outcome as a result like any other."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.common import ROOT, Report, argument_parser, parse_device

OUTCOMES = ("failure", "error", "skipped")


def outcomes(junit: Path) -> Counter[str]:
    """How many tests passed, failed, broke and were skipped, from pytest's own report."""
    counts = Counter[str]()
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        counts[next((name for name in OUTCOMES if case.find(name) is not None), "passed")] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run pytest in this process; exits with its code."""
    parser = argument_parser("gpu_tests", __doc__)
    parser.add_argument("paths", nargs="*", default=[str(ROOT / "tests")])
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}", *args.paths])
        counts = outcomes(junit)
    report = Report("gpu_tests", parse_device(args), {"marker": "gpu"})
    report.rows.append({name: counts[name] for name in ("passed", *OUTCOMES)})
    report.complete = code == 0 and counts["passed"] > 0
    report.publish(args.output, args.note)
    raise SystemExit(0 if report.complete else 1)


if __name__ == "__main__":
    main()
