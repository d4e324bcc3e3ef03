"""The protocol: unequal outputs stop a benchmark, repeats interleave, results say where they come from."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import common, table
from benchmarks.common import (
    OutputsDiffer,
    Repeats,
    Report,
    Timing,
    measure_ceilings,
    peak_memory,
    relative_error,
    require_equal,
    source_digest,
    time_variants,
)

CPU = torch.device("cpu")


def test_relative_error_of_a_known_difference() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan"), 1.0]), expected) == float("inf")
    assert relative_error(expected, torch.tensor([float("inf"), 1.0])) == float("inf")


def test_different_outputs_stop_the_benchmark() -> None:
    a = torch.ones(4)
    assert require_equal("same", [a, a], [a, a + 1e-6], 1e-4) < 1e-5
    with pytest.raises(OutputsDiffer, match=r"fast: relative error 1\.00e-01 of tensor 1 exceeds 1e-02"):
        require_equal("fast", [a, 1.1 * a], [a, a], 1e-2)
    with pytest.raises(OutputsDiffer, match="shapes"):
        require_equal("fast", [a], [a[None]], 1e-2)


def test_repeats_interleave_after_a_warm_up_of_each() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_variants(runs, CPU, Repeats(warmup=2, rounds=3))
    assert "".join(calls) == "abab" + "ababab"
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_slow_variants_stop_early_but_not_before_the_least() -> None:
    runs = {"slow": lambda: time.sleep(0.01)}
    assert len(time_variants(runs, CPU, Repeats(0, rounds=50, seconds=0.0, least=4))["slow"].seconds) == 4


def test_the_time_of_this_process_leaves_out_waiting() -> None:
    runs = {"waits": lambda: time.sleep(0.05)}
    (waited,), (computed,) = (
        time_variants(runs, CPU, Repeats(0, rounds=1, cpu_time=cpu_time))["waits"].seconds for cpu_time in (False, True)
    )
    assert computed < 0.04 < waited


def test_median_and_spread() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 50.0))
    assert timing.median == 3
    assert timing.spread == pytest.approx(2 / 3)
    assert Timing((1.0,)).spread == 0


def test_peak_memory_is_not_guessed_on_a_cpu() -> None:
    assert peak_memory(lambda: torch.ones(4), CPU) is None


@pytest.mark.gpu
def test_peak_memory_counts_what_a_call_allocates() -> None:
    device = torch.device("cuda")
    held = torch.ones(2**20, device=device)
    assert peak_memory(lambda: (held + 1) * 2, device) == 2 * 4 * 2**20


def test_ceilings_are_positive_rates() -> None:
    ceilings = measure_ceilings(CPU, quick=True)
    assert ceilings.gemm_flops > 0
    assert ceilings.copy_bytes > 0


@pytest.fixture
def report() -> Report:
    rows: list[dict[str, object]] = [{"ratio": 1.23456, "name": "a"}, {"ratio": None, "extra": 12345.6}]
    return Report("demo", CPU, {"preset": "tiny"}, "sdpa", rows=rows, not_run=["8 views: no time"], notes=["shared"])


def test_results_are_written_only_when_asked(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.publish(None)
    assert "| 1.235 | a | - |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    report.publish(tmp_path / "new", ["a busy machine"])
    result = json.loads((tmp_path / "new" / "demo-cpu.json").read_text())
    assert result["rows"] == report.rows
    assert result["notes"] == ["shared", "a busy machine"]
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "sources"} == set(result["code"])


def test_table_renders_results_and_their_absence(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.main([str(tmp_path)])
    assert capsys.readouterr().out == "not run\n"
    report.publish(tmp_path)
    capsys.readouterr()
    table.main([str(tmp_path)])
    out = capsys.readouterr().out
    for text in ("## demo on ", "attention sdpa", "| - | - | 12346 |", "- not run: 8 views: no time", "- shared"):
        assert text in out


def test_committed_results_render() -> None:
    for result in table.read_results(table.RESULTS):
        assert result["machine"]["card"] in table.render(result)


def test_sources_change_the_digest(tmp_path: Path) -> None:
    source = tmp_path / "g2vlm" / "a.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    before = source_digest(tmp_path)
    source.write_text("x = 2\n")
    assert source_digest(tmp_path) != before


def test_commit_can_be_named_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.COMMIT, "abc123")
    assert common.describe_code()["commit"] == "abc123"
