"""The fixtures are the ones that the released code produced: never edited, never regenerated."""

import hashlib

import pytest

from tests.parity import golden

SUMS = dict(reversed(line.split(maxsplit=1)) for line in (golden.DEFAULT / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", sorted(SUMS))
def test_golden_file_is_unchanged(name: str) -> None:
    digest = hashlib.sha256((golden.DEFAULT / name).read_bytes()).hexdigest()
    assert digest == SUMS[name]


def test_every_golden_file_is_listed() -> None:
    files = {path.relative_to(golden.DEFAULT).as_posix() for path in golden.DEFAULT.rglob("*") if path.is_file()}
    assert files - {"SHA256SUMS"} == set(SUMS)
