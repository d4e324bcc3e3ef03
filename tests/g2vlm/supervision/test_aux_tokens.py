from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2vlm.supervision.aux_tokens import AuxTokens


@pytest.mark.parametrize("num_views", [1, 2, 5])
def test_first_view_has_a_vector_of_its_own(num_views: int) -> None:
    tokens = AuxTokens(8)
    *cameras, scale = tokens().embeddings(num_views)
    assert len(cameras) == num_views
    assert cameras[0].equal(tokens.camera[0])
    assert all(camera.equal(tokens.camera[1]) for camera in cameras[1:])
    assert not tokens.camera[0].equal(tokens.camera[1])
    assert scale.equal(tokens.scale)


def test_vectors_start_at_the_scale_of_embeddings() -> None:
    for vector in AuxTokens(4096, initializer_range=0.05).parameters():
        assert vector.mean().item() == pytest.approx(0, abs=0.005)
        assert vector.std().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("num_views", [1, 4])
def test_gradient_is_the_sum_over_views_and_never_absent(num_views: int) -> None:
    tokens, weight = AuxTokens(8), torch.randn(num_views + 1, 8)
    (tokens().embeddings(num_views) * weight).sum().backward()
    expected = torch.stack([weight[0], weight[1:-1].sum(0)])
    torch.testing.assert_close(tokens.camera.grad, expected)
    assert tokens.scale.grad.equal(weight[-1])


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    tokens, other = AuxTokens(8), AuxTokens(8)
    save_file(tokens.state_dict(), tmp_path / "aux.safetensors")
    other.load_state_dict(load_file(tmp_path / "aux.safetensors"))
    assert other().embeddings(3).equal(tokens().embeddings(3))
