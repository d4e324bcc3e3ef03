"""Every benchmark runs at its smallest size on a CPU, and refuses to time what differs."""

import json
import re
import subprocess
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import attention, data, generate, gpu, gpu_tests, layer, precision, recon, train_step
from benchmarks.common import OutputsDiffer
from g2vlm.config import G2VLMConfig
from g2vlm.model import attention as model_attention
from g2vlm.model.attention import registry
from g2vlm.model.decoder import MoTLayer
from train import engine as engines
from train.config import load_config

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}-cpu.json").read_text())


def test_layer(tmp_path: Path) -> None:
    layer.main(["--cpu", "--tiny", "--output", str(tmp_path)])
    rows = result(tmp_path, "layer")["rows"]
    assert [row["variant"] for row in rows] == ["dense", "segments", "gather"] * 2
    assert all(row["time / dense"] == 1 for row in rows if row["variant"] == "dense")


@pytest.mark.parametrize("size", [layer.Size(64, 4, 2, 48, 2, 8), layer.Size(64, 4, 4, 40, 3, 5)])
def test_gather_equals_segments(size: layer.Size) -> None:
    case = layer.make_case(size, CPU, torch.float32)
    assert 0 < layer.largest_difference(case, 1e-4) < 1e-4
    assert case.semantic.tolist() == sorted(
        [i * size.view_tokens for i in range(size.num_views)]
        + [(i + 1) * size.view_tokens - 1 for i in range(size.num_views)]
    )


def test_a_wrong_gather_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer.gather
    monkeypatch.setitem(layer.VARIANTS, "gather", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(OutputsDiffer, match="gather against segments"):
        layer.main(["--cpu", "--tiny"])


def test_dense_sends_every_token_through_one_expert() -> None:
    case = layer.make_case(layer.Size(64, 4, 2, 48, 2, 8), CPU, torch.float32)
    _, *gradients = layer.forward_backward(case, "dense", *layer.variant_inputs(case, "dense"))
    used = {name for (name, _), g in zip(case.layer.named_parameters(), gradients[1:], strict=True) if g is not None}
    assert used == {name for name, _ in case.layer.named_parameters() if name.startswith("geometric.")}


def test_recon(tmp_path: Path) -> None:
    recon.main(["--cpu", "--tiny", "--sizes", "28", "--views", "1", "2", "--output", str(tmp_path)])
    found = result(tmp_path, "recon")
    assert [(row["views"], row["tokens"]) for row in found["rows"]] == [(1, 13), (2, 19)]
    assert found["complete"]


def test_recon_names_what_the_budget_leaves_out(tmp_path: Path) -> None:
    recon.main(["--cpu", "--tiny", "--views", "1", "--budget-seconds", "0", "--output", str(tmp_path)])
    found = result(tmp_path, "recon")
    assert found["rows"] == []
    assert not found["complete"]
    assert re.match(r"1 views of 56x56: needs about \d+ s, -?\d+ s of the budget are left", found["not_run"][0])


def test_recon_skips_what_will_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recon, "available_bytes", lambda device: 1000)
    settings = Namespace(
        device="cpu", tiny=True, cpu_time=False, preset=None, sizes=[28], views=[1], budget_seconds=60, name="recon"
    )
    report = recon.run(settings)
    assert report.rows == []
    assert "0.0 GB are free" in report.not_run[0]
    assert report.complete


def test_recon_is_compared_with_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, plan: model_attention.AttnPlan, scale: float) -> Tensor:
        return q

    monkeypatch.setitem(registry._BACKENDS, "wrong", registry._Backend(wrong, registry._never))
    monkeypatch.setenv(registry.ENVIRONMENT, "wrong")
    with pytest.raises(OutputsDiffer, match="against the oracle's attention"):
        recon.main(["--cpu", "--tiny", "--sizes", "28", "--views", "1"])


def test_attention(tmp_path: Path) -> None:
    attention.main(["--cpu", "--tiny", "--output", str(tmp_path)])
    rows = result(tmp_path, "attention")["rows"]
    assert {row["plan"] for row in rows} == set(attention.plans(4, 2))
    assert {row["backend"] for row in rows} >= {"sdpa", "eager"}


def test_attention_reports_and_then_fails_on_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sdpa = registry._BACKENDS["sdpa"].attend
    wrong = registry._Backend(lambda *arguments: 1.1 * sdpa(*arguments), registry._never)
    refusing = registry._Backend(sdpa, lambda request: "needs another device")
    monkeypatch.setattr(registry, "_BACKENDS", registry._BACKENDS | {"wrong": wrong, "refusing": refusing})
    with pytest.raises(OutputsDiffer, match=r"wrong on recon global in torch\.float32"):
        attention.main(["--cpu", "--tiny"])
    assert "needs another device" in capsys.readouterr().out


def test_generate(tmp_path: Path) -> None:
    generate.main(["--cpu", "--tiny", "--contexts", "40", "100", "--batch", "3", "--output", str(tmp_path)])
    rows = result(tmp_path, "generate")["rows"]
    variants = [("prefill", "ours"), ("prefill", "official")]
    variants += [("decode", "ours"), ("decode", "official"), ("decode", "ours, 3 rows")]
    assert [(row["context"], row["phase"], row["variant"]) for row in rows] == [
        (context, *variant) for context in (40, 100) for variant in variants
    ]
    assert all(row["time / ours"] == 1 for row in rows if row["variant"] == "ours")


@pytest.mark.parametrize(("part", "message"), [("official_prefill", "prefill"), ("official_decode", "decoding")])
def test_a_wrong_chat_is_not_timed(monkeypatch: pytest.MonkeyPatch, part: str, message: str) -> None:
    right = generate.official_forward

    def wrong(*arguments):
        hidden, cache = right(*arguments)
        decoding = hidden.shape[0] == 1
        return hidden * (1.01 if decoding == (part == "official_decode") else 1.0), cache

    monkeypatch.setattr(generate, "official_forward", wrong)
    with pytest.raises(OutputsDiffer, match=message):
        generate.main(["--cpu", "--tiny", "--contexts", "40"])


def test_train_step(tmp_path: Path) -> None:
    train_step.main(["--cpu", "--tiny", "--output", str(tmp_path)])
    found = result(tmp_path, "train_step")
    rows = {(row["step"], row["variant"]): row for row in found["rows"]}
    steps = [("stage 1", "trained"), ("CE", "no_grad"), ("CE", "differentiated")]
    assert [*rows] == [*steps, ("CE + CE", "trained"), ("VG + CE", "trained")]
    assert all(row["tokens/s"] > 0 and row["MFU %"] > 0 for row in rows.values())
    assert rows["stage 1", "trained"]["tokens"] == 2 * 6 + 1 + 6  # a bos and six tokens of the prompt
    cut, through = rows["CE", "no_grad"], rows["CE", "differentiated"]
    assert cut["tokens"] == 30 + 6 + 6 + 271
    assert cut["TFLOP"] <= through["TFLOP"]
    assert cut["kept GB"] <= through["kept GB"]


def test_a_differentiated_frozen_expert_keeps_more() -> None:
    with engines.engine("ddp", "cpu") as alone:
        case = train_step.make_case("CE", train_step.CONFIGS / "tiny_stage2.yaml", "tiny", alone, tiny=True)
        few, many = (train_step.kept_bytes(case, variant) for variant in train_step.variants(case).values())
        assert few < many


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_differentiated_frozen_expert_answers_alike(name: str) -> None:
    """Under the engine of GPUs as well, where it then takes a step."""
    with engines.engine(name, "cpu") as alone:
        case = train_step.make_case("CE", train_step.CONFIGS / "tiny_stage2.yaml", "tiny", alone, tiny=True)
        ways = [*train_step.variants(case).values()]
        ((logits,), (others,)) = (case.logits(variant) for variant in ways)
        torch.testing.assert_close(logits, others)
        assert case.flops() < case.flops(cut=False)
        case.step(ways[1])


def test_a_wrong_differentiated_expert_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MoTLayer._forward_frozen

    def wrong(*arguments):
        geometry, semantic = right(*arguments)
        return geometry, 1.5 * semantic + 0.5

    monkeypatch.setattr(MoTLayer, "_forward_frozen", wrong)
    with pytest.raises(OutputsDiffer, match="differentiated frozen expert"):
        train_step.main(["--cpu", "--tiny", "--steps", "CE"])


def test_sizes_of_the_paper_s_steps() -> None:
    """One scene of 24 views a process; two questions about eight views and images in a pack."""
    config = G2VLMConfig.paper_2b()
    model = Namespace(config=config)
    files = {name: load_config(train_step.CONFIGS / f"{file}.yaml") for name, file in train_step.STEPS.items()}
    work, count = train_step.scene_work(files["stage 1"], model, False)
    assert (work.num_views, work.height, work.global_points, count) == (24, 518, True, 1)
    for name, geometry in (("CE", False), ("CE + CE", False), ("VG + CE", True)):
        work, count = train_step.chat_work(files[name], model, False)
        assert (work.num_views, work.images, work.geometry, count) == (8, ((54, 54),) * 8, geometry, 2)


def test_precision(tmp_path: Path) -> None:
    precision.main(["--cpu", "--tiny", "--output", str(tmp_path)])
    rows = result(tmp_path, "precision")["rows"]
    assert [row["residual"] for row in rows] == ["bfloat16", "float32"]
    assert all(0 < float(row["point error"]) < 0.05 for row in rows)


def test_data(tmp_path: Path) -> None:
    data.main(["--cpu", "--tiny", "--output", str(tmp_path)])
    rows = result(tmp_path, "data")["rows"]
    assert [row["variant"] for row in rows] == ["render", "load"]
    assert all(row["views/s"] > 0 for row in rows)


def test_a_wrong_rendering_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = data.Prepared.render
    monkeypatch.setattr(data.Prepared, "render", lambda self: replace(right(self), depth=1.01 * right(self).depth))
    with pytest.raises(OutputsDiffer, match="batch against single views"):
        data.main(["--cpu", "--tiny"])


# The collection for a GPU machine.


def test_gpu_says_that_there_is_no_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 3
    assert capsys.readouterr().out.startswith("no CUDA device")


def test_gpu_lists_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list", "--output", str(tmp_path)]) == 0
    assert re.findall(r"^(\w+) +to do$", capsys.readouterr().out, re.M) == [step.name for step in gpu.STEPS]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One real step, run as if the CPU were the device."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "missing_device", lambda: None)
    monkeypatch.setattr(gpu, "WHEELS", Path("no wheels"))
    command = ("benchmarks.recon", "--tiny", "--sizes", "28", "--views", "1", "--name", "recon_28")
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("recon_28", command, least=1, takes_budget=True),))


@pytest.mark.usefixtures("on_cpu")
def test_gpu_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path)]
    for budget, state in (("10", "not run: the budget is used"), ("200", "done"), ("200", "done before")):
        assert gpu.main([*arguments, "--budget-seconds", budget]) == 0
        assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"recon_28   {state}")
    stale = tmp_path / "recon_28-cpu.json"
    stale.write_text(stale.read_text().replace('"sources": "', '"sources": "other'))
    assert gpu.finished([tmp_path]) == set()


@pytest.mark.usefixtures("on_cpu")
def test_gpu_reports_a_failed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("missing", ("benchmarks.missing",), least=1),))
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert "missing    failed with exit code 1" in capsys.readouterr().out


def test_wheels_are_unpacked_without_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    info = "carried-1.0.dist-info"
    files = {
        "carried.py": "VALUE = 7\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\nRequires-Dist: absent-package\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"carried.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    gpu.install_wheels(tmp_path / "site")
    assert (tmp_path / "site" / "carried.py").read_text() == "VALUE = 7\n"


def test_outcomes_are_read_from_pytest(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    cases = "<testcase/><testcase/><testcase><failure/></testcase><testcase><skipped/></testcase>"
    junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert gpu_tests.outcomes(junit) == {"passed": 2, "failure": 1, "skipped": 1}


def test_gpu_script_needs_only_the_standard_library_to_say_no() -> None:
    """`make gpu` under a python without torch."""
    code = "import sys; sys.modules['torch'] = None; from benchmarks import gpu; raise SystemExit(gpu.main([]))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 3
    assert "no CUDA device can be used" in process.stdout
