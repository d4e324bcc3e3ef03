"""Finds golden fixtures. `G2VLM_GOLDEN` names another folder of the same layout; the default is tests/golden."""

import os
from pathlib import Path

import pytest

DEFAULT = Path(__file__).resolve().parents[1] / "golden"


def root() -> Path:
    """The folder that holds the fixture families."""
    return Path(os.environ.get("G2VLM_GOLDEN") or DEFAULT)


def cases(pattern: str) -> list:
    """Every path matching `pattern` below the root, as pytest parameters.

    An absent family is a skip in a given folder, and a failure in the default one.
    """
    found = sorted(root().glob(pattern))
    if found:
        return [pytest.param(path, id=path.relative_to(root()).as_posix()) for path in found]
    if root() == DEFAULT:
        raise FileNotFoundError(f"no golden fixture matches {pattern} in {DEFAULT}")
    return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=f"no {pattern} in {root()}"))]
