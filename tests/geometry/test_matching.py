import numpy as np
import pytest
import torch

from geometry.matching import attention_scores, best_cells, cosine_scores


def test_cosine_joins_the_heads() -> None:
    queries, keys = torch.randn(5, 3, 4), torch.randn(2, 6, 3, 4)
    scores = cosine_scores(queries, keys)
    for t, p, n in np.ndindex(2, 5, 6):
        expected = torch.cosine_similarity(queries[p].flatten(), keys[t, n].flatten(), dim=0)
        torch.testing.assert_close(scores[t, p, n], expected)


def test_attention_is_within_a_view_and_averaged_over_heads() -> None:
    queries, keys = torch.randn(5, 3, 4), torch.randn(2, 6, 3, 4)
    attention = attention_scores(queries, keys)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5))
    for t, p in np.ndindex(2, 5):
        heads = [(keys[t, :, a] @ queries[p, a] / 2).softmax(0) for a in range(3)]
        torch.testing.assert_close(attention[t, p], torch.stack(heads).mean(0))


def test_cells_are_read_row_by_row() -> None:
    scores = torch.eye(12)[[0, 3, 4, 11]]
    assert best_cells(scores, columns=4).tolist() == [[0, 0], [3, 0], [0, 1], [3, 2]]


def test_a_warped_copy_of_the_cells_is_matched_exactly() -> None:
    cells = torch.randn(24, 2, 8)
    order = torch.stack([torch.randperm(24) for _ in range(3)])
    found = best_cells(cosine_scores(cells, cells[order]), columns=6)
    where = order.argsort(-1)
    assert torch.equal(found, torch.stack([where % 6, where // 6], -1))


def test_shared_key_heads_must_be_repeated() -> None:
    with pytest.raises(ValueError, match="repeat the key heads"):
        cosine_scores(torch.randn(5, 4, 8), torch.randn(2, 6, 2, 8))


def test_half_precision_is_computed_in_single() -> None:
    queries, keys = torch.randn(5, 3, 4).bfloat16(), torch.randn(2, 6, 3, 4).bfloat16()
    for scores in (cosine_scores, attention_scores):
        assert torch.equal(scores(queries, keys), scores(queries.float(), keys.float()))
