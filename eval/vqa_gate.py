"""A model's gate: its macro score must be well above that of every answer given without looking."""

from collections.abc import Mapping
from typing import Any

from g2vlm.errors import CheckFailed, InputError


def judged(record: Mapping[str, Any], points: float) -> dict[str, Any]:
    """Whether a model's macro score is at least `points` above the best blind baseline's, for `results.json`.

    The lower bound of its 95 % interval must be above that baseline too.

    Raises:
        InputError: nothing was scored.
    """
    if not record["metrics"]:
        raise InputError("--gate cannot be checked", "nothing was scored", "leave it out")
    name, best = max(((name, own["macro"]) for name, own in record["baselines"].items()), key=lambda item: item[1])
    macro, low = record["metrics"]["macro"], record["metrics"]["macro_low"]
    passed = macro >= best + points and low > best
    return {"points": points, "macro": macro, "macro_low": low, "baseline": name, "best": best, "passed": passed}


def told(gate: Mapping[str, Any]) -> str:
    """The numbers and what was asked for, as one line."""
    found = f"macro {gate['macro']:.1f} (at least {gate['macro_low']:.1f}); best blind baseline, {gate['baseline']}, "
    return f"{found}{gate['best']:.1f}; asked for {gate['points']:g} points more"


def require_passed(gate: Mapping[str, Any]) -> None:
    """Raise CheckFailed when the gate was missed."""
    if not gate["passed"]:
        raise CheckFailed("the model misses its gate", told(gate), "train longer")
