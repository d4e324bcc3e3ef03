"""What holds for every module with parameters: gradients, precision, saving."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from g2vlm.supervision.dense_head import DenseHead, DensePrediction, DPTHead, DPTWidths, MLPHead
from g2vlm.supervision.heads import (
    CameraHead,
    CorrespondenceHead,
    FeatureAlignmentHead,
    LiftHeads,
    LiftProjectors,
    ScaleHead,
    SharedLiftProjector,
    TokenMLP,
)

DIM, PATCH, GRID, SIZE = 12, 8, (3, 2), (16, 24)
WIDTHS = DPTWidths((8, 8, 12, 12), 8)


class Case(NamedTuple):
    """How to build a module, what it reads, and how to call it."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], object]


def tokens(build: Callable[[], nn.Module]) -> Case:
    return Case(build, (2, 5, DIM), lambda head, x: head(x))


def dense(build: Callable[[], nn.Module]) -> Case:
    return Case(build, (4, 2, *GRID, DIM), lambda head, x: head(list(x), SIZE))


CASES = {
    "token_mlp": tokens(lambda: TokenMLP([DIM, 7, 9, 3], norm=True, activation=torch.exp)),
    "camera": tokens(lambda: CameraHead(DIM, inner_dim=16)),
    "scale": tokens(lambda: ScaleHead(DIM, inner_dim=16)),
    "alignment": Case(lambda: FeatureAlignmentHead(DIM, 6), (2, *GRID, DIM), lambda head, x: head(x, (4, 5))),
    "correspondence": tokens(lambda: CorrespondenceHead(DIM, embed_dim=6)),
    "dense": dense(lambda: DenseHead(DIM, PATCH, widths=WIDTHS)),
    "dense_confident": dense(lambda: DenseHead(DIM, PATCH, channels=3, confidence=True, widths=WIDTHS)),
    "dpt": dense(lambda: DPTHead(DIM, widths=WIDTHS)),
    "dpt_confident": dense(lambda: DPTHead(DIM, channels=3, confidence=True, widths=WIDTHS)),
    "mlp": dense(lambda: MLPHead(DIM, PATCH, inner_dim=16)),
    "mlp_confident": dense(lambda: MLPHead(DIM, PATCH, channels=3, confidence=True, inner_dim=16)),
    "lift": dense(lambda: LiftHeads(LiftProjectors(DIM, 8), widths=WIDTHS)),
    "lift_shared": dense(lambda: LiftHeads(SharedLiftProjector(DIM, 8), widths=WIDTHS)),
}


def outputs(result: object) -> list[Tensor]:
    """Every tensor of a result, in a fixed order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, DensePrediction):
        return [result.values] if result.confidence is None else [result.values, result.confidence]
    assert isinstance(result, dict)
    return [tensor for prediction in result.values() for tensor in outputs(prediction)]


def unlike_the_start(head: nn.Module) -> nn.Module:
    """The module with noise on its parameters, so that no weight is zero by initialisation."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def random_sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([(tensor * torch.randn_like(tensor)).sum() for tensor in tensors]).sum()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_reaches_the_input_and_every_parameter(case: Case) -> None:
    head = unlike_the_start(case.build())
    x = torch.randn(case.input_shape, requires_grad=True)
    random_sum(outputs(case.call(head, x))).backward()
    assert x.grad is not None
    assert (x.grad.flatten(0, -2).abs().amax(-1) > 0).all(), "a token has no gradient"
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_at_the_start_every_parameter_learns(case: Case) -> None:
    head = case.build()
    random_sum(outputs(case.call(head, torch.randn(case.input_shape)))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_half_precision_input_is_computed_in_float32(case: Case) -> None:
    head = case.build()
    x = torch.randn(case.input_shape).bfloat16()
    for ours, expected in zip(outputs(case.call(head, x)), outputs(case.call(head, x.float())), strict=True):
        assert ours.dtype == torch.float32
        assert ours.equal(expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_half_precision_weights_give_float32(case: Case) -> None:
    head = case.build()
    x = torch.randn(case.input_shape)
    expected = outputs(case.call(head, x))
    for ours, full in zip(outputs(case.call(head.bfloat16(), x.bfloat16())), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_saved_and_loaded_it_is_the_same(case: Case, tmp_path: Path) -> None:
    head, other = case.build(), case.build()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    x = torch.randn(case.input_shape)
    unlike_the_start(other).load_state_dict(load_file(tmp_path / "head.safetensors"))
    for ours, expected in zip(outputs(case.call(other, x)), outputs(case.call(head, x)), strict=True):
        assert ours.equal(expected)
