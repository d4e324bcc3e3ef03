"""A model's gate: its AbsRel must be well below that of the best constant depth, or it has learned little."""

from collections.abc import Mapping
from typing import Any

from eval.baselines import CONSTANT
from g2vlm.errors import CheckFailed, InputError


def judged(record: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Whether a model's AbsRel is at most `share` of the best constant depth's, with both numbers, for `results.json`.

    Raises:
        InputError: no depth was scored.
    """
    model, constant = (metrics.get("abs_rel") for metrics in (record["metrics"], record["baselines"].get(CONSTANT, {})))
    if model is None or constant is None:
        raise InputError("--gate cannot be checked", "no depth was scored", "leave it out, or use data with depth")
    return {"share": share, "abs_rel": model, CONSTANT: constant, "passed": model <= share * constant}


def told(gate: Mapping[str, Any]) -> str:
    """Both numbers, their ratio and what was asked for, as one line."""
    model, constant = gate["abs_rel"], gate[CONSTANT]
    ratio = f"AbsRel {model:.4f} is {model / constant:.2f} times the best constant depth's {constant:.4f}"
    return f"{ratio}; asked for at most {gate['share']:g} times"


def require_passed(gate: Mapping[str, Any]) -> None:
    """Raise CheckFailed when the gate was missed."""
    if not gate["passed"]:
        raise CheckFailed("the model misses its gate", told(gate), "train longer")
