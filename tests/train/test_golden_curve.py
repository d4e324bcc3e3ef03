import json

import pytest

from tests.train.golden_curve import FILE, NOISE, STEPS, TOLERANCE, config, curve, fingerprint
from train.changes import differences
from train.config import plain

RECORD = "python -m tests.train.golden_curve records it anew"


@pytest.fixture(scope="module")
def found() -> list[dict[str, float]]:
    return curve()


def test_golden_curve(found: list[dict[str, float]]) -> None:
    """The committed curve is reproduced: bit for bit on the platform that recorded it, closely elsewhere.

    Bits can be promised only where the same machine code adds up in the same order: with the same torch and numpy, on
    the same kind of processor (libraries choose their kernels by it) and with one thread. Any other platform rounds
    differently in the last place, and the steps carry that on; there every number must agree to TOLERANCE.
    """
    golden = json.loads(FILE.read_text())
    assert not differences(golden["config"], plain(config())), f"the curve is of another config: {RECORD}"
    assert len(golden["steps"]) == len(found) == STEPS
    for step, (expected, actual) in enumerate(zip(golden["steps"], found, strict=True)):
        assert actual == pytest.approx(expected, rel=TOLERANCE, abs=NOISE), f"step {step}"
        if golden["fingerprint"] == fingerprint():
            assert actual == expected, f"the last bits changed; if a change of the code meant that: {RECORD}"


def test_the_curve_is_the_same_twice(found: list[dict[str, float]]) -> None:
    """On one machine always bit for bit."""
    assert curve() == found
